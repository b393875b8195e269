"""Building sets: what each kind of picture becomes, what is skipped, and what no failure may leave behind.
Reading them: damage is found, named and counted."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hrgan.data import drawn, images, making
from hrgan.data import manifest as manifests
from hrgan.data.build import build
from hrgan.data.check import check as check_set
from hrgan.data.dataset import Dataset, open_set
from hrgan.data.manifest import Form
from hrgan.data.order import Order
from hrgan.data.shards import BadSample, RawSample, parse_meta
from hrgan.data.stream import BadSamples, Batch, batches, read_range
from hrgan.errors import DataError, UserError

CLOTHING = Path(__file__).parents[2] / "shared" / "data" / "clothing"


def picture(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 pictures in two classes, nested."""
    for i in range(24):
        path = tmp_path / "source" / ("cat" if i % 3 else "dog") / f"deep{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return tmp_path / "source"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A sound set of 40 drawn pictures in shards of 16, 16 and 8, tiers 16 and 32."""
    build("drawn:40", tmp_path / "set", 32, labels="folder", workers=0, shard_samples=16)
    return tmp_path / "set"


FORM = Form((16, 32, 64), (4, 4), 3, 8, "webp", 95, "crop", "lanczos", "white", "auto")


def opened(root: Path) -> Dataset:
    return Dataset((open_set(str(root)),), (1.0,))


def check(root: Path) -> list[str]:
    return check_set(*open_set(str(root)))


def show(root: Path, count: int, resolution: int = 16, workers: int = 0, nimg: int = 0) -> list[Batch]:
    reader = batches(opened(root), resolution, seed=1, slots=2, window=8, nimg=nimg, batch=8, rank=0,
                     world=1, workers=workers)  # fmt: skip
    return [next(reader) for _ in range(count)]


def everything(root: Path, resolution: int = 16, workers: int = 0) -> list[Batch]:
    dataset = opened(root)
    return list(read_range(dataset, resolution, 0, dataset.num_samples, batch=7, workers=workers))


def shard(root: Path, tier: int, number: int) -> Path:
    return root / manifests.load(root).tiers[tier][number].file


def change(path: Path, offset: int) -> None:
    """Flip every bit of one byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def offset_of(path: Path, member: str) -> int:
    """Where a member's contents begin; its header is the 512 bytes before."""
    with tarfile.open(path) as archive:
        return archive.getmember(member).offset_data


def skipped(out: Path) -> dict[str, str]:
    with open(out / "skipped.csv", newline="") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def through(image: Image.Image, file_format: str, **options: object) -> np.ndarray:
    """Save a picture, read it as the build does; (H, W, 3) uint8."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return np.asarray(images.read_picture(buffer.getvalue(), FORM).image)


# What each kind of picture becomes


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 32), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 16, 8))  # blue at the top of the file
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to show
    pixels = through(image, "JPEG", quality=100, subsampling=0, exif=exif)
    assert pixels.shape == (16, 32, 3)
    assert pixels[8, 30].tolist() == pytest.approx([0, 0, 255], abs=3)  # the top came to the right
    assert pixels[8, 4].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_alpha_is_laid_over_white() -> None:
    pixels = through(Image.new("RGBA", (8, 8), (200, 0, 100, 51)), "PNG")
    assert pixels[0, 0].tolist() == [244, 204, 224]  # 0.2 * colour + 0.8 * 255
    pixels = through(Image.new("LA", (8, 8), (0, 0)), "PNG")
    assert pixels[0, 0].tolist() == [255, 255, 255]


def test_a_transparent_palette_colour_becomes_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 10, 200, 30])
    image.paste(0, (0, 0, 4, 8))
    pixels = through(image, "PNG", transparency=0)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 7].tolist() == [10, 200, 30]
    pixels = through(image, "PNG", transparency=bytes([255, 0]))
    assert pixels[0, 0].tolist() == [9, 9, 9]
    assert pixels[0, 7].tolist() == [255, 255, 255]


def test_a_transparent_colour_without_alpha_channel_becomes_white() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    image.paste((50, 60, 70), (0, 0, 4, 8))
    pixels = through(image, "PNG", transparency=(1, 2, 3))
    assert pixels[0, 0].tolist() == [50, 60, 70]
    assert pixels[0, 7].tolist() == [255, 255, 255]


def test_cmyk_becomes_rgb() -> None:
    pixels = through(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")
    assert pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(file_format: str) -> None:
    values = np.array([[0, 257, 385, 386, 32768, 65535]], np.uint16)  # 385 / 257 = 1.498, 386 / 257 = 1.502
    pixels = through(Image.fromarray(values), file_format)
    assert pixels[0, :, 0].tolist() == [0, 1, 1, 2, 128, 255]
    assert (pixels == pixels[:, :, :1]).all()


def test_grey_of_unknown_range_is_unreadable() -> None:
    with pytest.raises(images.Unusable, match=r"grey values 0.5 to 0.5, expected whole numbers from 0 to 255"):
        through(Image.new("F", (8, 8), 0.5), "TIFF")


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_is_repeated_into_three_channels(mode: str) -> None:
    assert through(Image.new("L", (8, 8), 255).convert(mode), "PNG")[3, 3].tolist() == [255, 255, 255]


def test_crop_is_central_and_each_tier_comes_straight_from_it() -> None:
    image = picture(3, (96, 64))
    tiers = images.make_tiers(images.Picture(image), FORM)
    square = image.crop((16, 0, 80, 64))
    assert (tiers.images[2] == np.asarray(square)).all()
    assert (tiers.images[0] == np.asarray(square.resize((16, 16), Image.Resampling.LANCZOS))).all()
    assert tiers.size == (96, 64)


def test_box_mean_rounds_to_nearest() -> None:
    block = np.array([0, 0, 0, 2, 1, 1, 0, 0], np.uint8).reshape(1, 2, 4, 1)  # boxes: 0 0 1 1 and 0 2 0 0
    assert images.box_mean(block[:, :, :2], 2).ravel().tolist() == [1]  # 2 / 4 = 0.5 goes up
    assert images.box_mean(block[:, :, 2:], 2).ravel().tolist() == [1]


@pytest.mark.parametrize(("image_format", "tolerance"), [("webp", 0), ("png", 0), ("jpeg", 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_formats_store_what_the_manifest_says(
    folder: Path, tmp_path: Path, image_format: str, tolerance: int, channels: int
) -> None:
    manifest = build(str(folder), tmp_path / "set", 32, image_format=image_format, channels=channels, workers=0)
    assert check(tmp_path / "set") == []
    assert manifest == manifests.load(tmp_path / "set")
    whole = [picture for batch in everything(tmp_path / "set", 32) for picture in batch.images.numpy()]
    assert whole[0].shape == (channels, 32, 32)
    with tarfile.open(shard(tmp_path / "set", 32, 0)) as archive:
        for number, found in enumerate(whole):
            meta = json.load(archive.extractfile(f"{number:09d}.json"))
            source = images.read_picture((folder / meta["origin"]).read_bytes(), manifest.form)
            expected = images.make_tiers(source, manifest.form).images[1]
            assert np.abs(found.transpose(1, 2, 0).astype(int) - expected).max() <= tolerance


# Building


def test_a_build_of_classes_counts_and_labels_them(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    build(str(folder), out, 32, labels="folder", workers=0, shard_samples=10, name="pets")
    info = manifests.info(manifests.load(out))
    assert info["classes"] == {"cat": 16, "dog": 8}
    assert info["num_samples"] == 24
    assert {tier: found["shards"] for tier, found in info["tiers"].items()} == {16: 3, 32: 3}
    assert sorted(p.name for p in out.iterdir()) == ["16", "32", "manifest.json", "skipped.csv"]
    assert [s.samples for s in manifests.load(out).tiers[16]] == [10, 10, 4]
    with tarfile.open(out / "16" / "pets-00001.tar") as archive:
        assert archive.getnames()[:2] == ["000000010.webp", "000000010.json"]
        meta = json.load(archive.extractfile("000000010.json"))
        assert ("cat", "dog")[meta["label"]] == meta["origin"].split("/")[0]
    labels = [label for batch in everything(out) for label in batch.labels.tolist()]
    assert [labels.count(0), labels.count(1)] == [16, 8]


def test_shards_are_byte_identical_whatever_the_workers_and_the_listing_order(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in sorted(folder.rglob("*.png"), reverse=True):  # written in another order
        (copy / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / path.relative_to(folder))
    alone = build(str(folder), tmp_path / "a", 32, name="x", workers=0, shard_samples=7)
    shared = build(str(copy), tmp_path / "b", 32, name="x", workers=3, shard_samples=7)
    assert alone == shared
    for file in (tmp_path / "a").rglob("*.tar"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    other = build(str(folder), tmp_path / "c", 32, name="x", workers=0, shard_samples=7, seed=1)
    assert other.real_set != alone.real_set


def test_samples_are_stored_in_random_order(tmp_path: Path) -> None:
    build("drawn:40", tmp_path / "set", 16, workers=0)
    with tarfile.open(shard(tmp_path / "set", 16, 0)) as archive:
        origins = [json.load(archive.extractfile(name))["origin"] for name in archive.getnames() if "json" in name]
    assert sorted(origins) == [f"drawn/{i:06d}" for i in range(40)]
    assert origins != sorted(origins)


def test_any_webdataset_reader_reads_the_shards(stored: Path) -> None:
    import webdataset

    samples = list(webdataset.WebDataset([str(shard(stored, 32, 0))], shardshuffle=False).decode("pil"))
    assert len(samples) == 16
    assert samples[3]["__key__"] == "000000003"
    assert samples[3]["webp"].size == (32, 32)
    assert set(samples[3]["json"]) == {"label", "origin", "crc32", "size"}


def test_unusable_files_are_skipped_counted_and_listed(folder: Path, tmp_path: Path) -> None:
    good = folder / "dog/deep0/00.png"
    (folder / "cut.png").write_bytes(good.read_bytes()[:-40])
    (folder / "text.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("not looked at")
    shutil.copy(good, folder / "again.PNG")
    picture(99, (60, 20)).save(folder / "low.bmp")
    bomb = bytearray(good.read_bytes())
    bomb[16:24] = struct.pack(">II", 30_000, 30_000)  # a header that promises 900 million pixels
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (folder / "bomb.png").write_bytes(bomb)
    out = tmp_path / "set"
    manifest = build(str(folder), out, 16, min_size=24, max_skipped=0.2, workers=2)
    found = skipped(out)
    duplicate = found.pop("again.PNG", None) or found.pop("dog/deep0/00.png")  # whichever came later in the order
    assert duplicate == "duplicate"
    assert found == {"cut.png": "unreadable", "text.jpg": "unreadable", "low.bmp": "too_small", "bomb.png": "bomb"}
    assert manifest.num_samples == 24
    with pytest.raises(
        DataError, match=r"5 of 29 images cannot be used \(1 bomb, 1 duplicate, 1 too_small, 2 unread.*csv"
    ):
        build(str(folder), tmp_path / "strict", 16, min_size=24, max_skipped=0.1, workers=0)
    assert sorted(p.name for p in (tmp_path / "strict").iterdir()) == ["skipped.csv"]
    assert len(skipped(tmp_path / "strict")) == 5


def test_duplicates_keep_the_first_in_order(folder: Path, tmp_path: Path) -> None:
    for i in range(12):
        shutil.copy(folder / "dog/deep0/00.png", folder / f"copy{i}.png")
    a = build(str(folder), tmp_path / "a", 16, name="x", max_skipped=1.0, workers=0)
    b = build(str(folder), tmp_path / "b", 16, name="x", max_skipped=1.0, workers=3)
    assert a == b
    assert a.num_samples == 24
    assert list(skipped(tmp_path / "a").values()) == ["duplicate"] * 12


def test_folders_without_images_say_what_they_hold(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(DataError, match="found no files, expected images"):
        build(str(source), tmp_path / "set", 16, workers=0)
    for name in ("a.txt", "b.TXT", "c.mp4"):
        (source / name).touch()
    with pytest.raises(DataError, match=r"found 3 other files \(.txt 2, .mp4 1\)"):
        build(str(source), tmp_path / "set", 16, workers=0)


def test_wrong_arguments_are_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(UserError, match=r"resolution is 100, expected .*; nearest: 128"):
        build(str(folder), out, 100, workers=0)
    with pytest.raises(UserError, match=r"resolution is 8, .*nearest: 16"):
        build(str(folder), out, 8, workers=0)
    with pytest.raises(UserError, match="missing is no folder and no file"):
        build(str(tmp_path / "missing"), out, 16, workers=0)
    with pytest.raises(UserError, match="expected drawn:COUNT"):
        build("drawn:many", out, 16, workers=0)
    with pytest.raises(UserError, match=r"quality is 0, .*; channels is 4 with alpha white"):
        build(str(folder), out, 16, quality=0, channels=4, workers=0)
    assert not out.exists()
    picture(1).save(folder / "loose.png")
    with pytest.raises(UserError, match=r"loose.png is in no class folder"):
        build(str(folder), out, 16, labels="folder", workers=0)


def test_a_folder_with_anything_else_is_left_alone(tmp_path: Path, stored: Path) -> None:
    with pytest.raises(UserError, match="already holds a set"):
        build("drawn:8", stored, 16, workers=0)
    assert check(stored) == []
    build("drawn:8", stored, 16, workers=0, overwrite=True)
    assert manifests.load(stored).num_samples == 8
    assert not (stored / "32").exists()
    (stored / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis.tex, which no build wrote"):
        build("drawn:9", stored, 16, workers=0, overwrite=True)
    assert check(stored) == []
    (tmp_path / "mine" / "64").mkdir(parents=True)
    (tmp_path / "mine" / "64" / "photo.jpg").touch()
    with pytest.raises(UserError, match="holds 64"):
        build("drawn:9", tmp_path / "mine", 16, workers=0)
    assert (tmp_path / "mine" / "64" / "photo.jpg").exists()


def build_in_another_process(out: Path, count: int, after: int = 2) -> subprocess.Popen[bytes]:
    """Building; it has written `after` shards of a tier."""
    code = f"from pathlib import Path; from hrgan.data.build import build; build('drawn:{count}', Path({str(out)!r}), 64, workers=2, shard_samples=16)"  # noqa: E501
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's `&` has it ignored
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(f"64/*-{after:05d}.tar")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_killed_build_leaves_no_set_and_can_be_repeated(tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = build_in_another_process(out, 100_000)
    with pytest.raises(UserError, match="another build is writing here"):
        build("drawn:20", out, 16, workers=0)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (out / "64").exists()
    with pytest.raises(DataError, match=r"manifest.json is missing, so .* is no finished set"):
        manifests.load(out)
    build("drawn:20", out, 16, workers=0)
    assert check(out) == []
    assert sorted(p.name for p in out.iterdir()) == ["16", "manifest.json", "skipped.csv"]


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_build_that_is_stopped_and_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("drawn:400", tmp_path / "whole", 64, workers=2, shard_samples=16)
    out = tmp_path / "set"
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        process = build_in_another_process(out, 400, after=1 + len(list(out.glob("64/*.tar"))))
        process.send_signal(number)
        assert process.wait(timeout=20) != 0
        assert not (out / "manifest.json").exists()
    build("drawn:400", out, 64, workers=2, shard_samples=16)
    found = re.search(r"going on after (\d+) pictures", capsys.readouterr().err)
    assert found is not None
    assert 48 <= int(found[1]) < 400
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("change", ["options", "source", "index"])
def test_what_an_interrupted_build_left_is_only_gone_on_with_as_it_was(
    change: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "set", tmp_path / "whole"
    made = iter(range(20))
    usual = making.make
    with monkeypatch.context() as patch:
        patch.setattr(making, "make", lambda *words: usual(*words) if next(made, 20) < 19 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(str(folder), out, 32, name="x", workers=0, shard_samples=4)
    assert (out / "build.sqlite").exists()
    assert len(list(out.glob("16/*.tar"))) == 5
    options = {"name": "x", "workers": 0, "shard_samples": 4}
    if change == "options":
        options["min_size"] = 20
    elif change == "source":
        picture(77).save(folder / "cat" / "new.png")
    else:
        (out / "build.sqlite").write_bytes(b"no database" * 100)
    build(str(folder), out, 32, **options)
    said = {"options": "with other options", "source": "the source has changed", "index": "build.sqlite is damaged"}
    assert f"building from the start, because {'it holds part of a build ' if change == 'options' else ''}{said[change]}" in capsys.readouterr().err  # noqa: E501
    build(str(folder), whole, 32, **options)
    assert files_of(out) == files_of(whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_and_the_build_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk failed: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(UserError, match=r"large: cannot write .* MB free"):
            build("drawn:200000", disk / "large", 32, workers=0)  # The index alone fills it.
        shutil.rmtree(disk / "large")
        with pytest.raises(UserError, match=r"set: cannot write .* MB free"):
            build("drawn:3000", disk / "set", 32, name="x", workers=0, shard_samples=100)
        assert not (disk / "set" / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        build("drawn:3000", disk / "set", 32, name="x", workers=0, shard_samples=100)
        build("drawn:3000", tmp_path / "whole", 32, name="x", workers=0, shard_samples=100)
        assert files_of(disk / "set") == files_of(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_building_does_not_load_torch() -> None:
    code = "import sys, hrgan.data.build; assert not {'torch', 'numpy', 'PIL', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# The drawn set


def test_drawn_pictures_are_the_same_at_every_size() -> None:
    for index in range(12):
        small, large = (np.asarray(drawn.draw(index, 5, size), np.float32) for size in (32, 256))
        means = large.reshape(32, 8, 32, 8, 3).mean(axis=(1, 3))
        assert np.abs(means - small).mean() < 1.0
        assert np.abs(means - small).max() < 40  # an edge of the mask moves by less than a quarter of a pixel


def test_drawn_modes_are_all_there_and_countable() -> None:
    whats = [drawn.factors(i, 0) for i in range(4000)]
    counts = dict.fromkeys(((shape, colour) for shape in drawn.SHAPES for colour in drawn.COLOURS), 0)
    for what in whats:
        counts[what.shape, what.colour] += 1
        assert all(what.size <= x <= 1 - what.size for x in what.place)
    assert len(counts) == 48
    assert min(counts.values()) > 50  # 83 expected
    what = drawn.factors(7, 0)
    image = drawn.draw(7, 0, 64)
    assert image.getpixel((0, 0)) == drawn.BACKGROUND
    colours = {colour for _, colour in image.getcolors(4096)}
    assert drawn.COLOURS[what.colour] in colours


def test_the_drawn_set_labels_shapes(stored: Path) -> None:
    manifest = manifests.load(stored)
    assert manifest.classes == drawn.SHAPES
    with tarfile.open(shard(stored, 16, 0)) as archive:
        meta = json.load(archive.extractfile("000000005.json"))
    assert manifest.classes[meta["label"]] == drawn.factors(int(meta["origin"][6:]), 0).shape


# Damage


def test_a_sound_set_has_no_problems_and_reads_alike_in_order(stored: Path) -> None:
    assert check(stored) == []
    for workers in (0, 2):
        read = everything(stored, 8, workers)
        assert [x for batch in read for x in batch.samples.tolist()] == list(range(40))
        assert [tuple(batch.images.shape) for batch in read] == [(7, 3, 8, 8)] * 5 + [(5, 3, 8, 8)]
    part = list(read_range(opened(stored), 16, 15, 34, batch=10))
    assert [x for batch in part for x in batch.samples.tolist()] == list(range(15, 34))
    with pytest.raises(DataError, match="goes up to 32, asked for 64"):
        show(stored, 1, resolution=64)


def test_a_flipped_byte_in_a_picture_is_replaced_counted_and_named(stored: Path) -> None:
    sound = np.concatenate([batch.samples for batch in show(stored, 10)])
    path = shard(stored, 16, 0)
    change(path, offset_of(path, "000000003.webp") + 60)
    for workers in (0, 2):
        counter = BadSamples()
        read = show(stored, 10, workers=workers)
        for batch in read:
            counter.add(batch)
        found = np.concatenate([batch.samples for batch in read])
        times = int((sound == 3).sum())
        assert times >= 1
        assert counter.bad == times
        assert counter.seen == 80
        assert (found != sound).sum() == times
        assert 3 not in found
        assert (sound[found != sound] == 3).all()
        assert f"{path}: sample 000000003: crc32 is" in counter.lines[0]
    counter.check(max_bad=times / 1000)
    with pytest.raises(DataError, match=f"{times} of 80 samples were bad, more than data.max_bad 0"):
        counter.check(max_bad=0.0)
    left = everything(stored)
    assert [line for batch in left for line in batch.bad if "sample 000000003: crc32 is" in line]
    assert sum(len(batch.samples) for batch in left) == manifests.load(stored).num_samples - 1
    assert any("sample 000000003: crc32" in line for line in check(stored))


def test_the_replacement_does_not_depend_on_where_reading_starts(stored: Path) -> None:
    path = shard(stored, 16, 0)
    for number in (3, 9, 10):
        change(path, offset_of(path, f"{number:09d}.webp") + 60)
    whole = np.concatenate([batch.samples for batch in show(stored, 20)])
    for nimg in (4, 36, 84):
        later = np.concatenate([batch.samples for batch in show(stored, 5, nimg=nimg)])
        assert (later == whole[nimg : nimg + 40]).all()


def test_the_replacement_is_the_next_good_sample_of_the_window(stored: Path) -> None:
    order = Order((16, 16, 8), 1, 2, 8)
    segments, permutation = order.window_of(0, 0, 0)
    firsts = (0, 16, 32)
    numbers = [(s.shard, firsts[s.shard] + s.first + i) for s in segments for i in range(s.samples)]
    shown = [numbers[i] for i in permutation]
    for place in (2, 3, 7):
        path = shard(stored, 16, shown[place][0])
        change(path, offset_of(path, f"{shown[place][1]:09d}.webp") + 60)
    read = np.concatenate([batch.samples for batch in show(stored, 2)]).reshape(-1, 2, 4)[:, 0].reshape(-1)
    expected = [number for _, number in shown]
    expected[2], expected[3], expected[7] = expected[4], expected[4], expected[0]
    assert read.tolist() == expected


def test_a_flipped_byte_that_hurts_no_sample_is_still_found_by_check(stored: Path) -> None:
    path = shard(stored, 16, 0)
    change(path, path.stat().st_size - 1)  # the padding after the archive's end
    lines = check(stored)
    assert len(lines) == 1
    assert f"{path}: sha256 is" in lines[0]


def test_a_wholly_bad_window_stops_the_run(stored: Path) -> None:
    for number in range(3):
        path = shard(stored, 16, number)
        for i in range(16 * number, min(40, 16 * number + 16)):
            change(path, offset_of(path, f"{i:09d}.webp") + 60)
    with pytest.raises(DataError, match=r"all 8 samples of a window are bad; .*crc32"):
        show(stored, 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("byte", "message"), [(5, "member|broken"), (20, "broken|member"), (130, "broken|member"),
                                               (345, "broken tar header at 000000005.json")])  # fmt: skip
def test_a_flipped_byte_in_a_header_is_a_data_error(stored: Path, byte: int, message: str, workers: int) -> None:
    path = shard(stored, 16, 0)
    change(path, offset_of(path, "000000005.json") - 512 + byte)
    with pytest.raises(DataError, match=f"{path}: found .*({message}).*expected"):
        show(stored, 20, workers=workers)
    assert any(str(path) in line for line in check(stored))


def rewrite(root: Path, number: int, data: bytes) -> None:
    """Replace a shard and its byte count in the manifest, so that only what is inside can be found wrong."""
    shard(root, 16, number).write_bytes(data)
    fields = json.loads((root / "manifest.json").read_text())
    fields["tiers"]["16"][number]["bytes"] = len(data)
    (root / "manifest.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("where", ["between samples", "inside a header", "inside contents"])
def test_a_cut_shard_is_a_data_error_before_and_while_reading(stored: Path, where: str) -> None:
    path = shard(stored, 16, 1)
    whole = path.read_bytes()
    start = offset_of(path, "000000020.webp") - 512
    cut = whole[: start + {"between samples": 0, "inside a header": 100, "inside contents": 600}[where]]
    path.write_bytes(cut)
    with pytest.raises(DataError, match=f"{path}: found {len(cut)} bytes, expected {len(whole)} bytes; copy the set"):
        show(stored, 1)
    rewrite(stored, 1, cut)
    with pytest.raises(
        DataError, match=f"{path}: found the end of the shard (after 4 samples, expected 16|inside 000000020.webp)"
    ):
        show(stored, 20)
    assert any(str(path) in line for line in check(stored))


def test_extra_samples_and_foreign_shards_are_data_errors(stored: Path) -> None:
    first, second = (shard(stored, 16, i).read_bytes() for i in range(2))
    end = offset_of(shard(stored, 16, 1), "000000031.json") + 512
    rewrite(stored, 1, second[:end] + first)
    with pytest.raises(DataError, match="found more after its 16 samples, expected the end of the shard"):
        show(stored, 20)
    rewrite(stored, 1, first)
    with pytest.raises(DataError, match=r"found member '000000000.webp', expected 000000016.webp"):
        everything(stored)
    assert any("000000016.webp" in line for line in check(stored))


def test_a_missing_shard_and_a_missing_json_are_data_errors(stored: Path) -> None:
    path = shard(stored, 16, 2)
    data = path.read_bytes()
    at = offset_of(path, "000000033.json") - 512
    rewrite(stored, 2, data[:at] + data[at + 1024 :])
    with pytest.raises(DataError, match=r"found member '000000034.webp', expected 000000033.json"):
        show(stored, 20)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: No such file or directory, expected"):
        show(stored, 1)
    assert any(f"{path}: No such file" in line for line in check(stored))


def test_a_shard_that_vanishes_while_workers_read_is_a_data_error(stored: Path) -> None:
    reader = batches(opened(stored), 16, seed=1, slots=2, window=8, nimg=0, batch=8, rank=0, world=1, workers=0)
    next(reader)
    shutil.rmtree(stored / "16")
    with pytest.raises(DataError, match="No such file or directory, expected a readable shard"):
        list(zip(range(20), reader, strict=False))


def test_pictures_of_the_wrong_size_or_label_are_bad_samples() -> None:
    with pytest.raises(BadSample, match=r"32x32x3 \(height, width, channels\), expected 16x16x3"):
        images.decode(images.encode(np.asarray(picture(1, (32, 32))), FORM), FORM, 16)
    for broken in (b"RIFF", b""):
        with pytest.raises(BadSample, match="does not decode"):
            images.decode(broken, FORM, 16)
    sample = RawSample("000000000", b"", b'{"label": 3, "origin": "", "size": [1, 1], "crc32": 0}')
    with pytest.raises(BadSample, match=r"crc32 is \d+, expected 0"):
        parse_meta(sample, 3)
    right = zlib.crc32(sample.meta.removesuffix(b', "crc32": 0}'))
    with pytest.raises(BadSample, match="label is 3, expected less than 3"):
        parse_meta(sample._replace(meta=sample.meta.replace(b" 0}", b" %d}" % right)), 3)
    with pytest.raises(BadSample, match="unreadable json"):
        parse_meta(sample._replace(meta=b"{"), 3)


def test_an_unusable_manifest_is_one_clear_line(stored: Path) -> None:
    path = stored / "manifest.json"
    fields = json.loads(path.read_text())
    for changed, message in [
        ("{", "unreadable"),
        (json.dumps(fields | {"version": 1}), "version is 1, expected 2"),
        (json.dumps({k: v for k, v in fields.items() if k not in ("seed", "form")}), "form, seed missing"),
        (json.dumps(fields | {"tiers": [1]}), "wrong shape"),
        (json.dumps(fields | {"num_samples": 41}), "contradict"),
        ("[]", "version is None"),
    ]:
        path.write_text(changed)
        with pytest.raises(DataError, match=message) as error:
            manifests.load(stored)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps(fields | {"form": fields["form"] | {"filter": "box"}}))
    assert check(stored) == [f"{path}: real_set does not match its fields; it was edited after the build"]


def peak_bytes(process: int) -> int:
    """Memory of a process and its children now, pages shared between them counted once."""
    total = 0
    for pid in [process, *map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
    return total


@pytest.mark.slow
@pytest.mark.skipif(not CLOTHING.is_dir(), reason=f"{CLOTHING} is not here")
def test_a_real_build_stays_under_a_gigabyte(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from hrgan.data.build import build; build({str(CLOTHING)!r}, Path({str(tmp_path / 'set')!r}), 128, labels='folder', workers=2)"  # noqa: E501
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's `&` has it ignored
    )
    peak = 0
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, StopIteration):  # one ended in between
            peak = max(peak, peak_bytes(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0
    assert 10 * 2**20 < peak < 2**30
    manifest = manifests.load(tmp_path / "set")
    assert manifest.num_samples + len(skipped(tmp_path / "set")) == 2245
    assert len(manifest.classes) == 10

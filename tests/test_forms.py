"""Forms of pictures: 16 bits, transparency, shapes that are no squares, from the source through the shards and training
to generated pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hrgan.data import manifest as manifests
from hrgan.data.build import build
from hrgan.data.dataset import Dataset, open_set
from hrgan.data.images import Picture, decode, encode, make_tiers
from hrgan.data.manifest import Form, Manifest
from hrgan.data.stream import batches, read_range
from hrgan.errors import DataError, UserError
from hrgan.pictures import to_float, to_rgb, to_stored
from hrgan.sizes import size_text, target
from tests.conftest import Children, cli

SHARED = Path(__file__).parents[2] / "shared" / "data"


def made(source: Path | str, out: Path, resolution: int | str, **options: Any) -> Manifest:
    manifest = build(str(source), out, resolution, workers=0, **options)
    assert manifest is not None
    return manifest


def pictures(out: Path, level: int) -> np.ndarray:
    """(N, h, w, C) as stored."""
    dataset = Dataset((open_set(str(out)),), (1.0,))
    read = [batch.images.permute(0, 2, 3, 1).numpy() for batch in read_range(dataset, level, 0, dataset.num_samples)]
    return np.concatenate(read)


# 16 bits


@pytest.fixture
def grey16(tmp_path: Path) -> Path:
    """Eight 32² pictures of 16 bits with values from 100 to 40,000."""
    folder = tmp_path / "grey16"
    folder.mkdir()
    for i in range(8):
        values = np.random.default_rng(i).integers(100, 5000 * (i + 1), (32, 32)).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{i}.png" if i % 2 else folder / f"{i}.tif")
    return folder


def test_sixteen_bits_are_stored_and_read_without_a_loss(grey16: Path, tmp_path: Path) -> None:
    manifest = made(grey16, tmp_path / "out", 32, bits=16)
    sources = [np.asarray(Image.open(path)) for path in grey16.iterdir()]
    assert manifest.values == (min(int(x.min()) for x in sources), max(int(x.max()) for x in sources))
    assert (manifest.channels, manifest.bits, manifest.form.format) == (1, 16, "png")
    found = pictures(tmp_path / "out", 32)
    assert found.dtype == np.uint16
    assert {x.tobytes() for x in found[..., 0]} == {x.astype(np.uint16).tobytes() for x in sources}
    assert len(np.unique(found)) > 5000  # 8 bits would leave 256
    small = {x.tobytes() for x in pictures(tmp_path / "out", 8)}
    for source in sources:  # 8² is the mean of boxes of the 16² tier, which is one filter from the source
        image = Image.fromarray(source.astype(np.float32)).resize((16, 16), Image.Resampling.LANCZOS)
        tier = np.floor(np.clip(np.asarray(image), source.min(), source.max()) + 0.5)
        assert ((tier.reshape(8, 2, 8, 2).sum((1, 3)) + 2) // 4).astype(np.uint16).tobytes() in small


@pytest.mark.parametrize("workers", [0, 2])
def test_sixteen_bits_go_through_the_loader_in_order(workers: int, grey16: Path, tmp_path: Path) -> None:
    made(grey16, tmp_path / "out", 32, bits=16)
    dataset = Dataset((open_set(str(tmp_path / "out")),), (1.0,))
    stored = pictures(tmp_path / "out", 32)
    reader = batches(dataset, 32, seed=1, slots=2, window=4, nimg=0, batch=8, rank=0, world=1, workers=workers)
    for _ in range(5):
        batch = next(reader)
        assert batch.images.dtype == torch.uint16
        assert (batch.images.permute(0, 2, 3, 1).numpy() == stored[batch.samples.numpy()]).all()


def test_the_window_decides_what_is_black_and_white(grey16: Path, tmp_path: Path) -> None:
    source = np.asarray(Image.open(grey16 / "7.png")).astype(np.float64)
    form = Form((16, 32), (4, 4), 1, 16, "png", 95, "crop", "lanczos", "white", "1000,20000")
    from hrgan.data.images import read_picture

    def level(window: str, bits: int = 16) -> np.ndarray:
        changed = Form((16, 32), (4, 4), 1, bits, "png", 95, "crop", "lanczos", "white", window)
        picture = read_picture((grey16 / "7.png").read_bytes(), changed)
        return make_tiers(picture, changed).images[1][..., 0].astype(np.float64)

    assert form.bits == 16
    expected = np.clip((source - 1000) / 19000, 0, 1)
    assert np.abs(level("1000,20000") - expected * 65535).max() <= 1
    assert np.abs(level("1000,20000", bits=8) - expected * 255).max() <= 0.51
    low, high = np.percentile(source, [5, 95])
    assert np.abs(level("5%,95%") - np.clip((source - low) / (high - low), 0, 1) * 65535).max() <= 1
    assert (level("raw") == source).all()
    assert np.abs(level("auto", bits=8) - source / 257).max() <= 0.51
    manifest = made(grey16, tmp_path / "out", 32, bits=16, window="1000,20000")
    assert manifest.values == (0, 65535)
    for wrong in ("20000,1000", "1,2,3", "a,b", "-1%,50%", "1%,50", "1.2.3,4"):
        with pytest.raises(UserError, match="expected auto, raw, file, LOW,HIGH such as"):
            made(grey16, tmp_path / "other", 32, bits=16, window=wrong)


def test_values_that_do_not_fit_are_refused_with_the_remedy(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(source / "fraction.tif")
    with pytest.raises(DataError, match=r"1 out_of_range"):
        made(source, tmp_path / "out", 32, bits=16)
    assert "give --window LOW,HIGH" in (tmp_path / "out" / "skipped.csv").read_text()
    assert pictures_of_window(source, tmp_path / "fine") == {32768}


def pictures_of_window(source: Path, out: Path) -> set[int]:
    made(source, out, 32, bits=16, window="0,1")
    return set(pictures(out, 32).ravel().tolist())


def test_the_numbers_of_a_set_and_of_training_go_both_ways() -> None:
    values = torch.arange(100, 7781, dtype=torch.int32).to(torch.uint16).view(1, 1, 1, -1)
    shown = to_float(values, (100, 7780))
    assert (shown.min(), shown.max()) == (-1, 1)
    assert (to_stored(shown, (100, 7780)).ravel() == np.arange(100, 7781)).all()
    assert to_stored(torch.tensor([[[[-3.0, 3.0]]]]), (100, 7780)).ravel().tolist() == [100, 7780]
    whole = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(1, 1, 1, -1)
    assert (to_stored(to_float(whole, (0, 65535)), (0, 65535)).ravel() == np.arange(65536)).all()


# Transparency


@pytest.fixture
def clear(tmp_path: Path) -> Path:
    """Eight pictures that are transparent on the left and half transparent in the middle."""
    folder = tmp_path / "clear"
    folder.mkdir()
    for i in range(8):
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[..., :3] = np.random.default_rng(i).integers(0, 256, (32, 32, 3))
        pixels[:, 10:, 3], pixels[:, 20:, 3] = 128, 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_transparency_is_kept_or_laid_over_white_or_black(clear: Path, tmp_path: Path) -> None:
    kept = made(clear, tmp_path / "keep", 32, alpha="keep")
    assert (kept.channels, kept.form.alpha) == (4, "keep")
    sources = {path.read_bytes() for path in clear.iterdir()}
    whole = {np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in sources}
    assert {x.tobytes() for x in pictures(tmp_path / "keep", 32)} == whole  # the colours below it, too
    for alpha, background in (("white", 255), ("black", 0)):
        made(clear, tmp_path / alpha, 32, alpha=alpha)
        found = pictures(tmp_path / alpha, 32)
        assert found.shape == (8, 32, 32, 3)
        assert (found[:, :, :10] == background).all()
    with pytest.raises(UserError, match="4 channels and alpha keep go together"):
        made(clear, tmp_path / "three", 32, alpha="keep", channels=3)
    with pytest.raises(UserError, match="JPEG has no transparency"):
        made(clear, tmp_path / "jpeg", 32, alpha="keep", image_format="jpeg")


def test_colours_are_resized_by_their_alpha() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, ::2] = (255, 0, 0, 255)
    pixels[:, 1::2] = (0, 255, 0, 0)  # green that cannot be seen
    form = Form((16,), (4, 4), 4, 8, "webp", 95, "crop", "box", "keep", "auto")
    (small,) = make_tiers(Picture(Image.fromarray(pixels)), form).images
    assert (small[..., :3] == (255, 0, 0)).all()
    assert (np.abs(small[..., 3].astype(int) - 128) <= 1).all()


def test_metrics_see_transparent_pictures_over_white() -> None:
    image = torch.tensor([10, 20, 30, 51], dtype=torch.uint8).view(1, 4, 1, 1)
    assert to_rgb(image).flatten().tolist() == [206, 208, 210]


# Shapes


def test_sizes_that_double_from_a_grid_are_taken_and_others_refused() -> None:
    assert target("256") == ((4, 4), 256)
    assert target("512x768") == ((4, 6), 512)
    assert target("768x512") == ((6, 4), 512)
    assert target("384x512") == ((3, 4), 512)
    assert target("1024x1024") == ((4, 4), 1024)
    assert [size_text((4, 6), level) for level in (4, 512)] == ["4x6", "512x768"]
    for text, nearest in (("100", "128"), ("500x750", "512x768"), ("1080x1920", "1152x1920")):
        with pytest.raises(UserError, match=rf"resolution is {text}, .*nearest: .*{nearest}"):
            target(text)
    for text in ("", "0", "axb", "1x2x3", "-4"):
        with pytest.raises(UserError, match="expected a side such as 256, or height x width such as 512x768"):
            target(text)


@pytest.mark.parametrize(("fit", "left", "colour"), [("crop", (0, 160, 0), 0), ("pad", (255, 255, 255), 0),
                                                     ("stretch", (160, 0, 0), 0)])  # fmt: skip
def test_a_picture_of_another_shape_is_cropped_padded_or_stretched(
    fit: Any, left: tuple[int, int, int], colour: int, tmp_path: Path
) -> None:
    """A wide picture, red on its left and right quarters, green between, to 16x24."""
    pixels = np.zeros((40, 160, 3), np.uint8)
    pixels[:] = (0, 160, 0)
    pixels[:, :40] = pixels[:, -40:] = (160, 0, 0)
    form = Form((16, 32), (4, 6), 3, 8, "png", 95, fit, "box", "white", "auto")
    tiers = make_tiers(Picture(Image.fromarray(pixels)), form)
    assert [tier.shape for tier in tiers.images] == [(16, 24, 3), (32, 48, 3)]
    top_left = tiers.images[1][0, 0].tolist() if fit == "pad" else tiers.images[1][16, 1].tolist()
    assert tuple(top_left) == left
    assert tiers.images[1][16, 24].tolist() == [0, 160, 0]


def test_padding_is_dark_for_grey_and_clear_for_transparent(tmp_path: Path) -> None:
    for channels, alpha, expected in ((1, "white", [0]), (3, "black", [0, 0, 0]), (4, "keep", [0, 0, 0, 0])):
        form = Form((16,), (4, 4), channels, 8, "png", 95, "pad", "box", alpha, "auto")
        image = Image.new({1: "L", 3: "RGB", 4: "RGBA"}[channels], (32, 16), (200,) * channels if channels > 1 else 200)
        (tier,) = make_tiers(Picture(image), form).images
        assert tier[0, 0].tolist() == expected
        assert tier[8, 8].tolist() == [200] * channels


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
def test_the_real_folders_build_with_their_counts_and_kinds(tmp_path: Path) -> None:
    emoji = made(SHARED / "emoji", tmp_path / "emoji", 32, alpha="keep")
    assert (emoji.num_samples, emoji.channels) == (400, 4)
    found = pictures(tmp_path / "emoji", 32)
    assert (found[..., 3] == 0).mean() > 0.1
    white = made(SHARED / "emoji", tmp_path / "white", 32)
    assert (white.num_samples, white.channels) == (400, 3)
    assert (pictures(tmp_path / "white", 32)[:, 0, 0] == 255).mean() > 0.9
    assert made(SHARED / "palette", tmp_path / "palette", 64, fit="pad").num_samples == 8
    photos = made(SHARED / "photos", tmp_path / "photos", 1024)
    assert (photos.num_samples, photos.resolution) == (3, 1024)


# Training


CONFIG = """
data: {{path: {shards}, workers: 1, slots: 2, window: 4}}
network: {{resolution: 16, latent: 8, widths: [8, 8, 8], {network}}}
schedule: {{total_kimg: 0.16, stable_kimg: 0.032, fade_kimg: 0.032, batch: 16}}
eval: {{every_kimg: 0, num_fake: 16, extractor: random, max_share: 1}}
checkpoint: {{every_kimg: 0.08}}
log: {{tick_kimg: 0.016, samples_kimg: 0.1, grid: 2, tensorboard: false}}
"""


def trained(children: Children, tmp_path: Path, shards: Path, network: str, world: int = 1) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG.format(shards=shards, network=network))
    run = tmp_path / f"run{world}"
    code, output = children.run(
        tmp_path / "log", cli, "train", "--config", str(tmp_path / "config.yaml"), "--run", str(run), world=world
    )
    assert code == 0, output
    return run


def test_sixteen_bits_are_trained_and_generated(
    children: Children, grey16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = made(grey16, tmp_path / "set", 16, bits=16)
    run = trained(children, tmp_path, tmp_path / "set", "channels: 1, bits: 16", world=2)
    assert f"values:\n  - {manifest.values[0]}\n  - {manifest.values[1]}" in (run / "config.yaml").read_text()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["fd_random"] > 0
    assert cli("generate", run, "--out", tmp_path / "out", "--count", 3) == 0
    image = Image.open(tmp_path / "out" / "000001.png")
    assert image.mode == "I;16"
    found = np.asarray(image)
    assert manifest.values[0] <= found.min() < found.max() <= manifest.values[1]
    assert len(np.unique(found)) > 100
    assert Image.open(next((run / "samples").iterdir())).mode == "L"
    other = made("drawn:20", tmp_path / "drawn", 16)
    assert other.bits == 8
    capsys.readouterr()
    assert cli("train", "--config", tmp_path / "config.yaml", "--data.path", tmp_path / "drawn", "--run", run) == 2
    assert "network.channels: 1, but" in capsys.readouterr().err


def test_transparent_pictures_are_trained_and_sampled(children: Children, clear: Path, tmp_path: Path) -> None:
    made(clear, tmp_path / "set", 16, alpha="keep")
    run = trained(children, tmp_path, tmp_path / "set", "channels: 4")
    assert cli("generate", run, "--out", tmp_path / "out", "--count", 2) == 0
    for path in (tmp_path / "out" / "000001.png", next((run / "samples").iterdir())):
        assert Image.open(path).mode == "RGBA"


def test_shapes_that_are_no_squares_are_trained(
    children: Children, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = made("drawn:40", tmp_path / "set", "16x24")
    assert manifests.info(manifest)["width"] == 24
    run = trained(children, tmp_path, tmp_path / "set", "grid: [4, 6]")
    assert cli("generate", run, "--out", tmp_path / "out", "--count", 2) == 0
    assert Image.open(tmp_path / "out" / "000001.png").size == (24, 16)
    assert "2 pictures of 16x24 at 0.16 kimg" in capsys.readouterr().out
    assert "16x24 stable" in (tmp_path / "log").read_text()
    assert cli("schedule", "--config", tmp_path / "config.yaml") == 0
    assert "16x24" in capsys.readouterr().out
    assert cli("train", "--config", tmp_path / "config.yaml", "--network.grid", "[4, 4]", "--run", tmp_path / "x") == 2
    assert "network.grid: [4, 4], but" in capsys.readouterr().err


def test_waiting_for_data_is_named_with_what_can_be_done(
    children: Children, grey16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("drawn:40", tmp_path / "set", 16)
    (tmp_path / "config.yaml").write_text(
        CONFIG.format(shards=tmp_path / "set", network="channels: 3").replace("workers: 1", "workers: 0")
    )
    code, output = children.run(
        tmp_path / "log", slow_on_rank_1, str(tmp_path / "config.yaml"), str(tmp_path / "run"), world=2
    )
    assert code == 0, output
    line = next(line for line in output.splitlines() if "waited for data" in line)
    assert line.startswith("warning: rank 1 waited for data in ")
    assert "more --data.workers (0 a process now)" in line
    assert "a set built with --format jpeg" in line
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert len(row["data_wait_ranks"]) == 2
    assert row["data_wait_ranks"][1] > 0.1


def slow_on_rank_1(config: str, run: str) -> int:
    import os
    import time

    from hrgan.data import stream

    usual = stream.batches

    def slowed(*words: Any, **options: Any) -> Any:
        for batch in usual(*words, **options):
            if os.environ["RANK"] == "1":
                time.sleep(0.2)
            yield batch

    stream.batches = slowed
    return cli("train", "--config", config, "--run", run)


@pytest.mark.parametrize(
    ("channels", "bits", "image_format"),
    [(c, 8, f) for c in (1, 3) for f in ("webp", "png", "jpeg")] + [(4, 8, "webp"), (4, 8, "png"), (1, 16, "png")],
)
def test_the_decoder_gives_the_pixels_that_pillow_gives(channels: int, bits: int, image_format: str) -> None:
    alpha = "keep" if channels == 4 else "white"
    form = Form((16, 64), (4, 4), channels, bits, image_format, 90, "crop", "lanczos", alpha, "auto")
    rng = np.random.default_rng(0)
    for number in range(20):
        pixels = rng.integers(0, 2**bits, (64, 64, channels)).astype(np.uint16 if bits == 16 else np.uint8)
        if number % 2:  # smooth, as pictures are
            pixels[:] = np.linspace(0, 2**bits - 1, 64)[:, None, None] * rng.random(channels)
        data = encode(pixels, form)
        found = decode(data, form, 64)
        mode = {1: "I;16" if bits == 16 else "L", 3: "RGB", 4: "RGBA"}[channels]
        pillow = Image.open(io.BytesIO(data))
        expected = np.asarray(pillow if pillow.mode == mode else pillow.convert(mode))
        assert (found == expected.reshape(found.shape)).all()
        if image_format != "jpeg":
            assert (found == pixels).all()


def test_a_mix_is_trained_from_the_command_line(children: Children, shards: Path, tmp_path: Path) -> None:
    made("drawn:40", tmp_path / "other", 32, seed=4)
    (tmp_path / "config.yaml").write_text(CONFIG.format(shards=shards, network="channels: 3"))
    words = ("--config", str(tmp_path / "config.yaml"), "--run", str(tmp_path / "run"))
    path = f"{{{shards}: 0.7, {tmp_path / 'other'}: 0.3}}"
    code, output = children.run(tmp_path / "log", cli, "train", *words, "--data.path", path)
    assert code == 0, output
    for _ in range(2):  # It goes on with the configuration that it wrote, and only with the same sets and shares.
        code, output = children.run(tmp_path / "log", cli, "train", *words, "--data.path", path)
        assert code == 0, output
    path = f"{{{shards}: 0.5, {tmp_path / 'other'}: 0.5}}"
    code, output = children.run(tmp_path / "log", cli, "train", *words, "--data.path", path)
    assert code == 2
    assert "holds other images" in output

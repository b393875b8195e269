"""Pictures come from folders, archives, tables and URLs, with what these say of them, and nothing is lost."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hrgan.data import fetch
from hrgan.data import manifest as manifests
from hrgan.data.build import build
from hrgan.data.dataset import Dataset, open_set
from hrgan.data.images import read_picture
from hrgan.data.manifest import Manifest
from hrgan.data.shards import ShardReader, parse_meta
from hrgan.data.stream import read_range
from hrgan.errors import DataError, UserError


def png(seed: int, size: tuple[int, int] = (32, 32)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_of(seed: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(seed))))


CROP = {"x": 8, "y": 4, "w": 32, "h": 32}


def made(source: Path, out: Path, **options: Any) -> Manifest:
    manifest = build(str(source), out, 32, workers=0, **options)
    assert manifest is not None
    return manifest


def stored(out: Path) -> dict[str, tuple[np.ndarray, int, dict[str, str]]]:
    """origin -> (pixels, label, attributes) of each sample."""
    manifest = manifests.load(out)
    dataset = Dataset((open_set(str(out)),), (1.0,))
    pictures = [x for batch in read_range(dataset, 32, 0, manifest.num_samples) for x in batch.images.numpy()]
    found, first = {}, 0
    for shard in manifest.tiers[32]:
        with open(out / shard.file, "rb") as stream:
            reader = ShardReader(stream, shard.file, first, shard.samples, manifest.extension)
            for number in range(shard.samples):
                meta = parse_meta(reader.read(), len(manifest.classes))
                picture = pictures[first + number].transpose(1, 2, 0)
                found[meta.origin] = (picture, meta.label, meta.attributes)
        first += shard.samples
    return found


def write_zip(path: Path, files: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def skipped(out: Path) -> list[list[str]]:
    with open(out / "skipped.csv", newline="") as file:
        return list(csv.reader(file))[1:]


def test_a_stylegan_zip_keeps_its_labels(tmp_path: Path) -> None:
    files = {f"0000{i % 2}/img{i:08d}.png": png(i) for i in range(24)}
    labels = [[name, 11 if i % 3 else 2] for i, name in enumerate(files)]
    source = write_zip(tmp_path / "set.zip", files | {"dataset.json": json.dumps({"labels": labels}).encode()})
    manifest = made(source, tmp_path / "out", labels="label")
    assert (manifest.label, manifest.classes, manifest.class_counts) == ("label", ("2", "11"), (8, 16))
    found = stored(tmp_path / "out")
    assert found.keys() == files.keys()
    for i, name in enumerate(files):
        assert (found[name][0] == pixels_of(i)).all()
        assert found[name][1] == (1 if i % 3 else 0)
    one_hot = json.dumps({"labels": [[name, [0, 0, 1]] for name in files]})
    source = write_zip(tmp_path / "hot.zip", files | {"dataset.json": one_hot.encode()})
    assert made(source, tmp_path / "hot", labels="label").classes == ("2",)
    none = json.dumps({"labels": [[name, None] for name in files]})
    source = write_zip(tmp_path / "none.zip", files | {"dataset.json": none.encode()})
    with pytest.raises(UserError, match=r"labels\[0\] is .*None.*, expected \[file, class number\]"):
        made(source, tmp_path / "none", labels="label")


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_zips_are_read_at_the_members_places(kind: int, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {f"{i}.png": png(i) for i in range(6)}, kind)
    path.write_bytes(b"something before it" + path.read_bytes())  # as self-extracting archives have
    if kind == zipfile.ZIP_BZIP2:
        with pytest.raises(DataError, match=r"6 of 6 images cannot be used"):
            made(path, tmp_path / "out")
        assert "compression 12; pack the archive again" in skipped(tmp_path / "out")[0][2]
        return
    assert made(path, tmp_path / "out").num_samples == 6
    for origin, (picture, _, _) in stored(tmp_path / "out").items():
        assert (picture == pixels_of(int(origin[0]))).all()
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("3.png")
    data[member.header_offset + 30 + 5 + 200] ^= 4
    path.write_bytes(data)
    made(path, tmp_path / "damaged", max_skipped=0.5)
    ((name, reason, _),) = skipped(tmp_path / "damaged")
    assert (name, reason) == ("3.png", "unreadable")


def test_a_folder_with_dataset_json_and_class_folders(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for i in range(6):
        (source / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        (source / f"c{i % 2}" / f"{i}.png").write_bytes(png(i))
    (source / "dataset.json").write_text(json.dumps({"labels": [[f"c{i % 2}/{i}.png", i // 3] for i in range(6)]}))
    assert made(source, tmp_path / "a", labels="label").class_counts == (3, 3)
    assert made(source, tmp_path / "b", labels="folder").classes == ("c0", "c1")
    with pytest.raises(UserError, match=r"nothing in 'colour', the field of --labels; it has: label"):
        made(source, tmp_path / "c", labels="colour")


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.xz"])
def test_webdataset_tars_keep_the_fields_of_their_samples(ending: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for shard in range(2):
        files = []
        for i in range(5):
            key = f"{shard}{i}"
            meta = {"view": "left" if i % 2 else "right", "age": 40 + i, "nested": {"a": 1}}
            meta["attributes"] = {"deep": "x"}
            files += [(f"{key}.cls", str(i % 3).encode()), (f"{key}.png", png(10 * shard + i))]
            files.append((f"{key}.json", json.dumps(meta).encode()))
        write_tar(source / f"shard-{shard}.{ending}", files, "w" if ending == "tar" else f"w:{ending[4:]}")
    manifest = made(source, tmp_path / "out", labels="cls", attributes=("view", "age", "deep"))
    assert manifest.classes == ("0", "1", "2")
    assert manifest.class_counts == (4, 4, 2)
    assert manifest.attributes["view"] == {"left": 4, "right": 6}
    assert manifest.attributes["age"] == {str(age): 2 for age in range(40, 45)}
    found = stored(tmp_path / "out")
    assert found[f"shard-1.{ending}/13.png"][2] == {"view": "left", "age": "43", "deep": "x"}
    for shard in range(2):
        for i in range(5):
            picture, label, _ = found[f"shard-{shard}.{ending}/{shard}{i}.png"]
            assert (picture == pixels_of(10 * shard + i)).all()
            assert label == i % 3


def test_a_set_of_ours_is_a_source(tmp_path: Path) -> None:
    build("drawn:20", tmp_path / "first", 64, labels="folder", workers=0, shard_samples=8)
    manifest = made(tmp_path / "first", tmp_path / "second", labels="label")
    assert manifest.num_samples == 20  # of one tier, not of all


def write_parquet(path: Path, rows: int, nested: bool) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": png(i), "path": f"{i}.png"} if nested else png(i) for i in range(rows)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if nested else pa.binary()
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    schema = pa.schema(
        [("label", pa.int64()), ("image", kind), ("site", pa.string())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    columns = {"label": [i % 2 for i in range(rows)], "image": cells, "site": [f"s{i % 3}" for i in range(rows)]}
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=7)
    return path


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_files_with_an_image_column(nested: bool, tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.mkdir()
    write_parquet(source / "train-00000.parquet", 20, nested)
    manifest = made(source, tmp_path / "out", labels="label", attributes=("site",), shard_samples=6)
    assert (manifest.classes, manifest.class_counts) == (("cat", "dog"), (10, 10))
    assert manifest.attributes == {"site": {"s0": 7, "s1": 7, "s2": 6}}
    found = stored(tmp_path / "out")
    for i in range(20):
        picture, label, attributes = found[f"train-00000.parquet/{i // 7:05d}-{i % 7:07d}"]
        assert (picture == pixels_of(i)).all()
        assert (label, attributes) == (i % 2, {"site": f"s{i % 3}"})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["16", "32", "manifest.json", "skipped.csv"]
    for number in (2, 1, 3):  # Each part reads only its own rows.
        options = {"labels": "label", "attributes": ("site",), "shard_samples": 6, "name": "data"}
        build(str(source), tmp_path / "parts", 32, workers=0, part=f"{number}/3", **options)
    from hrgan.data.parts import merge

    assert merge(tmp_path / "parts") == manifest


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables_name_pictures_labels_attributes_and_crops(kind: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i, (64, 48)))
        rows.append({"file_name": f"images/{i}.png", "kind": f"k{i % 2}", "place": "là"} | CROP)
    rows.append({**rows[0], "x": 20, "y": 10})  # the same file again, another part of it
    rows.append({**rows[1], "x": "", "y": "", "w": "", "h": ""})
    source = tmp_path / f"list.{kind}"
    with source.open("w", newline="", encoding="utf-8") as file:
        if kind == "jsonl":
            file.write("\n".join(json.dumps(row) for row in rows) + "\n")
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    manifest = made(source, tmp_path / "out", labels="kind", attributes=("place",), crop=("x", "y", "w", "h"))
    assert manifest.num_samples == 6
    assert manifest.attributes == {"place": {"là": 6}}
    found = stored(tmp_path / "out")
    whole = np.asarray(Image.open(io.BytesIO(png(0, (64, 48)))))
    assert (found["images/0.png#000000001"][0] == whole[4:36, 8:40]).all()
    assert (found["images/0.png#000000005"][0] == whole[10:42, 20:52]).all()
    with pytest.raises(UserError, match=r"row 1: no column q of --crop; its columns are: file_name, kind"):
        made(source, tmp_path / "other", crop=("q", "y", "w", "h"))


def test_crops_outside_of_the_picture_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    crops = ("0,0,32,32", "1,0,32,32", "-1,0,9,9", "0,0,0,9")
    (tmp_path / "list.csv").write_text("path,x,y,w,h\n" + "".join(f"a.png,{crop}\n" for crop in crops))
    made(tmp_path / "list.csv", tmp_path / "out", crop=("x", "y", "w", "h"), max_skipped=0.8)
    assert [row[1] for row in skipped(tmp_path / "out")] == ["crop"] * 3
    (tmp_path / "bad.csv").write_text("path,x,y,w,h\na.png,0,nan,x,32\n")
    with pytest.raises(UserError, match="row 1: crop is 0,nan,x,32, expected four numbers of pixels"):
        made(tmp_path / "bad.csv", tmp_path / "bad", crop=("x", "y", "w", "h"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, int]]]:
    """URL of a server, and how often each path was asked for. /0.png to /9.png are pictures; the first time they are
    asked for, /3.png answers 500 and /4.png breaks off; /gone is 404."""
    asked: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked[path] = asked.get(path, 0) + 1
            if path == "/gone.png":
                self.send_error(404)
                return
            if path == "/3.png" and asked[path] == 1:
                self.send_error(500)
                return
            content = png(int(path[1]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: 100 if path == "/4.png" and asked[path] == 1 else None])

        def log_message(self, *words: object) -> None:
            pass

    monkeypatch.setattr(fetch, "BACKOFF_SECONDS", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def test_urls_are_fetched_again_when_they_fail_and_their_secrets_stay_out(
    server: tuple[str, dict[str, int]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url, asked = server
    lines = ["url,kind"] + [f"{url}/{i}.png?signature=hidden{i},k" for i in range(6)]
    lines.append(f"{url}/gone.png?signature=hidden,k")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    manifest = made(tmp_path / "list.csv", tmp_path / "out", labels="kind", max_skipped=0.2)
    assert manifest.num_samples == 6
    assert (asked["/3.png"], asked["/4.png"], asked["/gone.png"]) == (2, 2, 1)
    assert skipped(tmp_path / "out") == [[f"{url}/gone.png#000000007", "unreachable", "HTTP 404"]]
    found = stored(tmp_path / "out")
    assert (found[f"{url}/4.png#000000005"][0] == pixels_of(4)).all()
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"hidden" not in path.read_bytes()
    assert "hidden" not in "".join(capfd.readouterr())


def test_names_that_no_disk_would_have_are_only_names(tmp_path: Path) -> None:
    names = ["../../etc/passwd.png", "/abs/olute.png", "new\nline.png", 'quo"te,.png', "ünï\u202e.png"]
    names.append("a" * 200 + ".png")
    source = write_tar(tmp_path / "odd.tar", [(name, png(i)) for i, name in enumerate(names)])
    made(source, tmp_path / "out")
    found = stored(tmp_path / "out")
    assert found.keys() == set(names)
    made(write_zip(tmp_path / "odd.zip", {name: png(i) for i, name in enumerate(names)}), tmp_path / "zip")
    assert len(stored(tmp_path / "zip")) == len(names)
    folder = tmp_path / "folder"
    folder.mkdir()
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png"))).write_bytes(png(3))
    made(folder, tmp_path / "bytes")
    assert len(stored(tmp_path / "bytes")) == 1


def test_members_of_one_name_are_counted(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "twice.tar", [("a.png", png(1)), ("b.png", png(2)), ("a.png", png(3))])
    manifest = made(source, tmp_path / "out", max_skipped=0.5)
    assert manifest.num_samples == 2
    assert skipped(tmp_path / "out") == [["a.png", "duplicate_name", "another picture has this name"]]


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "zip", "parquet"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.8])
def test_a_cut_archive_is_refused_by_name(ending: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{ending}"
    if ending == "zip":
        write_zip(path, {f"{i}.png": png(i) for i in range(8)})
    elif ending == "parquet":
        write_parquet(path, 8, True)
    else:
        write_tar(path, [(f"{i}.png", png(i)) for i in range(8)], "w" if ending == "tar" else "w:gz")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=rf"cut\.{ending.replace('.', '.')}: (cut or damaged|damaged)"):
        made(path, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_tar_cut_between_two_members_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set.tar", [(f"{i}.png", png(i)) for i in range(8)])
    with tarfile.open(path) as archive:
        border = archive.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:border])
    with pytest.raises(DataError, match=f"set.tar: cut or damaged at byte {border}"):
        made(path, tmp_path / "out")


def test_sources_that_are_none_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes.txt is of no known kind, expected a folder, \.zip"):
        made(tmp_path / "notes.txt", out)
    (tmp_path / "list.csv").write_text("picture,label\na.png,1\n")
    with pytest.raises(UserError, match=r"row 1: no column path, file_name, .*; its columns are: picture, label"):
        made(tmp_path / "list.csv", out)
    (tmp_path / "list.jsonl").write_text('{"path": "a.png"}\n[1]\n')
    with pytest.raises(UserError, match=r"row 2: holds list, expected an object"):
        made(tmp_path / "list.jsonl", out)
    (tmp_path / "ftp.csv").write_text("url\nftp://user:secret@host/a.png\n")
    with pytest.raises(UserError, match=r"row 1: ftp://host/a.png, expected a path, http"):
        made(tmp_path / "ftp.csv", out)
    (tmp_path / "text.csv").write_text("path\nnotes.txt\nmissing.png\n")
    with pytest.raises(DataError, match=r"2 of 2 images cannot be used \(2 unreadable\)"):
        made(tmp_path / "text.csv", out)
    empty = write_zip(tmp_path / "empty.zip", {"a.txt": b"x"})
    with pytest.raises(DataError, match=r"found 1 other files \(.txt 1\), expected images"):
        made(empty, out)


def test_encrypted_members_and_missing_decoders_are_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {"a.png": png(0), "b.png": png(1)})
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02")
    data[place + 8] |= 1  # The first member's flag in the central directory says that it is encrypted.
    path.write_bytes(data)
    made(path, tmp_path / "out", max_skipped=0.5)
    assert skipped(tmp_path / "out") == [["a.png", "unreadable", "encrypted"]]
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(png(0))
    (source / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(DataError, match=r"1 decoder.*`decoder` names packages to install"):
        made(source, tmp_path / "heic")
    assert skipped(tmp_path / "heic")[0][2] == "HEIC needs the package pillow-heif: pip install pillow-heif"


def test_near_duplicates_are_left_out_on_request(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
        image.save(source / f"{i}.png")
        image.resize((80, 80)).save(source / f"{i}-small.jpg", quality=70)
    assert made(source, tmp_path / "all").num_samples == 12
    manifest = made(source, tmp_path / "few", near=4)
    assert manifest.num_samples == 6
    rows = skipped(tmp_path / "few")
    assert [row[1] for row in rows] == ["near_duplicate"] * 6
    assert all(row[0][0] == row[2].removeprefix("looks like ")[0] for row in rows)


def test_an_attribute_can_be_the_label_in_training(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    rows = "".join(f"{i}.png,a{i % 2},b{i % 4}\n" for i in range(8))
    (tmp_path / "list.csv").write_text("path,first,second\n" + rows)
    made(tmp_path / "list.csv", tmp_path / "out", labels="first", attributes=("second",))
    member = open_set(str(tmp_path / "out"))
    for label, classes in ((None, ("a0", "a1")), ("first", ("a0", "a1")), ("second", ("b0", "b1", "b2", "b3"))):
        dataset = Dataset((member,), (1.0,), label)
        assert dataset.classes == classes
        (batch,) = read_range(dataset, 32, 0, 8)
        origins = {o: int(o[0]) for o in stored(tmp_path / "out")}
        assert sorted(batch.labels.tolist()) == sorted(i % len(classes) for i in origins.values())
    with pytest.raises(UserError, match=r"data.label: the set list has no classes 'third'; it has first, second"):
        member.manifest.label_classes("third")


def test_reading_is_the_stated_transform(tmp_path: Path) -> None:
    """Round trip: what is read equals the source through crop and filter, for pictures that are resized, too."""
    source = tmp_path / "source"
    source.mkdir()
    for i in range(5):
        (source / f"{i}.png").write_bytes(png(i, (50 + 7 * i, 41)))
    for name, resample in (("lanczos", 1), ("box", 4), ("bicubic", 3)):
        out = tmp_path / name
        manifest = made(source, out, image_filter=name)
        assert manifest.form.filter == name
        for origin, (found, _, _) in stored(out).items():
            image = read_picture((source / origin).read_bytes(), manifest.form).image
            left = (image.width - 41) // 2
            square = image.crop((left, 0, left + 41, 41))
            assert (found == np.asarray(square.resize((32, 32), resample))).all()

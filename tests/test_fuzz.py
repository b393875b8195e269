"""Damaged inputs through build, check and stream: no hang, no crash, no silent loss, each one counted with a reason.

HRGAN_FUZZ is how many inputs are tried in all (about 2,000 by default; 10000 for a full run). Which ones is the same in
every run.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from hrgan.data import making
from hrgan.data import manifest as manifests
from hrgan.data.build import build
from hrgan.data.check import check
from hrgan.data.dataset import Dataset, open_set
from hrgan.data.manifest import Manifest
from hrgan.data.shards import ShardReader, parse_meta
from hrgan.data.stream import Batch, batches, read_range
from hrgan.errors import DataError, HrganError, UserError

TOTAL = max(100, int(os.environ.get("HRGAN_FUZZ", "2000")))
BATCH = 50
"""Damaged pictures in one build."""
PICTURES = math.ceil(TOTAL * 0.5 / BATCH) * BATCH
ARCHIVES = math.ceil(TOTAL * 0.2)
SHARDS = math.ceil(TOTAL * 0.14)
MANIFESTS = math.ceil(TOTAL * 0.16)
SECONDS = 10.0
"""For one input."""
REASONS = {
    *("unreadable", "decoder", "too_small", "bomb", "crop", "out_of_range", "duplicate", "near_duplicate"),
    *("duplicate_name", "too_large", "unreachable"),
}
TRIED: Counter[str] = Counter()
"""Inputs by kind and by what became of them."""

pytestmark = pytest.mark.timeout(1800)
fresh = count()


def fuzz(examples: int) -> settings:
    """No shrinking: the message names the input, and an input that hangs would be tried for minutes."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


class TooLong(BaseException):
    """No Exception: the code under test may not catch it."""


def _ring(*_: object) -> None:
    raise TooLong


@contextlib.contextmanager
def limited(what: object) -> Iterator[None]:
    """An AssertionError that names the input after SECONDS, or for any end that is not one of hrgan's."""
    before = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except TooLong:
        raise AssertionError(f"more than {SECONDS} seconds: {what}") from None
    except (HrganError, AssertionError):
        raise
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]!r}: {what}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _each_picture_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    each_timed(monkeypatch.setattr)


def each_timed(replace: Callable[..., None]) -> None:
    """A build of many pictures starts the clock anew at each."""
    make = making.make

    def timed(*given: Any) -> Any:
        if signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        return make(*given)

    replace(making, "make", timed)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def ended(error: HrganError, what: object) -> str:
    """What became of an input that was refused: in one line, and for a cause that is the input's."""
    assert isinstance(error, (DataError, UserError)), f"{type(error).__name__}: {what}"
    text = str(error)
    assert text, f"nothing said: {what}"
    assert len(text.splitlines()) == 1, f"more than one line {text[:300]!r}: {what}"
    assert len(text) < 5000, f"{len(text)} characters {text[:300]!r}: {what}"
    return type(error).__name__


# Damage to bytes

share = st.floats(0, 1, exclude_max=True)
bits = st.lists(st.tuples(share, st.integers(0, 7)), min_size=1, max_size=20)
ABSURD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
damages = st.one_of(
    st.tuples(st.just("cut"), share),
    st.tuples(st.just("flip"), bits),
    st.tuples(st.just("flip"), st.lists(st.tuples(share, st.integers(0, 7)), min_size=1, max_size=1)),
    st.tuples(st.just("head"), bits),  # flipped within the first 128 bytes
    st.tuples(st.just("number"), share, st.sampled_from(ABSURD), st.sampled_from("<>"), st.sampled_from("BHI")),
    st.tuples(st.just("remove"), share, share),
    st.tuples(st.just("repeat"), share, share),
    st.tuples(st.just("blank"), share, share),
    st.tuples(st.just("insert"), share, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("empty")),
    st.tuples(st.just("junk"), st.binary(max_size=400)),
)
Damage = tuple[Any, ...]


def damaged(data: bytes, damage: Damage) -> bytes:
    """The bytes after one kind of damage; never the same bytes."""
    kind, *how = damage
    changed, size = bytearray(data), len(data)
    if kind == "cut":
        changed = changed[: int(how[0] * size)]
    elif kind in ("flip", "head"):
        for place, bit in how[0]:
            changed[int(place * (size if kind == "flip" else min(size, 128)))] ^= 1 << bit
    elif kind == "number":
        place, number, order, width = how
        raw = struct.pack(order + width, number & 2 ** (8 * struct.calcsize(width)) - 1)
        at = int(place * size)
        changed[at : at + len(raw)] = raw
    elif kind in ("remove", "repeat", "blank"):
        first, last = sorted(int(x * size) for x in how)
        piece = bytes(changed[first:last])
        changed[first:last] = {"remove": b"", "repeat": piece * 2, "blank": bytes(len(piece))}[kind]
    elif kind == "insert":
        at = int(how[0] * size)
        changed[at:at] = how[1]
    elif kind == "empty":
        changed = bytearray()
    else:
        changed = bytearray(how[0])
    return bytes(changed) if changed != data else data[:-1]


# Pictures


def coloured(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dicom(
    frames: int = 1, compressed: str = "", rows: int | None = None, columns: int | None = None, text: str = ""
) -> bytes:
    """Small; rows, columns and text (NumberOfFrames): what the header says instead of the truth."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3.4"
    made.Rows, made.Columns, made.SamplesPerPixel = 20, 24, 1
    made.PhotometricInterpretation, made.PixelRepresentation = "MONOCHROME2", 0
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit = 15
    made.RescaleSlope, made.RescaleIntercept = "1", "0"
    made.WindowCenter, made.WindowWidth = "30000", "50000"
    made.PixelSpacing = ["0.5", "0.4"]
    if frames > 1:
        made.NumberOfFrames = frames
    pixels = np.random.default_rng(9).integers(0, 60000, (frames, 20, 24), np.uint16)
    made.PixelData = pixels.tobytes()
    made["PixelData"].VR = "OW"
    if compressed == "rle":
        made.compress(RLELossless)
    if rows is not None:
        made.Rows = rows
    if columns is not None:
        made.Columns = columns
    if text:
        with pydicom.config.disable_value_validation():
            made.NumberOfFrames = text
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@functools.cache
def bases() -> dict[str, tuple[str, bytes]]:
    """Name -> (ending, bytes) of sound pictures."""
    image = coloured(1)
    grey16 = Image.fromarray(np.random.default_rng(2).integers(0, 65536, (20, 24), np.uint16))
    palette = image.quantize(16)
    rgba = image.copy()
    rgba.putalpha(coloured(3).convert("L"))
    found = {
        "png": ("png", saved(image, "PNG")),
        "png16": ("png", saved(grey16, "PNG")),
        "palette": ("png", saved(palette, "PNG", transparency=3)),
        "rgba": ("png", saved(rgba, "PNG")),
        "la": ("png", saved(rgba.convert("LA"), "PNG")),
        "one": ("png", saved(image.convert("1"), "PNG")),
        "jpeg": ("jpg", saved(image, "JPEG")),
        "progressive": ("jpg", saved(image, "JPEG", progressive=True)),
        "cmyk": ("jpeg", saved(image.convert("CMYK"), "JPEG")),
        "webp": ("webp", saved(image, "WEBP")),
        "lossless": ("webp", saved(rgba, "WEBP", lossless=True)),
        "tiff": ("tif", saved(image, "TIFF")),
        "lzw": ("tiff", saved(image, "TIFF", compression="tiff_lzw")),
        "deflate": ("tiff", saved(grey16, "TIFF", compression="tiff_adobe_deflate")),
        "tiffjpeg": ("tiff", saved(image, "TIFF", compression="jpeg")),
        "float": ("tif", saved(Image.fromarray(np.arange(480, dtype=np.float32).reshape(20, 24) % 250), "TIFF")),
        "bmp": ("bmp", saved(image, "BMP")),
        "bmp8": ("bmp", saved(palette, "BMP")),
        "gif": ("gif", saved(palette, "GIF", save_all=True, append_images=[coloured(4).quantize(8)])),
        "ppm": ("ppm", saved(image, "PPM")),
        "jp2": ("jp2", saved(image, "JPEG2000")),
        "dicom": ("dcm", dicom()),
        "frames": ("dicom", dicom(frames=3)),
        "rle": ("ima", dicom(compressed="rle")),
    }
    with contextlib.suppress(KeyError, OSError):
        found["avif"] = ("avif", saved(image, "AVIF"))
    return found


def png_of(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = chunk(b"IDAT", zlib.compress(bytes(5000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + content + chunk(b"IEND", b"")


def bomb(kind: str, width: int, height: int) -> tuple[str, bytes]:
    """(ending, bytes) of a small file whose header promises a huge picture."""
    if kind == "png":
        return "png", png_of(width & 0x7FFFFFFF, height & 0x7FFFFFFF)
    if kind == "text":  # compressed text that is far larger than the file
        text = b"zTXt" + b"a\0\0" + zlib.compress(bytes(2**24), 9)
        chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        data = bases()["png"][1]
        return "png", data[:33] + chunk + data[33:]
    if kind == "bmp":
        data = bytearray(bases()["bmp"][1])
        data[18:26] = struct.pack("<II", width & 0xFFFFFFFF, height & 0xFFFFFFFF)
        return "bmp", bytes(data)
    if kind == "gif":
        data = bytearray(bases()["gif"][1])
        data[6:10] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
        at = data.index(b"\x2c\0\0\0\0")
        data[at + 5 : at + 9] = data[6:10]
        return "gif", bytes(data)
    if kind == "tiff":
        data = bytearray(bases()["tiff"][1])
        first = struct.unpack("<I", data[4:8])[0]
        for field in range(struct.unpack("<H", data[first : first + 2])[0]):
            at = first + 2 + 12 * field
            tag = struct.unpack("<H", data[at : at + 2])[0]
            if tag in (256, 257):
                side = width if tag == 256 else height
                data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, side & 0xFFFFFFFF)
        return "tif", bytes(data)
    if kind == "jpeg":
        data = bytearray(bases()["jpeg"][1])
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
        return "jpg", bytes(data)
    if kind == "ppm":
        return "ppm", f"P6 {width} {height} 255\n".encode() + bytes(100)
    if kind == "jp2":
        data = bytearray(bases()["jp2"][1])
        at = data.index(b"ihdr") + 4
        data[at : at + 8] = struct.pack(">II", height & 0xFFFFFFFF, width & 0xFFFFFFFF)
        return "jp2", bytes(data)
    if kind == "frames":
        return "dcm", dicom(text=str(width))
    return "dcm", dicom(rows=height & 0xFFFF, columns=width & 0xFFFF)


sides = st.sampled_from((0, 1, 2, 24, 4096, 16384, 32767, 65535, 2**20, 2**31 - 1, 2**32 - 1))
bombs = st.tuples(
    st.sampled_from(("png", "text", "bmp", "gif", "tiff", "jpeg", "ppm", "jp2", "frames", "dicom")), sides, sides
)
NAMES = (
    *("plain", "new\nline", "..", ".._..", "quo\"te'", "com,ma", "ünï\u202e", "tab\there", "-rf"),
    *("cr\r\nlf", "%s%n", "=1+1", " blank ", "\x7f\x1b[31m", "\udcff\udcfe", "a" * 200, "日本", "sub/..deep", "\u2028"),
)
pictures = st.one_of(
    st.tuples(st.just("damage"), st.sampled_from(sorted(bases())), damages),
    st.tuples(st.just("damage"), st.sampled_from(sorted(bases())), damages),
    st.tuples(st.just("damage"), st.sampled_from(sorted(bases())), damages),
    st.tuples(st.just("bomb"), bombs),
)
named = st.tuples(pictures, st.sampled_from(NAMES), st.booleans())
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"bits": 16},
    {"bits": 16, "window": "1%,99%", "fit": "pad"},
    {"alpha": "keep", "fit": "stretch"},
    {"channels": 1, "image_filter": "box", "min_size": 8},
    {"near": 3, "image_format": "jpeg", "alpha": "black", "fit": "pad"},
    {"window": "0,40000", "image_filter": "bicubic"},
)


def skipped(out: Path) -> list[list[str]]:
    text = (out / "skipped.csv").read_bytes().decode(errors="surrogateescape")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0] == ["file", "reason", "detail"]
    return rows[1:]


def of_the_set(out: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The origins, and origin -> pixels, of a set that must be sound in itself."""
    store, manifest = open_set(str(out))
    problems = check(store, manifest)
    assert not problems, f"check finds {len(problems)}: {problems[0]}"
    dataset = Dataset((open_set(str(out)),), (1.0,))
    shown = []
    for batch in read_range(dataset, manifest.resolution, 0, manifest.num_samples):
        assert batch.bad == ()
        shown += list(batch.images.numpy())
    assert len(shown) == manifest.num_samples
    origins: list[str] = []
    for shard in manifest.tiers[manifest.resolution]:
        with open(out / shard.file, "rb") as stream:
            reader = ShardReader(stream, shard.file, len(origins), shard.samples, manifest.extension)
            origins += [parse_meta(reader.read(), max(1, len(manifest.classes))).origin for _ in range(shard.samples)]
    return origins, dict(zip(origins, shown, strict=True))


def build_all(source: Path, out: Path, **options: Any) -> str:
    """What the build says."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert build(str(source), out, 16, workers=0, max_skipped=1.0, **options) is not None
    return said.getvalue()


def others(said: str) -> int:
    """Files that a build says it left alone: a damaged name may be no picture's any more."""
    found = re.search(r"(\d+) other files?", said)
    return int(found[1]) if found else 0


def ends_like_a_tar(data: bytes) -> bool:
    """Whether only zeros follow what a tar lists, so that nothing shows that there ever was more."""
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        archive.getmembers()
        return not any(data[archive.offset :])
    return False


def accounted(out: Path, what: object) -> tuple[set[str], list[list[str]], dict[str, np.ndarray]]:
    """(origins, rows of skipped.csv, pixels); the rows have known reasons."""
    rows = skipped(out)
    for row in rows:
        assert len(row) == 3, f"row {row}: {what}"
        assert row[1] in REASONS, f"reason {row[1]!r}: {what}"
        assert row[1] == "duplicate" or row[2], f"no detail for {row}: {what}"
        assert "\n" not in row[2].replace("same bytes as", "").replace("looks like", "") or "duplicate" in row[1], row
    origins, pixels = of_the_set(out)
    return set(origins), rows, pixels


def origins_of(path: str, frames: int) -> set[str]:
    """What a picture file of this name can be called in a set or in skipped.csv."""
    found = {path, path.encode(errors="replace").decode()}
    for name in (path, *(f"{path}#{frame:05d}" for frame in range(frames))):
        found |= {name, "dicom-" + hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}
    return found


def try_pictures(room: Path, items: list[Any], options: dict[str, Any]) -> None:
    root = room / f"pictures{next(fresh)}"
    source, out = root / "source", root / "out"
    source.mkdir(parents=True)
    (source / "sound.png").write_bytes(bases()["png16" if options.get("bits") == 16 else "png"][1])
    written: dict[str, Any] = {}
    for number, ((kind, *how), name, wrong) in enumerate(items):
        if kind == "bomb":
            ending, data = bomb(*how[0])
        else:
            ending, data = bases()[how[0]][0], damaged(bases()[how[0]][1], how[1])
        # An ending that is not the content's; DICOM is told by its ending.
        if wrong and ending not in ("dcm", "dicom", "ima"):
            ending = ("PNG", "jpg", "TIF")[number % 3]
        path = f"{name}{number}.{ending}"
        (source / path).parent.mkdir(exist_ok=True)
        (source / path).write_bytes(data)
        written[path] = (kind, *how)
    with limited(f"{written} with {options}"):
        build_all(source, out, **options)
        origins, rows, _ = accounted(out, options)
        known = origins | {row[0] for row in rows}
        lost = {path: how for path, how in written.items() if not known & origins_of(path, 40)}
        assert not lost, f"{len(lost)} neither stored nor in skipped.csv: {lost} with {options}"
        assert "sound.png" in known
    reasons = Counter(row[1] for row in rows)
    TRIED["pictures"] += len(written)
    for reason, times in reasons.items():
        TRIED[f"pictures: {reason}"] += times
    TRIED["pictures: still readable"] += len(origins)
    shutil.rmtree(root)


@fuzz(PICTURES // BATCH)
@given(st.lists(named, min_size=BATCH, max_size=BATCH), st.sampled_from(OPTIONS))
def test_damaged_pictures_are_stored_or_skipped_with_a_reason(room: Path, items: list[Any], options: Any) -> None:
    try_pictures(room, items, options)


# Archives and tables

PLAIN = 8
"""Pictures in a sound archive."""


@functools.cache
def members() -> tuple[tuple[str, bytes], ...]:
    """Of BMP, which has no checksums of its own, so that a changed pixel shows where the archive ought to notice."""
    found = []
    for i in range(PLAIN):
        found.append((f"{i:02d}.bmp", saved(coloured(10 + i, (16, 16)), "BMP")))
        found.append((f"{i:02d}.json", json.dumps({"label": i % 2, "x": 0, "y": 0, "w": 16, "h": 16}).encode()))
    return tuple(found)


@functools.cache
def true_pixels() -> dict[str, np.ndarray]:
    return {f"{i:02d}.bmp": np.asarray(coloured(10 + i, (16, 16))).transpose(2, 0, 1) for i in range(PLAIN)}


def tar_of(files: tuple[tuple[str, bytes], ...], mode: str = "w", kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=kind) as archive:  # type: ignore[call-overload]
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: tuple[tuple[str, bytes], ...], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def parquet_of(compression: str, alone: bool) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [content for name, content in members() if name.endswith("bmp")]
    columns: dict[str, Any] = {"image": pa.array(images, pa.binary())}
    if not alone:
        columns |= {"label": pa.array([i % 2 for i in range(PLAIN)]), "site": pa.array(["a", "b"] * (PLAIN // 2))}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=3, compression=compression)
    return buffer.getvalue()


def table_of(ending: str) -> bytes:
    rows = [{"path": f"{i:02d}.bmp", "label": i % 2, "site": "ab"[i % 2]} for i in range(PLAIN)]
    if ending == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    text = io.StringIO()
    delimiter = "\t" if ending == "tsv" else ","
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


@functools.cache
def archives() -> dict[str, tuple[str, bytes]]:
    """Name -> (ending, bytes)."""
    long = tuple((f"{'deep/' * 30}é{name}", content) for name, content in members())
    return {
        "tar": ("tar", tar_of(members(), kind=tarfile.USTAR_FORMAT)),
        "pax": ("tar", tar_of(long)),
        "gnu": ("tar", tar_of(long, kind=tarfile.GNU_FORMAT)),
        "gz": ("tar.gz", gzip.compress(tar_of(members()), 1, mtime=0)),
        "bz2": ("tar.bz2", tar_of(members(), "w:bz2")),
        "xz": ("tar.xz", tar_of(members(), "w:xz")),
        "zip": ("zip", zip_of(members())),
        "stored": ("zip", zip_of(members(), zipfile.ZIP_STORED)),
        "parquet": ("parquet", parquet_of("snappy", False)),
        "alone": ("parquet", parquet_of("none", True)),
        "csv": ("csv", table_of("csv")),
        "tsv": ("tsv", table_of("tsv")),
        "jsonl": ("jsonl", table_of("jsonl")),
    }


def reheaded(archive: bytes, number: int, change: Callable[[bytearray], None]) -> bytes:
    """A tar with the header of member `number` changed and its checksum right."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        at = tar.getmembers()[number].offset
    data = bytearray(archive)
    block = data[at : at + 512]
    change(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data[at : at + 512] = block
    return bytes(data)


SIZES = (
    *(b"%011o\0" % size for size in (0, 1, 511, 513, 10**6, 8**11 - 1)),
    *(bytes([0x80]) + size.to_bytes(11, "big") for size in (0, 100, 2**31, 2**62, 2**63, 2**87)),
    *(size.to_bytes(12, "big", signed=True) for size in (-1, -512, -1024, -1536, -2560, -(2**20), -(2**80))),
    *(b"-0000001000\0", b"           \0", b"99999999999\0", b"0x00000010\0\0"),
)


def _set(at: int, raw: bytes) -> Callable[[bytearray], None]:
    def change(block: bytearray) -> None:
        block[at : at + len(raw)] = raw

    return change


number = st.integers(0, 2 * PLAIN - 1)
odd_names = st.sampled_from(
    (
        *("../../out.bmp", "/abs.bmp", "new\nline.bmp", "..", ".", "", "a//b.bmp", "x\\..\\y.bmp", "nul\0l.bmp"),
        *("\udcff.bmp", "sub/", ".bmp", "dataset.json", "x" * 300 + ".bmp", "é.bmp", "x.BMP", "00.bmp", "\r.bmp"),
    )
)
constructed = st.one_of(
    st.tuples(st.just("size"), number, st.sampled_from(SIZES)),
    st.tuples(st.just("type"), number, st.sampled_from([bytes([x]) for x in b"\01234567LKSxgXVDMZ"])),
    st.tuples(st.just("name"), number, odd_names, st.sampled_from(("tar", "gz", "zip"))),
    st.tuples(st.just("twice"), number, number, st.sampled_from(("tar", "gz", "zip"))),
    st.tuples(st.just("fields"), number, st.binary(max_size=60), st.sampled_from(("tar", "gz", "zip"))),
    st.tuples(
        st.just("labels"),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=8,
        ),
    ),
    st.tuples(st.just("zeros"), number),
    st.tuples(st.just("comment"), number),
    st.tuples(st.just("zipsize"), number, st.sampled_from(ABSURD), st.sampled_from(ABSURD)),
    st.tuples(st.just("row"), number, st.text(max_size=12), st.sampled_from(("csv", "tsv", "jsonl"))),
    st.tuples(
        st.just("crop"),
        st.lists(
            st.sampled_from(("0", "16", "-1", "1e400", "nan", "inf", "1e18", "", "9" * 400, "0x10", "1;2", "1_0")),
            min_size=4,
            max_size=4,
        ),
    ),
)


def construct(how: tuple[Any, ...]) -> tuple[str, bytes, int]:
    """(ending, bytes, pictures that must be accounted for) of an archive that is wrong on purpose."""
    kind, *rest = how
    files = list(members())
    if kind in ("size", "type"):
        plain = archives()["tar"][1]
        # A wrong size moves what follows, and a folder or a device is no picture; links are.
        wanted = PLAIN if kind == "type" and rest[1] in b"\x0012" else PLAIN - 1
        return "tar", reheaded(plain, rest[0], _set(124 if kind == "size" else 156, rest[1])), wanted
    if kind == "labels":
        tree = json.dumps({"labels": [[files[0][0], rest[0]], rest[0]]})
        return "zip", zip_of((*files, ("dataset.json", tree.encode()))), PLAIN
    if kind == "zeros":
        plain = bytearray(archives()["tar"][1])
        with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
            at = tar.getmembers()[rest[0]].offset
        plain[at : at + 512] = bytes(512)
        return "tar", bytes(plain), PLAIN
    if kind in ("comment", "zipsize"):
        data = bytearray(zip_of(tuple((f"{'x' * 12}{name[:2]}.bmp", content) for name, content in files[::2])))
        at = 0
        for _ in range(rest[0] % PLAIN + 1):
            at = data.index(b"PK\1\2", at + 1)
        if kind == "comment":  # as long as the next record: 46 bytes and a name of 18
            data[at + 32 : at + 34] = struct.pack("<H", 64)
        else:
            data[at + 20 : at + 28] = struct.pack("<II", *rest[1:])
        return "zip", bytes(data), PLAIN - (kind == "comment" and rest[0] % PLAIN == PLAIN - 1)
    if kind in ("row", "crop"):
        ending = rest[2] if kind == "row" else "jsonl"
        lines = table_of(ending).decode().split("\n")
        if kind == "row":
            at = rest[0] % len(lines)
            lines[at] = lines[at][: len(lines[at]) // 2] + rest[1] + lines[at][len(lines[at]) // 2 :]
        else:
            lines[2] = json.dumps({"path": "02.bmp"} | dict(zip("xywh", rest[0], strict=True)))
        return ending, "\n".join(lines).encode(errors="surrogatepass"), 1
    if kind == "name":
        files[rest[0]] = (rest[1], files[rest[0]][1])
    elif kind == "twice":
        files.insert(rest[1], files[rest[0]])
    elif kind == "fields":
        files[rest[0] | 1] = (files[rest[0] | 1][0], rest[1])
    # A name without an ending is none of a picture.
    wanted = sum(name.lower().endswith(".bmp") and name != ".bmp" for name, _ in files)
    if rest[-1] == "zip":
        with contextlib.suppress(UnicodeEncodeError, IndexError):  # zipfile writes neither such a name nor an empty one
            return "zip", zip_of(tuple(files)), wanted if "\0" not in str(rest[1]) else PLAIN - 1
        files = [(name.encode(errors="replace").decode() or "_", content) for name, content in files]
        return "zip", zip_of(tuple(files)), PLAIN - 1
    data = tar_of(tuple(files))
    wanted = min(wanted, PLAIN - 1) if kind == "name" and "\0" in rest[1] else wanted
    return ("tar", data, wanted) if rest[-1] == "tar" else ("tar.gz", gzip.compress(data, 1, mtime=0), wanted)


damaged_archives = st.one_of(
    st.tuples(st.just("damage"), st.sampled_from(sorted(archives())), damages),
    st.tuples(st.just("damage"), st.sampled_from(sorted(archives())), damages),
    st.tuples(st.just("made"), constructed),
)
READING: tuple[dict[str, Any], ...] = ({}, {}, {"labels": "label"}, {"attributes": ("site",)})


def try_archive(room: Path, item: Any, options: dict[str, Any]) -> None:
    root = room / f"archive{next(fresh)}"
    out = root / "out"
    root.mkdir()
    if item[0] == "made":
        base, (ending, data, wanted) = item[1][0], construct(item[1])
    else:
        base = item[1]
        ending, data, wanted = archives()[base][0], damaged(archives()[base][1], item[2]), PLAIN
    if item[1][0] == "crop":
        options = {"crop": ("x", "y", "w", "h")}
    path = root / f"set.{ending}"
    path.write_bytes(data)
    table = ending in ("csv", "tsv", "jsonl")
    if table:
        for name, content in members()[::2]:
            (root / name).write_bytes(content)
    what = f"{item} as {ending} with {options}"
    TRIED["archives"] += 1
    try:
        with limited(what):
            try:
                said = build_all(path, out, **options)
            except HrganError as error:
                became = ended(error, what)
                assert not (out / "manifest.json").exists(), f"refused, but there is a set: {what}"
                TRIED[f"archives: {became}"] += 1
                return
            origins, rows, pixels = accounted(out, what)
            found = len(pixels) + len(rows) + others(said)
            # A cut between two lines is no damage that a table can show; a broken line must be named.
            enough = found >= wanted or (
                table and (bool(rows) or item[0] == "made" or item[2][0] not in ("flip", "head"))
            )
            enough |= (
                ending == "tar"
                and item[0] == "damage"
                and item[2][0] in ("blank", "remove", "repeat")
                and ends_like_a_tar(data)
            )
            assert enough, f"{found} of {wanted} pictures accounted for: {what}"
            if ending in ("zip", "tar.gz", "tar.bz2", "tar.xz") and item[0] == "damage":
                for name in origins & true_pixels().keys():
                    assert (pixels[name] == true_pixels()[name]).all(), f"{name} has other pixels: {what}"
            TRIED[f"archives: {'some skipped' if rows else 'whole'}"] += 1
    finally:
        shutil.rmtree(root)


@fuzz(ARCHIVES)
@given(damaged_archives, st.sampled_from(READING))
def test_damaged_archives_are_refused_or_accounted_for(room: Path, item: Any, options: Any) -> None:
    try_archive(room, item, options)


# Built sets


@functools.cache
def sound_set(room: Path) -> tuple[Path, dict[int, np.ndarray], dict[int, list[int]]]:
    """(folder; level -> pixels by sample; level -> the samples that two epochs show)."""
    out = room / "sound"
    build("drawn:40", out, 32, labels="folder", workers=0, shard_samples=16)
    pixels, shown = {}, {}
    for level in (8, 16, 32):
        dataset = Dataset((open_set(str(out)),), (1.0,))
        pixels[level] = np.concatenate([batch.images.numpy() for batch in read_range(dataset, level, 0, 40)])
        shown[level] = [x for batch in show(out, level) for x in batch.samples.tolist()]
    return out, pixels, shown


def show(root: Path, level: int) -> Iterator[Batch]:
    """Two epochs."""
    dataset = Dataset((open_set(str(root)),), (1.0,))
    reader = batches(dataset, level, seed=1, slots=2, window=8, nimg=0, batch=8, rank=0, world=1, workers=0)
    for _ in range(10):
        yield next(reader)


which = st.integers(0, 5)
set_damages = st.one_of(
    st.tuples(st.just("bytes"), which, damages),
    st.tuples(st.just("bytes"), which, damages),
    st.tuples(st.just("bytes"), which, damages),
    st.tuples(st.just("exchange"), which, st.integers(1, 5)),
    st.tuples(st.just("gone"), which),
    st.tuples(st.just("folder"), which),
    st.tuples(st.just("header"), which, st.integers(0, 15), st.sampled_from(SIZES)),
    st.tuples(st.just("same size"), which, st.integers(0, 15), st.integers(0, 15)),
    st.tuples(st.just("json"), which, st.integers(0, 7), st.binary(min_size=1, max_size=20)),
)


def spoil(root: Path, how: tuple[Any, ...]) -> None:
    """Change a copy of the sound set."""
    kind, first, *rest = how
    files = sorted(str(path.relative_to(root)) for path in root.glob("*/*.tar"))
    path = root / files[first]
    data = path.read_bytes()
    if kind == "bytes":
        path.write_bytes(damaged(data, rest[0]))
    elif kind == "exchange":
        other = root / files[(first + rest[0]) % 6]
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "header":
        path.write_bytes(reheaded(data, rest[0], _set(124, rest[1])))
    elif kind == "same size":  # two members change places where they can
        with tarfile.open(path) as archive:
            a, b = (archive.getmembers()[i] for i in rest)
        changed = bytearray(data)
        for one, two in ((a, b), (b, a)):
            changed[one.offset_data : one.offset_data + 512] = data[two.offset_data : two.offset_data + 512]
        path.write_bytes(changed)
    else:
        with tarfile.open(path) as archive:
            member = archive.getmembers()[2 * rest[0] + 1]
        changed = bytearray(data)
        changed[member.offset_data : member.offset_data + len(rest[1])] = rest[1]
        path.write_bytes(changed)


def streams_as(root: Path, level: int, what: object) -> str:
    """Whether two epochs and one reading in order show only what the sound set has, each other sample with a line."""
    _, pixels, shown = sound_set(root.parent)
    became = "streams whole"
    at = 0
    try:
        for batch in show(root, level):
            numbers = batch.samples.tolist()
            for number, image in zip(numbers, batch.images.numpy(), strict=True):
                assert np.array_equal(image, pixels[level][number]), f"other pixels are shown: {what}"
            replaced = sum(a != b for a, b in zip(numbers, shown[level][at : at + 8], strict=True))
            assert replaced == len(batch.bad), f"{replaced} replaced, {len(batch.bad)} lines: {what}"
            assert all(line and len(line.splitlines()) == 1 for line in batch.bad), f"{batch.bad}: {what}"
            became = "samples replaced" if batch.bad else became
            at += 8
    except HrganError as error:
        became = f"stream {ended(error, what)}"
    try:
        dataset = Dataset((open_set(str(root)),), (1.0,))
        lines, numbers = 0, []
        for batch in read_range(dataset, level, 0, dataset.num_samples, batch=7):
            lines += len(batch.bad)
            numbers += batch.samples.tolist()
            for number, image in zip(batch.samples.tolist(), batch.images.numpy(), strict=True):
                assert np.array_equal(image, pixels[level][number]), f"other pixels are read: {what}"
        assert len(set(numbers)) == len(numbers) == dataset.num_samples - lines, f"{numbers}, {lines} lines: {what}"
    except HrganError as error:
        ended(error, what)
    return became


def problems_of(root: Path, what: object) -> list[str]:
    try:
        lines = check(*open_set(str(root)))
    except HrganError as error:
        ended(error, what)
        return [str(error)]
    assert all(line and len(line.splitlines()) == 1 for line in lines), f"{lines}: {what}"
    return lines


def try_set(room: Path, how: tuple[Any, ...], level: int) -> None:
    root = room / f"set{next(fresh)}"
    shutil.copytree(sound_set(room)[0], root)
    before = {path: path.read_bytes() for path in root.glob("*/*.tar")}
    spoil(root, how)
    changed = {path for path in before if not path.is_file() or path.read_bytes() != before[path]}
    what = f"{how} at {level}"
    TRIED["shards"] += 1
    with limited(what):
        lines = problems_of(root, what)
        for path in changed:
            assert any(str(path) in line for line in lines), f"check says nothing of {path}: {what}"
        assert bool(lines) == bool(changed), f"{lines}: {what}"
        became = streams_as(root, level, what)
    TRIED[f"shards: {became}"] += 1
    shutil.rmtree(root)


@fuzz(SHARDS)
@given(set_damages, st.sampled_from((8, 16, 32)))
def test_damaged_shards_are_found_by_check_and_never_shown(room: Path, how: Any, level: int) -> None:
    try_set(room, how, level)


# Manifests

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 15, 16, 17, 2**31, 2**63, 10**30, 0.5, -0.0, 1e400, -1e400, math.nan, 1e300),
    *("", "0", "-1", "x", "16", "new\nline", "\ud800", "nul\0l", "../../etc", "/etc/passwd", "a" * 5000, "٣", "1_6"),
    *([], {}, [[]], [None], [1, 2, 3], {"": 0}, {"16": []}, [0, 0], "0" * 64, ["0"] * 64),
)


def deep(kind: str, depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found] if kind == "list" else {"a": found}
    return found


values = st.sampled_from(NASTY) | st.tuples(st.sampled_from(("list", "dict")), st.integers(100, 900)).map(
    lambda both: deep(*both)
)
changes = st.lists(
    st.tuples(
        st.sampled_from(("set", "set", "delete", "add", "twice")), st.lists(share, min_size=1, max_size=6), values
    ),
    min_size=1,
    max_size=3,
)
paired = st.sampled_from(("samples", "bytes", "file", "tier", "num_samples"))
TEXTS = ("[" * 10**5, '{"version":' * 10**5, "1" * 10**5, '{"version":2,"a":[[[')
wrong_manifests = st.one_of(
    st.tuples(st.just("tree"), changes),
    st.tuples(st.just("tree"), changes),
    st.tuples(st.just("bytes"), damages),
    st.tuples(st.just("text"), st.sampled_from(TEXTS)),
    st.tuples(st.just("version"), values),
    st.tuples(st.just("all alike"), paired, values),
)


def mutated(tree: Any, change: tuple[str, list[float], Any]) -> Any:
    """The tree with one place changed; the shares say which."""
    kind, path, value = change
    value = json.loads(json.dumps(value))  # The changes share their values.
    node, steps = tree, list(path)
    while steps:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = keys[int(steps.pop(0) * len(keys))]
        if steps and isinstance(node[key], (dict, list)) and node[key]:
            node = node[key]
            continue
        if kind == "delete":
            del node[key]
        elif kind == "set":
            node[key] = value
        elif isinstance(node, dict):
            node[str(value)[:40] if kind == "add" else f" {key}"] = value if kind == "add" else node[key]
        else:
            node.append(value if kind == "add" else node[key])
        break
    return tree


def consistently_wrong(tree: dict[str, Any], what: str, value: Any) -> dict[str, Any]:
    """The same value wherever it must agree, so that it is only wrong about the shards."""
    for tier in list(tree["tiers"]):
        for shard in tree["tiers"][tier]:
            if what in shard:
                shard[what] = value
    if what == "samples":
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            tree["num_samples"] = sum(int(shard["samples"]) for shard in tree["tiers"]["16"])
    elif what == "tier":
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            level = 2 ** (4 + int(value) % 2000)
            tree["tiers"][str(level)] = tree["tiers"].pop("32")
            tree["form"]["tiers"] = [16, level]
    elif what == "num_samples":
        tree["num_samples"] = value
    return tree


def valid(manifest: Manifest) -> bool:
    """Whether the fields are of the types that the class says."""
    form = manifest.form
    texts = (manifest.name, manifest.label, manifest.real_set, form.format, form.fit, form.filter, form.alpha)
    whole = (manifest.version, manifest.seed, manifest.num_samples, *manifest.values, *manifest.class_counts)
    shards = [shard for tier in manifest.tiers.values() for shard in tier]
    return (
        all(isinstance(text, str) for text in (*texts, form.window, *manifest.classes, *(x.sha256 for x in shards)))
        and all(isinstance(number, int) for number in (*whole, *form.grid, *form.tiers, *(x.samples for x in shards)))
        and all(isinstance(shard.file, str) and isinstance(shard.bytes, int) for shard in shards)
    )


def try_manifest(room: Path, how: tuple[Any, ...]) -> None:
    sound = sound_set(room)[0]
    root = room / "manifested"
    if not root.exists():
        shutil.copytree(sound, root)
    content = (sound / manifests.FILE).read_bytes()
    kind, *rest = how
    if kind == "bytes":
        content = damaged(content, rest[0])
    elif kind == "text":
        content = rest[0].encode()
    else:
        tree = json.loads(content)
        if kind == "version":
            tree["version"] = rest[0]
        elif kind == "all alike":
            tree = consistently_wrong(tree, *rest)
        else:
            for change in rest[0]:
                tree = mutated(tree, change)
        content = json.dumps(tree).encode()
    (root / manifests.FILE).write_bytes(content)
    what = repr(how)[:600]
    TRIED["manifests"] += 1
    with limited(what):
        try:
            loaded = manifests.load(root)
        except HrganError as error:
            TRIED[f"manifests: {ended(error, what)}"] += 1
            return
        assert valid(loaded), f"fields of other types: {what}"
        json.dumps(manifests.info(loaded))
        manifests.save(loaded, root)
        assert manifests.load(root) == loaded, f"is another after it was saved: {what}"
        lines = problems_of(root, what)
        became = streams_as(root, 16, what)
        if not lines:
            truth = manifests.load(sound)
            told = dataclasses.replace(loaded, name=truth.name, seed=truth.seed)
            wrong = [name for name, value in vars(truth).items() if getattr(told, name) != value]
            assert not wrong, f"check finds nothing wrong with {wrong}: {what}"
    TRIED[f"manifests: {'found by check' if lines else 'only name or seed'}, {became}"] += 1


@fuzz(MANIFESTS)
@given(wrong_manifests)
def test_wrong_manifests_are_refused_or_found_by_check(room: Path, how: Any) -> None:
    try_manifest(room, how)


# What random damage hits rarely


def sparse(size: int) -> bytes:
    """A tar that begins with a member of GNU's sparse kind, said to be of this size."""
    block = bytearray(tarfile.TarInfo("z.bmp").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"%011o\0" % 512
    block[156:157] = b"S"
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[482:495] = b"\0\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512) + tar_of(members())


def rows_with(row: str) -> bytes:
    return table_of("jsonl") + row.encode() + b"\n"


CASES: dict[str, tuple[str, Callable[[], bytes], dict[str, Any], int]] = {
    "a tar after a tar": ("tar", lambda: tar_of(members()[:8]) + tar_of(members()[8:]), {}, PLAIN),
    "a tar.gz after a tar.gz": (
        "tar.gz",
        lambda: gzip.compress(tar_of(members()[:8])) + gzip.compress(tar_of(members()[8:])),
        {},
        PLAIN,
    ),
    **{f"sparse {power}": ("tar", functools.partial(sparse, 2**power), {}, PLAIN + 1) for power in (20, 45, 80)},
    "a hole in a tar": ("tar", lambda: construct(("zeros", 4))[1], {}, PLAIN),
    "a member that leads back": ("tar", lambda: construct(("size", 2, b"-0000001000\0"))[1], {}, PLAIN - 1),
    "NUL in a row": ("jsonl", lambda: rows_with('{"path": "a\\u0000.bmp"}'), {}, PLAIN + 1),
    "NUL in a row of DICOM": ("jsonl", lambda: rows_with('{"path": "a\\u0000.dcm"}'), {}, PLAIN + 1),
    "half a surrogate": ("jsonl", lambda: rows_with('{"path": "\\ud800.bmp"}'), {}, PLAIN + 1),
    "no URL": ("jsonl", lambda: rows_with('{"path": "http://[::1.png"}'), {}, PLAIN + 1),
    "a folder as DICOM": ("jsonl", lambda: rows_with('{"path": "."}'), {}, PLAIN + 1),
    "a long name": ("jsonl", lambda: rows_with(json.dumps({"path": "a" * 9000 + ".bmp"})), {}, PLAIN + 1),
    "a line break in a crop": (
        "jsonl",
        lambda: rows_with('{"path": "a.bmp", "x": "1\\n2", "y": 0, "w": 1, "h": 1}'),
        {"crop": ("x", "y", "w", "h")},
        0,
    ),
    "a line break in labels": (
        "zip",
        lambda: zip_of((*members(), ("dataset.json", json.dumps({"labels": ["a\nb"]}).encode()))),
        {},
        0,
    ),
    "a line break in a name": ("tar", lambda: tar_of((("a\nb.bmp", members()[0][1]),)), {"labels": "folder"}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_sources_that_are_wrong_on_purpose(room: Path, case: str) -> None:
    ending, data, options, wanted = CASES[case]
    root = room / f"case{next(fresh)}"
    root.mkdir()
    path = root / f"set.{ending}"
    path.write_bytes(data())
    for name, content in members()[::2]:
        (root / name).write_bytes(content)
    TRIED["cases"] += 1
    with limited(case):
        try:
            build_all(path, root / "out", **options)
        except HrganError as error:
            ended(error, case)
        else:
            _, rows, pixels = accounted(root / "out", case)
            assert len(rows) + len(pixels) >= wanted, f"{len(rows) + len(pixels)} of {wanted} accounted for: {case}"


@pytest.mark.parametrize("case", ["pipe", "frames", "not DICOM", "zeros"])
def test_files_that_are_wrong_on_purpose(room: Path, case: str) -> None:
    root = room / f"case{next(fresh)}"
    source = root / "source"
    source.mkdir(parents=True)
    (source / "sound.png").write_bytes(bases()["png"][1])
    path = source / ("odd.png" if case == "pipe" else "odd.dcm")
    if case == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes({"frames": dicom(text="2147483647"), "zeros": b""}.get(case, b"no DICOM"))
    TRIED["cases"] += 1
    with limited(case):
        build_all(source, root / "out")
        origins, rows, _ = accounted(root / "out", case)
    assert origins == {"sound.png"}
    assert rows
    assert rows[0][0].startswith("odd.")


@pytest.mark.parametrize("image_format", ["webp", "png"])
def test_opaque_pictures_in_a_set_with_alpha(room: Path, image_format: str) -> None:
    root = room / f"case{next(fresh)}"
    (root / "source").mkdir(parents=True)
    (root / "source" / "opaque.png").write_bytes(bases()["png"][1])
    build_all(root / "source", root / "out", alpha="keep", image_format=image_format)
    assert accounted(root / "out", image_format)[2]["opaque.png"].shape == (4, 16, 16)


@pytest.mark.parametrize("ending", ["tar", "zip", "tar.gz"])
def test_a_source_that_was_replaced_is_read_anew(room: Path, ending: str) -> None:
    root = room / f"case{next(fresh)}"
    root.mkdir()
    for first in (0, 8):
        files = tuple((f"{i}.bmp", members()[first + 2 * i][1]) for i in range(4))
        data = zip_of(files) if ending == "zip" else tar_of(files)
        (root / "new").write_bytes(gzip.compress(data) if ending == "tar.gz" else data)
        (root / "new").replace(root / f"set.{ending}")
        build_all(root / f"set.{ending}", root / "out", overwrite=True)
        for name, image in accounted(root / "out", ending)[2].items():
            assert (image == true_pixels()[f"{int(name[0]) + first // 2:02d}.bmp"]).all()


def test_many_archives_leave_no_files_open(room: Path) -> None:
    root = room / f"case{next(fresh)}"
    (root / "source").mkdir(parents=True)
    for i in range(24):
        files = tuple((f"{j}.png", saved(coloured(1000 + 8 * i + j, (8, 8)), "PNG")) for j in range(8))
        (root / "source" / f"{i}.tar").write_bytes(tar_of(files))
    before = len(os.listdir("/proc/self/fd"))
    build_all(root / "source", root / "out")
    assert manifests.load(root / "out").num_samples == 192
    assert len(os.listdir("/proc/self/fd")) <= before + 24


# All of them


def test_all_inputs_were_tried(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"pictures": PICTURES, "archives": ARCHIVES, "shards": SHARDS, "manifests": MANIFESTS}
    if not any(TRIED[kind] for kind in kinds):
        pytest.skip("no other test of this file ran in this process")
    total = sum(TRIED[kind] for kind in kinds)
    with capsys.disabled():
        print(f"\n{total} damaged inputs:", "; ".join(f"{times} {what}" for what, times in sorted(TRIED.items())))
    for kind, wanted in kinds.items():
        assert TRIED[kind] >= wanted, f"{TRIED[kind]} {kind}, expected {wanted}"
    assert total >= TOTAL

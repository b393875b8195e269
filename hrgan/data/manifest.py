"""What a built set is: `manifest.json`, the tar shards of each tier, and how both are read and verified.

A shard is a plain WebDataset tar: for each sample `<key>.<webp|png|jpg>`, then `<key>.json` with `{"label": int,
"origin": str, "crc32": int}`, the crc of the image bytes. The key is the sample's number in the whole set, nine digits
with leading zeros.
"""

import dataclasses
import hashlib
import json
import os
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hrgan.errors import DataError, UserError

VERSION = 1
FILE = "manifest.json"
PARTS = "parts"
"""Folder of the parts of a set that is not joined yet."""
EXTENSIONS = {"webp": "webp", "png": "png", "jpeg": "jpg"}
REBUILD = "build the set again with --overwrite"
BLOCK = 512  # POSIX ustar: headers and contents fill blocks of 512 bytes


@dataclass(frozen=True)
class Shard:
    """One tar file: its path within the set, samples in it, its size in bytes and the sha256 of its bytes (hex)."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The description of a built set.

    resolution: side in pixels of the largest tier; tiers: resolution -> its shards, the same samples in each.
    quality: of jpeg, 1 to 100; the other formats are lossless. classes: sorted names, empty when unlabelled.
    real_set: sha256 (hex) of everything that defines the pictures.
    """

    version: int
    name: str
    channels: int
    bits: int
    resolution: int
    filter: str
    format: str
    quality: int
    seed: int
    fit: str
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    num_samples: int
    real_set: str
    tiers: dict[int, tuple[Shard, ...]]

    @property
    def extension(self) -> str:
        """The ending of the image members, e.g. "webp"."""
        return EXTENSIONS[self.format]

    @property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples of each shard, the same in every tier."""
        return tuple(shard.samples for shard in self.tiers[self.resolution])

    def tier_for(self, resolution: int) -> int:
        """The smallest stored tier of at least `resolution` (4 and 8 read 16); DataError when the set has none."""
        fitting = [tier for tier in self.tiers if tier >= resolution]
        if not fitting:
            raise DataError(
                f"the set {self.name} goes up to {self.resolution}, asked for {resolution}; "
                f"train to {self.resolution} or build with --resolution {resolution}"
            )
        return min(fitting)


def set_hash(manifest: Manifest) -> str:
    """`real_set`: sha256 over the ordered shard hashes and the fields that define the pictures."""
    names = ("version", "channels", "bits", "resolution", "filter", "format", "quality", "fit", "classes")
    fields = [getattr(manifest, name) for name in names]
    hashes = [(tier, [shard.sha256 for shard in manifest.tiers[tier]]) for tier in sorted(manifest.tiers)]
    return hashlib.sha256(json.dumps([fields, hashes]).encode()).hexdigest()


def with_set_hash(manifest: Manifest) -> Manifest:
    """The manifest with its `real_set` filled in."""
    return dataclasses.replace(manifest, real_set=set_hash(manifest))


def save(manifest: Manifest, root: Path) -> None:
    """Write `root/manifest.json` so that a reader sees the whole file or none."""
    temporary = root / (FILE + ".tmp")
    with open(temporary, "w") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / FILE)
    folder = os.open(root, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(root: Path) -> Manifest:
    """Read and validate `root/manifest.json`; a one-line DataError names the file, what was found and what to do."""
    path = Path(root) / FILE
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        remedy = f"run: hrgan data build SRC {root}, or name the folder where the set is now"
        if (Path(root) / PARTS).is_dir():
            remedy = f"its parts are not joined yet: run hrgan data merge {root}"
        raise DataError(f"{path} is missing, so {root} is no finished set; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is unreadable ({error}); {REBUILD}") from None
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != VERSION:
        raise DataError(f"{path}: version is {version}, expected {VERSION}; build the set again with this hrgan")
    return _parse(fields, path)


def _parse(fields: dict[str, Any], path: Path) -> Manifest:
    names = {field.name for field in dataclasses.fields(Manifest)}
    missing = sorted(names - set(fields))
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} missing, expected every field; {REBUILD}")
    try:
        tiers = {int(tier): tuple(Shard(**shard) for shard in shards) for tier, shards in fields["tiers"].items()}
        kept = {name: fields[name] for name in names}
        kept |= {"classes": tuple(fields["classes"]), "class_counts": tuple(fields["class_counts"]), "tiers": tiers}
        manifest = Manifest(**kept)
        counts = {tuple(shard.samples for shard in shards) for shards in tiers.values()}
        consistent = counts == {manifest.shard_samples} and sum(manifest.shard_samples) == manifest.num_samples
        consistent &= manifest.format in EXTENSIONS and len(manifest.classes) == len(manifest.class_counts)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise DataError(f"{path}: a field has the wrong shape ({error!r}); {REBUILD}") from None
    if not consistent:
        raise DataError(f"{path}: its counts, format or tiers contradict each other; {REBUILD}")
    return manifest


def info(root: Path) -> dict[str, Any]:
    """What `hrgan data info` prints: classes as {name: count}, tiers as {resolution: {"shards": n, "bytes": b}}."""
    manifest = load(root)
    tiers = {
        tier: {"shards": len(shards), "bytes": sum(shard.bytes for shard in shards)}
        for tier, shards in sorted(manifest.tiers.items())
    }
    kept = ["name", "num_samples", "channels", "bits", "resolution", "format", "quality", "filter", "fit", "seed"]
    kept.append("real_set")
    shown: dict[str, Any] = {name: getattr(manifest, name) for name in kept}
    return shown | {"classes": dict(zip(manifest.classes, manifest.class_counts, strict=True)), "tiers": tiers}


def verify_sizes(root: Path, manifest: Manifest, tier: int) -> None:
    """Every shard of the tier is there with its byte count; else a DataError naming the first that is not."""
    for shard in manifest.tiers[tier]:
        problem = _size_problem(root, shard)
        if problem:
            raise DataError(f"{problem}; copy the set again or rebuild it")


def _size_problem(root: Path, shard: Shard) -> str | None:
    path = Path(root) / shard.file
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"{path}: {error.strerror}, expected {shard.bytes} bytes"
    return None if found == shard.bytes else f"{path}: found {found} bytes, expected {shard.bytes}"


class RawSample(NamedTuple):
    """One sample as stored: its key, the encoded image and the encoded JSON."""

    key: str
    image: bytes
    meta: bytes


class ShardReader:
    """Reads one shard from its start, strictly: each key must be the expected one, and the shard must end where it
    should.

    A tar library ends a cut archive, or one with a broken header, without an error, so every member's header is read
    here (`tarfile` parses it) and compared. Every problem is a DataError naming the shard, what was found and what was
    expected.
    """

    def __init__(self, stream: BinaryIO, path: str, first: int, samples: int, extension: str) -> None:
        """stream: seekable; path: for messages; first: number of the first sample; samples: how many there are."""
        self.index = 0
        self._stream, self._path, self._first, self._samples, self._extension = stream, path, first, samples, extension

    def go_to(self, index: int, offsets: "array[int]") -> None:
        """Go to sample `index` without reading contents, from the nearest of the known `offsets`, which this extends.

        offsets: where samples 0, 1, ... begin; [0] for an unknown shard.
        """
        self.index = min(index, len(offsets) - 1)
        self._stream.seek(offsets[self.index])
        while self.index < index:
            for ending in (self._extension, "json"):
                _, size = self._header(f"{self._first + self.index:09d}.{ending}")
                self._stream.seek(size + -size % BLOCK, os.SEEK_CUR)
            self.index += 1
            offsets.append(self._stream.tell())

    def read(self) -> RawSample:
        """The next sample."""
        key = f"{self._first + self.index:09d}"
        image = self._content(f"{key}.{self._extension}")
        meta = self._content(f"{key}.json")
        self.index += 1
        return RawSample(key, image, meta)

    def finish(self) -> None:
        """Verify that nothing follows the last sample, and close."""
        if any(self._stream.read(BLOCK)):
            raise self._problem(f"more after its {self._samples} samples", "the end of the shard")
        self.close()

    def close(self) -> None:
        self._stream.close()

    def _content(self, name: str) -> bytes:
        block, size = self._header(name)
        # A skipped header is caught by the next name; contents are only trusted below a header that is whole.
        if b"%06o" % (sum(block) - sum(block[148:156]) + 8 * ord(" ")) != block[148:154]:
            raise self._problem(f"a broken tar header at {name}", "its checksum")
        content = self._stream.read(size)
        if len(content) != size:
            raise self._problem(f"the end of the shard inside {name}", f"{size} bytes")
        self._stream.read(-size % BLOCK)
        return content

    def _header(self, name: str) -> tuple[bytes, int]:
        """The next member's header block, verified to be of the file `name`, and its size in bytes."""
        # Of a ustar header: name 0-99, size 124-135, checksum 148-155, type 156. tarfile takes ten times as long.
        block = self._stream.read(BLOCK)
        if len(block) == BLOCK and block.startswith(name.encode() + b"\0") and block[156] == ord("0"):
            try:
                return block, int(block[124:135], 8)
            except ValueError:
                pass  # not octal: broken, reported below
        if len(block) < BLOCK or not any(block):
            raise self._problem(
                f"the end of the shard after {self.index} samples", f"{self._samples} samples, next {name}"
            )
        try:
            found = f"member {tarfile.TarInfo.frombuf(block, 'utf-8', 'replace').name!r}"
        except tarfile.HeaderError as error:
            found = f"a broken tar header ({error})"
        raise self._problem(found, name)

    def _problem(self, found: str, expected: str) -> DataError:
        return DataError(f"{self._path}: found {found}, expected {expected}; copy the set again or rebuild it")


class ShardWriter:
    """Writes one shard; the bytes are a function of the samples alone (no times, no owners)."""

    def __init__(self, root: Path, file: str, extension: str) -> None:
        """root: the set; file: the shard's path within it; extension: ending of the image members."""
        self.samples = 0
        self._file, self._extension = file, extension
        self._stream = open(root / file, "wb")  # noqa: SIM115, closed by close()
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, number: int, image: bytes, label: int, origin: str) -> None:
        """Append sample `number` of the set."""
        meta = json.dumps({"label": label, "origin": origin, "crc32": zlib.crc32(image)}).encode()
        for ending, content in ((self._extension, image), ("json", meta)):
            member = tarfile.TarInfo(f"{number:09d}.{ending}")
            member.size = len(content)
            self._append(member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK))
        self.samples += 1

    def finish(self) -> Shard:
        """Write the end of the archive to disk and describe the shard."""
        self._append(bytes(2 * BLOCK))
        self._append(bytes(-self._bytes % tarfile.RECORDSIZE))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.close()
        return Shard(self._file, self.samples, self._bytes, self._hash.hexdigest())

    def close(self) -> None:
        self._stream.close()

    def _append(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self._bytes += len(data)


class SetWriter:
    """Writes samples to every tier, with the same shard borders in each."""

    def __init__(self, root: Path, name: str, tiers: tuple[int, ...], image_format: str, per_shard: int) -> None:
        self._root, self._name, self._tiers, self._per_shard = root, name, tiers, per_shard
        self._extension = EXTENSIONS[image_format]
        self._number = 0
        self._open: dict[int, ShardWriter] = {}
        self._shards: dict[int, list[Shard]] = {tier: [] for tier in tiers}
        for tier in tiers:
            (root / str(tier)).mkdir()

    def write(self, images: tuple[bytes, ...], label: int, origin: str) -> None:
        """images: the encoded picture for each of the set's tiers, in their order."""
        if self._number % self._per_shard == 0:
            self._finish_shards()
            for tier in self._tiers:
                file = f"{tier}/{self._name}-{self._number // self._per_shard:05d}.tar"
                self._open[tier] = ShardWriter(self._root, file, self._extension)
        for tier, image in zip(self._tiers, images, strict=True):
            self._open[tier].write(self._number, image, label, origin)
        self._number += 1

    def finish(self) -> dict[int, tuple[Shard, ...]]:
        """Finish the last shards; returns all by tier."""
        self._finish_shards()
        return {tier: tuple(shards) for tier, shards in self._shards.items()}

    def close(self) -> None:
        for writer in self._open.values():
            writer.close()

    def _finish_shards(self) -> None:
        for tier, writer in self._open.items():
            self._shards[tier].append(writer.finish())
        self._open = {}


def open_shard(path: Path, manifest: Manifest, tier: int, shard: int, stream: BinaryIO) -> ShardReader:
    """A reader of shard number `shard` of the tier from its open stream."""
    samples = manifest.shard_samples
    return ShardReader(stream, str(path), sum(samples[:shard]), samples[shard], manifest.extension)


class BadSample(Exception):
    """A sample that is in its place but cannot be used; the text is the reason."""


def parse_meta(sample: RawSample, classes: int) -> tuple[int, str]:
    """Verify a sample's crc32 and label; returns (label, origin). Raises BadSample."""
    try:
        meta = json.loads(sample.meta)
        label, origin, crc32 = int(meta["label"]), str(meta["origin"]), int(meta["crc32"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample(f"unreadable json ({error!r})") from None
    found = zlib.crc32(sample.image)
    if found != crc32:
        raise BadSample(f"crc32 is {found}, expected {crc32}")
    if not 0 <= label < max(1, classes):
        raise BadSample(f"label is {label}, expected less than {max(1, classes)}")
    return label, origin


def check(root: Path) -> list[str]:
    """Verify a whole set: sizes, sha256, keys, crc32, and that every sample decodes to its tier's size.

    Returns one line a problem, naming shard and sample; empty for a sound set. DataError when the manifest itself is
    unusable.
    """
    manifest = load(root)
    problems = []
    if set_hash(manifest) != manifest.real_set:
        problems.append(f"{Path(root) / FILE}: real_set does not match its fields; it was edited after the build")
    tiers = sorted(manifest.tiers)
    for shard in range(len(manifest.shard_samples)):
        found = {tier: list(_shard_problems(root, manifest, tier, shard, problems)) for tier in tiers}
        problems += _differences(root, manifest, shard, found)
    return problems


def _shard_problems(root: Path, manifest: Manifest, tier: int, number: int, problems: list[str]) -> Iterator[bytes]:
    """Append one shard's problems; yields each sample's label and origin, for comparison between tiers."""
    from hrgan.data.images import decode  # Pillow only where pictures are decoded

    shard = manifest.tiers[tier][number]
    path = Path(root) / shard.file
    problem = _size_problem(root, shard)
    if problem:
        problems.append(problem)
    if not path.is_file():
        return
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != shard.sha256:
            problems.append(f"{path}: sha256 is {digest}, expected {shard.sha256}")
        stream.seek(0)
        reader = open_shard(path, manifest, tier, number, stream)
        try:
            for _ in range(shard.samples):
                sample = reader.read()
                try:
                    label, origin = parse_meta(sample, len(manifest.classes))
                    decode(sample.image, manifest.format, manifest.channels, tier)
                    yield json.dumps([label, origin]).encode()
                except BadSample as error:
                    problems.append(f"{path}: sample {sample.key}: {error}")
                    yield b""
            reader.finish()
        except DataError as error:
            problems.append(str(error))


def _differences(root: Path, manifest: Manifest, shard: int, found: dict[int, list[bytes]]) -> list[str]:
    """Samples whose label or origin is not the largest tier's; those already reported are b"" or missing."""
    first = sum(manifest.shard_samples[:shard])
    reference = found[manifest.resolution]
    lines = []
    for tier, samples in found.items():
        for i, (sample, expected) in enumerate(zip(samples, reference, strict=False)):
            if sample and expected and sample != expected:
                path = Path(root) / manifest.tiers[tier][shard].file
                lines.append(f"{path}: sample {first + i:09d}: label and origin are {sample!r}, expected {expected!r}")
    return lines


def valid_tiers(resolution: int) -> tuple[int, ...]:
    """Each power of two from 16 to `resolution`; UserError naming the nearest valid value for any other resolution."""
    if resolution < 16 or resolution & (resolution - 1):
        exponent = max(4, resolution.bit_length() - 1) if resolution > 0 else 4
        nearest = min((2**exponent, 2 ** (exponent + 1)), key=lambda side: abs(side - resolution))
        raise UserError(f"resolution is {resolution}, expected a power of two of 16 or more; nearest: {nearest}")
    return tuple(2**e for e in range(4, resolution.bit_length()))

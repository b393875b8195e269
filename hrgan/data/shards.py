"""The tar shards of a set: written reproducibly, read strictly.

A shard is a plain WebDataset tar: for each sample `<key>.<webp|png|jpg>`, then `<key>.json` with `{"label": int,
"origin": str, "size": [width, height], "crc32": int}` and, where the set has them, `"attributes": {name: text}` before
the crc32, which is of the image bytes followed by the json up to `, "crc32"`. size in pixels is the source's. The key
is the sample's number in the whole set, nine digits with leading zeros.
"""

import contextlib
import hashlib
import json
import os
import tarfile
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hrgan.errors import DataError, one_line

EXTENSIONS = {"webp": "webp", "png": "png", "jpeg": "jpg"}
CRC32 = b', "crc32": '
BLOCK = 512  # POSIX ustar: headers and contents fill blocks of 512 bytes


@dataclass(frozen=True)
class Shard:
    """One tar file: its path within the set, samples in it, its size in bytes and the sha256 of its bytes (hex)."""

    file: str
    samples: int
    bytes: int
    sha256: str


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
        # Adler-32 holds the sum of the bytes plus one modulo 65521, at a twentieth of what adding them up takes.
        total = ((zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * ord(" ")) % 65521
        if block[148:154] not in (b"%06o" % total, b"%06o" % (total + 65521)):
            raise self._problem(f"a broken tar header at {name}", "its checksum")
        content = self._stream.read(size + -size % BLOCK)
        if len(content) < size:
            raise self._problem(f"the end of the shard inside {name}", f"{size} bytes")
        return content[:size]

    def _header(self, name: str) -> tuple[bytes, int]:
        """The next member's header block, verified to be of the file `name`, and its size in bytes."""
        # Of a ustar header: name 0-99, size 124-135, checksum 148-155, type 156. tarfile takes ten times as long.
        block = self._stream.read(BLOCK)
        whole = len(block) == BLOCK and block.startswith(name.encode() + b"\0") and block[156] == ord("0")
        if whole and not block[124:135].strip(b"01234567"):
            return block, int(block[124:135], 8)
        if len(block) < BLOCK or not any(block):
            raise self._problem(
                f"the end of the shard after {self.index} samples", f"{self._samples} samples, next {name}"
            )
        try:
            found = one_line(f"member {tarfile.TarInfo.frombuf(block, 'utf-8', 'replace').name!r}")
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

    def write(self, number: int, image: bytes, about: dict[str, Any]) -> None:
        """Append sample `number` of the set. about: its json besides the crc32."""
        body = json.dumps(about).encode()[:-1]
        meta = body + CRC32 + b"%d}" % zlib.crc32(body, zlib.crc32(image))
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


Finished = Callable[[dict[int, Shard]], None]
"""Is told of each number of shards, one a tier, once they are whole on the disk."""


class SetWriter:
    """Writes samples to every tier, with the same shard borders in each."""

    def __init__(
        self,
        root: Path,
        name: str,
        tiers: tuple[int, ...],
        image_format: str,
        per_shard: int,
        finished: Finished,
        number: int = 0,
    ) -> None:
        """number: of the first sample, where a build goes on: a multiple of per_shard."""
        self._root, self._name, self._tiers, self._per_shard = root, name, tiers, per_shard
        self._extension = EXTENSIONS[image_format]
        self._finished = finished
        self.number = number
        self._open: dict[int, ShardWriter] = {}
        for tier in tiers:
            (root / str(tier)).mkdir(exist_ok=True)

    def write(self, images: tuple[bytes, ...], about: dict[str, Any]) -> bool:
        """images: the encoded picture for each of the set's tiers, in their order; about: its json besides the crc32.
        Whether that filled the shards."""
        if not self._open:
            for tier in self._tiers:
                file = f"{tier}/{self._name}-{self.number // self._per_shard:05d}.tar"
                self._open[tier] = ShardWriter(self._root, file, self._extension)
        for tier, image in zip(self._tiers, images, strict=True):
            self._open[tier].write(self.number, image, about)
        self.number += 1
        full = self.number % self._per_shard == 0
        if full:
            self.finish()
        return full

    def finish(self) -> None:
        """Finish the shards that are being written."""
        if self._open:
            shards = {tier: writer.finish() for tier, writer in self._open.items()}
            self._open = {}
            self._finished(shards)

    def close(self) -> None:
        """Leave the unfinished shards as they are."""
        for writer in self._open.values():
            with contextlib.suppress(OSError):  # A full disk does not take what is still to be written.
                writer.close()


class BadSample(Exception):
    """A sample that is in its place but cannot be used; the text is the reason."""


class Meta(NamedTuple):
    """A sample's json."""

    label: int
    origin: str
    size: tuple[int, int]
    """Of the source, width and height in pixels."""
    attributes: dict[str, str]


def parse_meta(sample: RawSample, classes: int) -> Meta:
    """Verify a sample's crc32 and label. Raises BadSample."""
    try:
        meta = json.loads(sample.meta)
        body, _, check = sample.meta.rpartition(CRC32)
        label, origin, crc32 = int(meta["label"]), str(meta["origin"]), int(check.rstrip(b"}"))
        width, height = meta["size"]
        attributes = meta.get("attributes")
        attributes = {str(name): str(value) for name, value in attributes.items()} if attributes else {}
        size = int(width), int(height)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadSample(f"unreadable json ({one_line(repr(error))})") from None
    found = zlib.crc32(body, zlib.crc32(sample.image))
    if found != crc32:
        raise BadSample(f"crc32 is {found}, expected {crc32}")
    if not 0 <= label < max(1, classes):
        raise BadSample(f"label is {label}, expected less than {max(1, classes)}")
    return Meta(label, origin, size, attributes)

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
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zlib_ng.zlib_ng import adler32, crc32  # zlib's takes as long for a 128² picture as everything else here

from hrgan.errors import DataError, one_line

EXTENSIONS = {"webp": "webp", "png": "png", "jpeg": "jpg"}
CRC32 = b', "crc32": '
BLOCK = 512  # POSIX ustar: headers and contents fill blocks of 512 bytes
BUFFER = 2**18
"""Bytes read from a shard at once: with less, small samples cost more in calls of the system than in decoding."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its path within the set, samples in it, its size in bytes and the sha256 of its bytes (hex)."""

    file: str
    samples: int
    bytes: int
    sha256: str


class RawSample(NamedTuple):
    """One sample as stored: its key, the encoded image (which may be a part of what was read at once) and the encoded
    JSON."""

    key: str
    image: bytes | memoryview
    meta: bytes


class ShardReader:
    """Reads one shard from its start, strictly: each key must be the expected one, and the shard must end where it
    should.

    A tar library ends a cut archive, or one with a broken header, without an error, so every member's header is read
    here (`tarfile` parses it) and compared. Every problem is a DataError naming the shard, what was found and what was
    expected.
    """

    def __init__(self, stream: BinaryIO, path: str, first: int, samples: int, extension: str) -> None:
        """stream: seekable, its read(n) less than n bytes only at the end; path: for messages; first: number of the
        first sample; samples: how many there are."""
        self.index = 0
        self._stream, self._path, self._first, self._samples = stream, path, first, samples
        self._endings = b"." + extension.encode(), b".json"
        self._read, self._at = memoryview(b""), 0  # What was read at once, and where in it the next member begins.

    def go_to(self, index: int, offsets: "array[int]") -> None:
        """Go to sample `index` without reading contents, from the nearest of the known `offsets`, which this extends.

        offsets: where samples 0, 1, ... begin; [0] for an unknown shard.
        """
        self.index = min(index, len(offsets) - 1)
        offset = offsets[self.index]
        self._seek(offset)
        while self.index < index:
            for ending in self._endings:
                _, size = self._header(b"%09d%s" % (self._first + self.index, ending))
                size += -size % BLOCK
                offset += BLOCK + size
                if self._at + size <= len(self._read):
                    self._at += size
                else:
                    self._seek(offset)
            self.index += 1
            offsets.append(offset)

    def read(self) -> RawSample:
        """The next sample."""
        key = b"%09d" % (self._first + self.index)
        image, meta = self._content(key + self._endings[0]), self._content(key + self._endings[1])
        self.index += 1
        # A small image is copied, or it would keep the headers around it, which are larger, in memory.
        return RawSample(key.decode(), image if len(image) > 8 * BLOCK else bytes(image), bytes(meta))

    def finish(self) -> None:
        """Verify that nothing follows the last sample, and close."""
        if any(self._take(BLOCK)):
            raise self._problem(f"more after its {self._samples} samples", "the end of the shard")
        self.close()

    def close(self) -> None:
        self._stream.close()

    def _seek(self, offset: int) -> None:
        self._stream.seek(offset)
        self._read, self._at = memoryview(b""), 0

    def _take(self, size: int) -> memoryview:
        """The next bytes, `size` or as many as there are."""
        start, self._at = self._at, self._at + size
        if self._at <= len(self._read):
            return self._read[start : self._at]
        rest = self._read[start:]
        missing = size - len(rest)
        self._read = memoryview(self._stream.read(max(BUFFER, missing)))
        self._at = min(missing, len(self._read))
        return memoryview(b"".join((rest, self._read[:missing])))

    def _content(self, name: bytes) -> memoryview:
        block, size = self._header(name)
        # A skipped header is caught by the next name; contents are only trusted below a header that is whole.
        # Adler-32 holds the sum of the bytes plus one modulo 65521, at a twentieth of what adding them up takes.
        total = ((adler32(block[156:], adler32(block[:148])) & 0xFFFF) - 1 + 8 * ord(" ")) % 65521
        found = block[148:154]
        if found != b"%06o" % total and found != b"%06o" % (total + 65521):
            raise self._problem(f"a broken tar header at {name.decode()}", "its checksum")
        content = self._take(size + -size % BLOCK)
        if len(content) < size:
            raise self._problem(f"the end of the shard inside {name.decode()}", f"{size} bytes")
        return content[:size]

    def _header(self, name: bytes) -> tuple[bytes, int]:
        """The next member's header block, verified to be of the file `name`, and its size in bytes."""
        # Of a ustar header: name 0-99, size 124-135, checksum 148-155, type 156. tarfile takes ten times as long.
        block = bytes(self._take(BLOCK))
        whole = len(block) == BLOCK and block.startswith(name + b"\0") and block[156] == ord("0")
        if whole and not block[124:135].strip(b"01234567"):
            return block, int(block[124:135], 8)
        if len(block) < BLOCK or not any(block):
            raise self._problem(
                f"the end of the shard after {self.index} samples", f"{self._samples} samples, next {name.decode()}"
            )
        try:
            found = one_line(f"member {tarfile.TarInfo.frombuf(block, 'utf-8', 'replace').name!r}")
        except tarfile.HeaderError as error:
            found = f"a broken tar header ({error})"
        raise self._problem(found, name.decode())

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
        meta = body + CRC32 + b"%d}" % crc32(body, crc32(image))
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
        meta = json.loads(sample.meta.decode())
        body, _, check = sample.meta.rpartition(CRC32)
        label, origin, expected = int(meta["label"]), str(meta["origin"]), int(check.rstrip(b"}"))
        width, height = meta["size"]
        attributes = meta.get("attributes")
        attributes = {str(name): str(value) for name, value in attributes.items()} if attributes else {}
        size = int(width), int(height)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadSample(f"unreadable json ({one_line(repr(error))})") from None
    found = crc32(body, crc32(sample.image))
    if found != expected:
        raise BadSample(f"crc32 is {found}, expected {expected}")
    if not 0 <= label < max(1, classes):
        raise BadSample(f"label is {label}, expected less than {max(1, classes)}")
    return Meta(label, origin, size, attributes)

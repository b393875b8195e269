"""The list of a build: what was found, in sample order, the contents seen, and how far the build has come.

It is a database in OUT and not in memory, so that memory stays constant; and what it says is on the disk together with
the shards that it speaks of, so that a build that was killed goes on.
"""

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from hrgan.data.shards import Shard

MANY = 4096
"""An attribute of more values is stored with the samples but has no classes."""


class Place(NamedTuple):
    """Where the bytes of a picture are.

    kind "file": the file `where`. "span": `size` bytes of it from `offset`, the archive's
    `member`. "zip": its `member`, whose header is at `offset` and whose
    packed bytes are `size`. "url": at the URL
    `where`. "bulk": in a file that is only read from its start to its end, row `size` of group `offset`; copied into a
    spool file before the pictures are made. "drawn": picture number `offset` of the drawn set.
    frame: of DICOM, from 0; None for any other image. packed: of a zip's member its compression, CRC-32 and length.
    """

    kind: str
    where: str
    member: str = ""
    offset: int = 0
    size: int = 0
    frame: int | None = None
    packed: tuple[int, int, int] | None = None


Crop = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


class Entry(NamedTuple):
    """A picture of a source. path: unique, for people; its keyed hash decides the order. group: its class."""

    path: str
    place: Place
    group: str = ""
    attributes: Mapping[str, str] = MappingProxyType({})
    crop: Crop | None = None


class Index:
    """See the module. A new one replaces the file; `resume` opens the one that is there."""

    def __init__(self, path: Path, seed: int, resume: bool = False) -> None:
        self._dropped = 0
        self._key = hashlib.blake2b(str(seed).encode(), digest_size=32).digest()
        if not resume:
            for name in (path, Path(f"{path}-journal")):
                name.unlink(missing_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        # Not the write-ahead log: it needs shared memory, which disks over a network do not have.
        for line in ("journal_mode=DELETE", "synchronous=FULL", "locking_mode=EXCLUSIVE"):
            self._database.execute(f"PRAGMA {line}")
        if not resume:
            for table in (
                "file (place BLOB, path BLOB, class BLOB, about TEXT, bulk BLOB, PRIMARY KEY (place, path))",
                "attribute (name TEXT, value TEXT, PRIMARY KEY (name, value))",
                "dropped (path BLOB, number INTEGER, reason TEXT, detail TEXT, PRIMARY KEY (path, number))",
                "content (hash BLOB PRIMARY KEY, path BLOB)",
                "near (band INTEGER, bits INTEGER, hash BLOB, path BLOB, PRIMARY KEY (band, bits, hash, path))",
                "shard (number INTEGER, tier INTEGER, json TEXT, PRIMARY KEY (number, tier))",
                "state (name TEXT PRIMARY KEY, json TEXT)",
            ):
                self._database.execute(f"CREATE TABLE {table} WITHOUT ROWID")
        self._database.execute("BEGIN")

    def close(self) -> None:
        self._database.close()

    # Listing

    def add(self, entry: Entry) -> None:
        """Note a picture; one of a name that is there already is dropped."""
        name = os.fsencode(entry.path)  # names on disk need not be valid unicode
        place = hashlib.blake2b(name, digest_size=16, key=self._key).digest()
        about = json.dumps([list(entry.place), dict(entry.attributes), entry.crop])
        bulk = os.fsencode(f"{entry.place.where}\0{entry.place.offset:09d}") if entry.place.kind == "bulk" else None
        row = (place, name, entry.group.encode(errors="surrogateescape"), about, bulk)
        try:
            self._database.execute("INSERT INTO file VALUES (?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            self.drop(entry.path, "duplicate_name", "another picture has this name")
            return
        self._database.executemany("INSERT OR IGNORE INTO attribute VALUES (?, ?)", list(entry.attributes.items()))

    def drop(self, path: str, reason: str, detail: str) -> None:
        """Note a picture that was found and cannot be had."""
        self._dropped += 1  # Two of one name are two.
        row = (os.fsencode(path), self._dropped, reason, detail.encode(errors="replace").decode())
        self._database.execute("INSERT INTO dropped VALUES (?, ?, ?, ?)", row)

    def _count(self, table: str) -> int:
        return int(self._database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def count(self) -> tuple[int, int]:
        """Pictures that can be had, and those dropped."""
        return self._count("file"), self._count("dropped")

    def dropped(self) -> Iterator[tuple[str, str, str]]:
        """(path, reason, detail)."""
        rows = self._database.execute("SELECT path, reason, detail FROM dropped ORDER BY path, reason, detail")
        for path, reason, detail in rows:
            yield os.fsdecode(path), reason, detail

    def entries(self, first: int = 0, last: int | None = None) -> Iterator[Entry]:
        """Pictures number first to last - 1, in sample order."""
        rows = self._database.execute(
            "SELECT path, class, about FROM file ORDER BY place, path LIMIT ? OFFSET ?",
            (-1 if last is None else last - first, first),
        )
        for path, group, about in rows:
            place, attributes, crop = json.loads(about)
            box = tuple(crop) if crop else None
            yield Entry(
                os.fsdecode(path), Place(*place), group.decode(errors="surrogateescape"), attributes, box
            )

    def listing(self) -> str:
        """sha256 (hex) over all that was found, wherever it is mounted: shows a source that changed."""
        digest = hashlib.sha256()
        for entry in self.entries():
            kind, _, *where = entry.place
            about = (entry.path, entry.group, kind, where, dict(entry.attributes), entry.crop)
            digest.update(repr(about).encode(errors="replace"))
        for row in self.dropped():
            digest.update(repr(row).encode(errors="replace"))
        return digest.hexdigest()

    def classes(self) -> tuple[str, ...]:
        """The class names: numbers by value, else by name."""
        rows = self._database.execute("SELECT DISTINCT class FROM file")
        return in_order(row[0].decode(errors="surrogateescape") for row in rows)

    def attributes(self) -> dict[str, tuple[str, ...]]:
        """The values of each attribute; () for one of too many."""
        names = [row[0] for row in self._database.execute("SELECT DISTINCT name FROM attribute ORDER BY name")]
        found = {}
        for name in names:
            rows = self._database.execute("SELECT value FROM attribute WHERE name = ? LIMIT ?", (name, MANY + 1))
            values = [row[0] for row in rows]
            found[name] = in_order(values) if len(values) <= MANY else ()
        return found

    # Sources that are only read in one go

    def bulks(self, first: int, last: int) -> Iterator[tuple[Place, tuple[bytes, bytes]]]:
        """(where it is, its key here) of pictures first to last - 1 that must be spooled, file by file."""
        self._database.execute("DROP TABLE IF EXISTS todo")
        self._database.execute(
            "CREATE TABLE todo AS SELECT place, path, about FROM "
            "(SELECT * FROM file ORDER BY place, path LIMIT ? OFFSET ?) "
            "WHERE bulk IS NOT NULL ORDER BY bulk, json_extract(about, '$[0][4]')",
            (last - first, first),
        )
        for place, path, about in self._database.execute("SELECT * FROM todo ORDER BY rowid"):
            yield Place(*json.loads(about)[0]), (place, path)

    def spooled(self, key: tuple[bytes, bytes], span: Place) -> None:
        """A picture's bytes are at `span` now. `listing` is to be asked before."""
        row = self._database.execute("SELECT about FROM file WHERE place = ? AND path = ?", key).fetchone()
        about = json.dumps([list(span), *json.loads(row[0])[1:]])
        self._database.execute("UPDATE file SET about = ?, bulk = NULL WHERE place = ? AND path = ?", (about, *key))

    # While pictures are written

    def earlier(self, content: bytes, path: str) -> str | None:
        """The path of the earlier picture with this content; None, and noted, for new content."""
        try:
            self._database.execute("INSERT INTO content VALUES (?, ?)", (content, os.fsencode(path)))
        except sqlite3.IntegrityError:
            row = self._database.execute("SELECT path FROM content WHERE hash = ?", (content,)).fetchone()
            return os.fsdecode(row[0])
        return None

    def near(self, bits: int, most: int, path: str) -> str | None:
        """The path of an earlier picture whose 64-bit perceptual hash differs in at most `most` bits; None, and noted,
        where there is none. Of most + 1 bands of the hash, one must then be the same."""
        borders = [64 * band // (most + 1) for band in range(most + 2)]
        bands = [bits >> low & (1 << high - low) - 1 for low, high in pairwise(borders)]
        raw = bits.to_bytes(8, "little")
        for band, value in enumerate(bands):
            rows = self._database.execute("SELECT hash, path FROM near WHERE band = ? AND bits = ?", (band, value))
            for other, name in rows:
                if (int.from_bytes(other, "little") ^ bits).bit_count() <= most:
                    return os.fsdecode(name)
        rows_new = [(band, value, raw, os.fsencode(path)) for band, value in enumerate(bands)]
        self._database.executemany("INSERT INTO near VALUES (?, ?, ?, ?)", rows_new)
        return None

    def add_shards(self, number: int, shards: dict[int, Shard]) -> None:
        rows = [(number, tier, json.dumps(vars(shard))) for tier, shard in shards.items()]
        self._database.executemany("INSERT INTO shard VALUES (?, ?, ?)", rows)

    def shards(self, tiers: tuple[int, ...]) -> dict[int, tuple[Shard, ...]]:
        """Those finished, by tier."""
        query = "SELECT json FROM shard WHERE tier = ? ORDER BY number"
        rows = {tier: self._database.execute(query, (tier,)).fetchall() for tier in tiers}
        return {tier: tuple(Shard(**json.loads(row[0])) for row in found) for tier, found in rows.items()}

    def remember(self, **state: Any) -> None:
        """Put on the disk how far the build has come, with everything noted before."""
        rows = [(name, json.dumps(value)) for name, value in state.items()]
        self._database.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", rows)
        self._database.execute("COMMIT")
        self._database.execute("BEGIN")

    def recall(self, name: str) -> Any:
        """What was remembered under a name, or None. Raises sqlite3.Error for a file that is no such database."""
        row = self._database.execute("SELECT json FROM state WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None


def in_order(names: Any) -> tuple[str, ...]:
    """Class names: all numbers by value, else by name."""
    found = list(names)
    if all(re.fullmatch(r"-?\d{1,18}", name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))

"""Where pictures come from: folders and the drawn set, listed and put in sample order without holding the list in
memory."""

import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hrgan.errors import DataError, UserError


class Index:
    """The files found, in sample order, and the contents seen: a temporary database, so that memory stays constant."""

    def __init__(self, path: Path, seed: int) -> None:
        self.found = 0
        self._key = hashlib.blake2b(str(seed).encode(), digest_size=32).digest()
        self._database = sqlite3.connect(path, isolation_level=None)
        for line in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE"):  # lost with the build anyway
            self._database.execute(f"PRAGMA {line}")
        columns = "place BLOB, path BLOB, class BLOB, PRIMARY KEY (place, path)"
        self._database.execute(f"CREATE TABLE file ({columns}) WITHOUT ROWID")
        self._database.execute("CREATE TABLE content (hash BLOB PRIMARY KEY, path BLOB) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, path: str, group: str) -> None:
        """path: relative, with forward slashes; its keyed hash is its place in the order."""
        name = os.fsencode(path)  # names on disk need not be valid unicode
        place = hashlib.blake2b(name, digest_size=16, key=self._key).digest()
        self._database.execute("INSERT INTO file VALUES (?, ?, ?)", (place, name, os.fsencode(group)))
        self.found += 1

    def files(self) -> Iterator[tuple[str, str]]:
        """(path, class) of every file, in sample order."""
        for path, group in self._database.execute("SELECT path, class FROM file ORDER BY place, path"):
            yield os.fsdecode(path), os.fsdecode(group)

    def classes(self) -> tuple[str, ...]:
        """The class names, sorted."""
        return tuple(sorted(os.fsdecode(row[0]) for row in self._database.execute("SELECT DISTINCT class FROM file")))

    def earlier(self, content: bytes, path: str) -> str | None:
        """The path of the earlier file with this content; None, and noted, for new content."""
        try:
            self._database.execute("INSERT INTO content VALUES (?, ?)", (content, os.fsencode(path)))
        except sqlite3.IntegrityError:
            row = self._database.execute("SELECT path FROM content WHERE hash = ?", (content,)).fetchone()
            return os.fsdecode(row[0])
        return None

    def close(self) -> None:
        self._database.close()


def scan(index: Index, source: Path, out: Path, labelled: bool) -> None:
    """Add every image under `source`; DataError when there is none, UserError for one without a class."""
    from hrgan.data.images import ENDINGS

    others: Counter[str] = Counter()
    for path in _walk(source, "", out.stat(), ()):
        ending = os.path.splitext(path)[1].lower()
        if ending not in ENDINGS:
            others[ending or "no ending"] += 1
            continue
        group, slash, _ = path.partition("/")
        if labelled and not slash:
            raise UserError(f"{source / path} is in no class folder; move it into one or build without labels")
        index.add(path, group)
    if not index.found:
        kinds = ", ".join(f"{ending} {count}" for ending, count in others.most_common(5))
        found = f"{others.total()} other files ({kinds})" if others else "no files"
        raise DataError(f"{source}: found {found}, expected images ({', '.join(sorted(ENDINGS))})")


def _walk(root: Path, folder: str, out: os.stat_result, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Relative paths of all files, through links, but not into OUT and not round a loop of links."""
    path = root / folder
    try:
        status = path.stat()
        here = (status.st_dev, status.st_ino)
        if here in above or os.path.samestat(status, out):
            return
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if entry.is_dir():
                    yield from _walk(root, name + "/", out, (*above, here))
                else:
                    yield name
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}; make the folder readable or move it out of {root}") from None


def list_drawn(index: Index, count: int, seed: int, labelled: bool) -> None:
    from hrgan.data.drawn import factors

    for i in range(count):
        index.add(f"drawn/{i:06d}", factors(i, seed).shape if labelled else "")

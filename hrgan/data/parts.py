"""A set built in parts, by the jobs of an array or by machines that share a disk, and joined to the very bytes that one
build writes.

A part is a sqlite file in OUT/parts: a header that says what it is a part of, and for each of its pictures, in sample
order, the encoded tiers or why it is skipped. Joining replays these through the code that writes a whole set, which
drops duplicates, numbers samples and cuts shards.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import sys
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from hrgan.data import manifest as manifests
from hrgan.data.build import Listed, Plan, Progress, identity, list_source, plan_of, spool, write_set
from hrgan.data.folder import INDEX, LOCK, PARTS, SKIPPED, check_folder, clean, disk_errors_named, locked
from hrgan.data.index import Entry, Index, Place
from hrgan.data.making import Made, Result, made, shown
from hrgan.data.manifest import Manifest
from hrgan.errors import DataError, UserError
from hrgan.watch import stopped_by_signals

Header = dict[str, Any]
TOGETHER = 256
"""Pictures that go to a part's file at once: so many are made again after a kill."""


def build_part(plan: Plan, out: Path, part: str, workers: int, overwrite: bool) -> None:
    """Make part "i/n" of the set: the i-th of n equal stretches of the files in sample order. One that was interrupted
    goes on. UserError for a wrong part, or where OUT holds a finished set."""
    number, count = _numbers(part)
    if (out / manifests.FILE).exists() or overwrite:
        raise UserError(f"{out} holds a set, or --overwrite was given: remove {out} yourself before building parts")
    folder = out / PARTS
    folder.mkdir(exist_ok=True)
    name = f"{number:05d}-of-{count:05d}"
    partial, index_file, spool_file = (folder / f".{name}.{what}" for what in ("partial", "index", "spool"))
    if (folder / f"{name}.sqlite").exists():
        (folder / f"{name}.sqlite").unlink()  # Asked for again.
    with locked(folder / f".{name}.lock"):
        try:
            with contextlib.closing(Index(index_file, plan.options.seed)) as index:
                listed = list_source(plan, index, out)
                first, last = (listed.pictures * border // count for border in (number - 1, number))
                header = _header(plan, listed, index) | {"part": number, "parts": count}
                with _opened(partial, header) as database:
                    before = int(database.execute("SELECT count(*) FROM made").fetchone()[0])
                    if before:
                        print(f"{out}: part {part} goes on after {before:,} pictures", file=sys.stderr)
                    spool(index, first + before, last, spool_file)
                    results = made(plan.options, index.entries(first + before, last), workers)
                    with contextlib.closing(results):
                        _write(database, shown(results, last - first, before))
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, folder / f"{name}.sqlite")
        finally:
            for leftover in folder.glob(f".{name}.*"):
                if not leftover.name.startswith(partial.name) and leftover.suffix != ".lock":
                    leftover.unlink()


def _numbers(part: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--part: {part!r}, expected I/N with I from 1 to N, for example 1/8")
    return number, count


def _header(plan: Plan, listed: Listed, index: Index) -> Header:
    """What all parts of a set have in common. The listing shows a source that changed between parts."""
    header = {
        "plan": identity(plan),
        "max_skipped": plan.max_skipped,
        "listed": listed._asdict(),
        "dropped": list(index.dropped()),
        "listing": index.listing(),
    }
    same: Header = json.loads(json.dumps(header))
    return same


COLUMNS = ("path", "class", "about", "reason", "detail", "content", "tiers", "crc32")


@contextlib.contextmanager
def _opened(path: Path, header: Header) -> Iterator[sqlite3.Connection]:
    """A part's file: that of an interrupted build of the same header, else a new one."""
    try:
        found = _read_header(path) if path.exists() else None
    except (DataError, UserError):
        found = None
    if found != header:
        for name in (path, Path(f"{path}-journal")):
            name.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=DELETE")
        if found != header:
            database.execute("BEGIN")
            database.execute("CREATE TABLE header (json TEXT)")
            database.execute("INSERT INTO header VALUES (?)", (json.dumps(header),))
            database.execute(f"CREATE TABLE made (number INTEGER PRIMARY KEY, {', '.join(COLUMNS)})")
            database.execute("COMMIT")
        yield database


def _write(database: sqlite3.Connection, results: Iterator[Result]) -> None:
    places = ", ".join("?" * len(COLUMNS))
    database.execute("BEGIN")
    for number, (entry, result) in enumerate(results, 1):
        row = _row(entry, result)
        database.execute(f"INSERT INTO made ({', '.join(COLUMNS)}) VALUES ({places})", (*row, _crc32(row)))
        if number % TOGETHER == 0:
            database.execute("COMMIT")
            database.execute("BEGIN")
    database.execute("COMMIT")


def _row(entry: Entry, picture: Made) -> tuple[bytes | str, ...]:
    sizes = [len(tier) for tier in picture.tiers]
    about = json.dumps([dict(entry.attributes), picture.origin, picture.size, picture.values, str(picture.near), sizes])
    group = entry.group.encode(errors="surrogateescape")
    detail = picture.detail.encode(errors="replace").decode()
    return os.fsencode(entry.path), group, about, picture.reason, detail, picture.content, b"".join(picture.tiers)


def _result(path: bytes, group: bytes, about: str, reason: str, detail: str, content: bytes, joined: bytes) -> Result:
    attributes, origin, size, values, near, sizes = json.loads(about)
    tiers, start = [], 0
    for length in sizes:
        tiers.append(joined[start : start + length])
        start += length
    entry = Entry(os.fsdecode(path), Place("", ""), group.decode(errors="surrogateescape"), attributes)
    return entry, Made(content, tuple(tiers), origin, tuple(size), tuple(values), int(near), reason, detail)


def _crc32(row: tuple[Any, ...]) -> int:
    check = 0
    for value in row:
        check = zlib.crc32(value if isinstance(value, bytes) else value.encode(errors="surrogateescape"), check)
    return check


# Joining


def merge(out: Path, max_skipped: float | None = None) -> Manifest:
    """Join the parts in OUT to the set that one build with the same options writes, byte for byte, and remove them.

    max_skipped: None takes that of the parts. UserError where parts are missing or do not belong together; DataError
    for a damaged one, and for too many skipped pictures. Interrupted, it is run again.
    """
    out = Path(out)
    folder = out / PARTS
    if not folder.is_dir():
        state = "is a finished set" if (out / manifests.FILE).exists() else "holds no parts"
        raise UserError(f"{out} {state}; `hrgan data build SRC {out} --part I/N` makes parts")
    with (
        disk_errors_named(out),
        locked(out / LOCK),
        stopped_by_signals(f"{out}: joining was stopped, the parts are untouched; the same command joins them"),
    ):
        if (out / manifests.FILE).exists():  # Killed when all was joined.
            result = manifests.load(out)
        else:
            headers = _headers(folder)
            check_folder(out, overwrite=False, merging=True)
            clean(out)
            result = _join(folder, out, headers, max_skipped)
        shutil.rmtree(folder)
    return result


def _join(folder: Path, out: Path, headers: list[Header], max_skipped: float | None) -> Manifest:
    limit = headers[0]["max_skipped"] if max_skipped is None else max_skipped
    plan, listed = plan_of(headers[0]["plan"], limit), _listed(headers[0])
    try:
        with contextlib.closing(Index(out / INDEX, plan.options.seed)) as index:
            for dropped in headers[0]["dropped"]:
                index.drop(*dropped)
            return write_set(plan, out, index, listed, _stored(folder, headers), Progress())
    except BaseException:
        clean(out, keep=SKIPPED)  # The parts are there to join again.
        raise


def _listed(header: Header) -> Listed:
    tree = header["listed"]
    attributes = {name: tuple(values) for name, values in tree["attributes"].items()}
    return Listed(tree["pictures"], tree["dropped"], tuple(tree["classes"]), attributes)


def _headers(folder: Path) -> list[Header]:
    """Of all parts, in order. UserError for parts that are missing or of different builds."""
    headers = [_read_header(path) for path in sorted(folder.glob("[0-9]*.sqlite"))]
    count = headers[0]["parts"] if headers else 0
    for header in headers:
        where = f"{folder}: part {header['part']}/{header['parts']} was built with other"
        other = f"than part {headers[0]['part']}/{headers[0]['parts']}"
        remedy = "build it again with the same source and options"
        for key, value, first in _compared(header, headers[0]):
            if value != first:
                raise UserError(f"{where} {key} ({str(value)[:60]}) {other} ({str(first)[:60]}); {remedy}")
    missing = sorted(set(range(1, count + 1)) - {header["part"] for header in headers})
    if missing or not headers:
        named = ", ".join(f"{number}/{count}" for number in missing[:10]) or "all"
        raise UserError(f"{folder}: parts missing: {named}; build them with --part, then merge again")
    return headers


def _read_header(path: Path) -> Header:
    with _damage_named(path), contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        header: Header = json.loads(database.execute("SELECT json FROM header").fetchone()[0])
        if (version := header["plan"]["version"]) != manifests.VERSION:
            raise UserError(f"{path}: of version {version}, expected {manifests.VERSION}; build it again")
        return header


def _compared(header: Header, first: Header) -> Iterator[tuple[str, Any, Any]]:
    """(name, its value, the first part's) of all that parts of a set have in common."""
    for name in first["plan"]["options"]["form"]:
        yield name, header["plan"]["options"]["form"].get(name), first["plan"]["options"]["form"][name]
    for name in first["plan"]["options"]:
        yield name, header["plan"]["options"].get(name), first["plan"]["options"][name]
    for name in first["plan"].keys() - {"source"}:  # It may be mounted elsewhere on another machine.
        yield name, header["plan"].get(name), first["plan"][name]
    yield "parts", header["parts"], first["parts"]
    yield "max_skipped", header["max_skipped"], first["max_skipped"]
    yield "files in its source", header["listing"], first["listing"]


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it and build this part again") from error


def _stored(folder: Path, headers: list[Header]) -> Generator[Result, None, None]:
    """The results of all parts, in sample order."""
    total = 0
    for header in sorted(headers, key=lambda header: int(header["part"])):
        path = folder / f"{header['part']:05d}-of-{header['parts']:05d}.sqlite"
        with _damage_named(path), contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            for *row, check in database.execute(f"SELECT {', '.join(COLUMNS)} FROM made ORDER BY number"):
                if _crc32(tuple(row)) != check:
                    raise ValueError(f"the row of {os.fsdecode(row[0])} has another checksum")
                yield _result(*row)
                total += 1
    if total != (found := headers[0]["listed"]["pictures"]):
        raise DataError(f"{folder}: the parts hold {total} files, expected {found}; build them again")

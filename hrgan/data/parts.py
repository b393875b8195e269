"""A set built in parts, by the jobs of an array or by machines that share a disk, and joined to the very bytes that one
build writes.

A part is a sqlite file in OUT/parts: a header that says what it is a part of, and for each of its files, in sample
order, the encoded tiers or why it is skipped. Joining replays these through the code that writes a whole set, which
drops duplicates, numbers samples and cuts shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
import zlib
from collections.abc import Generator, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from hrgan.data import manifest as manifests
from hrgan.data.build import (
    INDEX,
    LOCK,
    PARTS,
    Listed,
    Made,
    Options,
    Plan,
    Result,
    cleaned_on_failure,
    disk_errors_named,
    list_source,
    locked,
    made,
    prepare,
    shown,
    write_set,
)
from hrgan.data.manifest import Manifest
from hrgan.data.sources import Index
from hrgan.errors import DataError, UserError
from hrgan.watch import stopped_by_signals

Header = dict[str, Any]


def build_part(plan: Plan, out: Path, part: str, workers: int, overwrite: bool) -> None:
    """Make part "i/n" of the set: the i-th of n equal stretches of the files in sample order. UserError for a wrong
    part, or where OUT holds a finished set."""
    number, count = _numbers(part)
    if (out / manifests.FILE).exists() or overwrite:
        raise UserError(f"{out} holds a set, or --overwrite was given: remove {out} yourself before building parts")
    folder = out / PARTS
    folder.mkdir(exist_ok=True)
    name = f"{number:05d}-of-{count:05d}"
    partial, index_file = folder / f".{name}.partial", folder / f".{name}.index"
    with locked(folder / f".{name}.lock"):
        try:
            index_file.unlink(missing_ok=True)  # A killed build's.
            with contextlib.closing(Index(index_file, plan.options.seed)) as index:
                listed = list_source(plan, index, out)
                first, last = (listed.found * border // count for border in (number - 1, number))
                header = _header(plan, listed, index) | {"part": number, "parts": count}
                results = made(plan.options, islice(index.files(), first, last), workers)
                with contextlib.closing(results):
                    _write(partial, header, shown(results, last - first))
            os.replace(partial, folder / f"{name}.sqlite")
        finally:
            for leftover in (partial, index_file):
                leftover.unlink(missing_ok=True)


def _numbers(part: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--part: {part!r}, expected I/N with I from 1 to N, for example 1/8")
    return number, count


def _header(plan: Plan, listed: Listed, index: Index) -> Header:
    """What all parts of a set have in common. The listing shows a source that changed between parts."""
    listing = hashlib.sha256()
    for path, group in index.files():
        listing.update(os.fsencode(path) + b"\0" + os.fsencode(group) + b"\0")
    return {
        "version": manifests.VERSION,
        **{f"options.{key}": value for key, value in asdict(plan.options).items()},
        "name": plan.name,
        "drawn": plan.drawn,
        "labelled": plan.labelled,
        "per_shard": plan.per_shard,
        "max_skipped": plan.max_skipped,
        "found": listed.found,
        "classes": list(listed.classes),
        "listing": listing.hexdigest(),
    }


COLUMNS = ("path", "class", "content", "reason", "detail", "tiers", "sizes", "crc32")


def _write(path: Path, header: Header, results: Iterator[Result]) -> None:
    """A part's file, whole on the disk when this returns."""
    path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        for line in ("PRAGMA journal_mode=OFF", "PRAGMA synchronous=OFF", "CREATE TABLE header (json TEXT)"):
            database.execute(line)
        database.execute(f"CREATE TABLE made (number INTEGER PRIMARY KEY, {', '.join(COLUMNS)})")
        database.execute("BEGIN")
        places = ", ".join("?" * len(COLUMNS))
        for path_in_source, group, result in results:
            tiers = b"".join(result.tiers)
            sizes = json.dumps([len(tier) for tier in result.tiers])
            name = os.fsencode(path_in_source)
            row = (name, os.fsencode(group), result.content, result.reason, result.detail, tiers, sizes)
            database.execute(f"INSERT INTO made ({', '.join(COLUMNS)}) VALUES ({places})", (*row, _crc32(row)))
        database.execute("INSERT INTO header VALUES (?)", (json.dumps(header),))
        database.execute("COMMIT")
    with path.open("rb") as file:
        os.fsync(file.fileno())


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
            plan, listed = _plan(headers[0], max_skipped)
            prepare(out, overwrite=False, merging=True)
            with cleaned_on_failure(out), contextlib.closing(Index(out / INDEX, plan.options.seed)) as index:
                result = write_set(plan, out, index, listed, _stored(folder, headers))
        shutil.rmtree(folder)
    return result


def _headers(folder: Path) -> list[Header]:
    """Of all parts, in order. UserError for parts that are missing or of different builds."""
    headers = [_read_header(path) for path in sorted(folder.glob("[0-9]*.sqlite"))]
    count = headers[0]["parts"] if headers else 0
    for header in headers:
        for key, value in header.items():
            if key != "part" and value != headers[0][key]:
                what = "files in its source" if key == "listing" else key.removeprefix("options.")
                raise UserError(
                    f"{folder}: part {header['part']}/{header['parts']} was built with other {what} "
                    f"({str(value)[:60]}) than part {headers[0]['part']}/{headers[0]['parts']} "
                    f"({str(headers[0][key])[:60]}); build it again with the same source and options"
                )
    missing = sorted(set(range(1, count + 1)) - {header["part"] for header in headers})
    if missing or not headers:
        named = ", ".join(f"{number}/{count}" for number in missing[:10]) or "all"
        raise UserError(f"{folder}: parts missing: {named}; build them with --part, then merge again")
    return headers


def _read_header(path: Path) -> Header:
    with _damage_named(path), contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        header: Header = json.loads(database.execute("SELECT json FROM header").fetchone()[0])
        if header["version"] != manifests.VERSION:
            raise UserError(f"{path}: of version {header['version']}, expected {manifests.VERSION}; build it again")
        return header


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it and build this part again") from error


def _plan(header: Header, max_skipped: float | None) -> tuple[Plan, Listed]:
    given = {key.removeprefix("options."): value for key, value in header.items() if key.startswith("options.")}
    options = Options(**given | {"tiers": tuple(given["tiers"])})
    limit = header["max_skipped"] if max_skipped is None else max_skipped
    plan = Plan(options, header["name"], header["drawn"], header["labelled"], header["per_shard"], limit)
    return plan, Listed(header["found"], tuple(header["classes"]))


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
    if total != headers[0]["found"]:
        raise DataError(f"{folder}: the parts hold {total} files, expected {headers[0]['found']}; build them again")


def _result(path: bytes, group: bytes, content: bytes, reason: str, detail: str, joined: bytes, sizes: str) -> Result:
    tiers, start = [], 0
    for size in json.loads(sizes):
        tiers.append(joined[start : start + size])
        start += size
    return os.fsdecode(path), os.fsdecode(group), Made(content, tuple(tiers), reason, detail)

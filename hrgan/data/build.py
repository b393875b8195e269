"""Sources to a set: a folder of images, or `drawn:COUNT`, to tiered shards with a manifest.

The same source, options and seed give byte-identical shards, whatever the listing order or the number of workers:
samples are sorted by a keyed hash of their relative paths, and results are written in that order. Memory does not grow
with the number of images: the list of files and the content hashes live in a temporary sqlite database in OUT.
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal, NamedTuple

from hrgan.data import manifest as manifests
from hrgan.data.manifest import Manifest, SetWriter
from hrgan.data.sources import Index, list_drawn, scan
from hrgan.errors import DataError, UserError
from hrgan.watch import STOP_SIGNALS, stopped_by_signals, stops_held

SKIPPED = "skipped.csv"
INDEX = "build.sqlite"
LOCK = "build.lock"
PARTS = manifests.PARTS


@dataclass(frozen=True)
class Options:
    """How each picture is made; sent to every worker process. source: a folder, or None for the drawn set."""

    source: str | None
    tiers: tuple[int, ...]
    format: str
    quality: int
    channels: int
    min_size: int
    seed: int


class Made(NamedTuple):
    """One picture's result: sha256 of its source's bytes and its encoded tiers, or why it was skipped."""

    content: bytes = b""
    tiers: tuple[bytes, ...] = ()
    reason: str = ""
    detail: str = ""


Result = tuple[str, str, Made]
"""A file's path, its class and what was made of it."""


def build(
    source: str,
    out: Path,
    resolution: int,
    *,
    name: str | None = None,
    labels: Literal["none", "folder"] = "none",
    image_format: Literal["webp", "png", "jpeg"] = "webp",
    quality: int = 95,
    channels: int = 3,
    min_size: int = 0,
    max_skipped: float = 0.01,
    workers: int,
    seed: int = 0,
    shard_samples: int | None = None,
    overwrite: bool = False,
    part: str | None = None,
) -> Manifest | None:
    """Build the set `out` from `source` and return its manifest, which is written last: without it `out` is no set.

    source: a folder, nested or not, of JPEG, PNG, WebP, BMP or TIFF files; or "drawn:COUNT", the built-in drawn set.
    resolution: a power of two of 16 or more; a tier is stored for each power of two from 16 to it.
    labels: "folder" makes the first sub-folder (of the drawn set: the shape) the class; "none" stores no classes.
    image_format: "webp" and "png" are lossless; "jpeg" has `quality` 1 to 100. channels: 3, or 1 for grey. min_size:
    skip images with a shorter side in pixels (0: no limit; smaller ones are enlarged).
    max_skipped: the largest share of the images found that may be skipped: unreadable, too small, decompression bombs,
    or with the bytes of an earlier one. workers: processes (0 or 1: this one). shard_samples: samples in a shard (None:
    128 to 4096, by resolution). overwrite: replace a finished set in `out`; the old one is deleted first. part: "i/n"
    makes only part i of n, in `out/parts`, for parts.merge to join, and returns None.

    Raises UserError for wrong arguments, a missing source, an `out` that is busy or holds other files, or a full disk;
    DataError for no usable images or too many skipped (`out/skipped.csv` lists them). No error leaves a manifest
    behind.
    """
    out = Path(out)
    drawn = _drawn_count(source)
    _check_arguments(
        source if drawn is None else None,
        labels,
        image_format,
        quality,
        channels,
        max_skipped,
        shard_samples,
        workers,
        seed,
        min_size,
    )
    name = name if name is not None else _plain_name("drawn" if drawn is not None else Path(source).resolve().name)
    if name != _plain_name(name):
        raise UserError(f"name is {name!r}, expected letters, digits, - and _; nearest: {_plain_name(name)!r}")
    tiers = manifests.valid_tiers(resolution)
    options = Options(source if drawn is None else None, tiers, image_format, quality, channels, min_size, seed)
    per_shard = shard_samples or max(128, min(4096, 2**27 // resolution**2))
    plan = Plan(options, name, drawn, labels == "folder", per_shard, max_skipped)
    with disk_errors_named(out), stopped_by_signals(f"{out}: building was stopped; the same command builds it"):
        out.mkdir(parents=True, exist_ok=True)
        if part is not None:
            from hrgan.data.parts import build_part

            build_part(plan, out, part, workers, overwrite)
            return None
        with locked(out / LOCK):
            prepare(out, overwrite)
            with cleaned_on_failure(out), contextlib.closing(Index(out / INDEX, options.seed)) as index:
                listed = list_source(plan, index, out)
                results = made(options, index.files(), workers)
                return write_set(plan, out, index, listed, results)


@dataclass(frozen=True)
class Plan:
    """Everything that decides a set besides the source's files."""

    options: Options
    name: str
    drawn: int | None
    """Pictures of the drawn set, or None for a folder."""
    labelled: bool
    per_shard: int
    max_skipped: float


class Listed(NamedTuple):
    """What a source holds: files, and their classes."""

    found: int
    classes: tuple[str, ...]


def list_source(plan: Plan, index: Index, out: Path) -> Listed:
    """Put the source's files into the index."""
    if plan.drawn is None:
        scan(index, Path(plan.options.source or ""), out, plan.labelled)
    else:
        list_drawn(index, plan.drawn, plan.options.seed, plan.labelled)
    return Listed(index.found, index.classes() if plan.labelled else ())


def write_set(plan: Plan, out: Path, index: Index, listed: Listed, results: Generator[Result, None, None]) -> Manifest:
    """Write the pictures in their order, drop duplicates, count, and write the manifest last. index: notes the
    contents seen; it is removed."""
    from hrgan.data.images import FILTER

    options, (found, classes) = plan.options, listed
    with (
        disk_errors_named(out),
        contextlib.closing(results),
        contextlib.closing(SetWriter(out, plan.name, options.tiers, options.format, plan.per_shard)) as writer,
    ):
        skipped, counts = _write_samples(out, index, results, listed, writer)
        shards = writer.finish()
    index.close()
    (out / INDEX).unlink()
    _report(out, found, sum(counts.values()), skipped, plan.max_skipped)
    result = Manifest(
        version=manifests.VERSION,
        name=plan.name,
        channels=options.channels,
        bits=8,
        resolution=options.tiers[-1],
        filter=FILTER,
        format=options.format,
        quality=options.quality,
        seed=options.seed,
        fit="crop",
        classes=classes,
        class_counts=tuple(counts[label] for label in range(len(classes))),
        num_samples=sum(counts.values()),
        real_set="",
        tiers=shards,
    )
    result = manifests.with_set_hash(result)
    manifests.save(result, out)
    return result


def _write_samples(
    out: Path, index: Index, results: Iterator[Result], listed: Listed, writer: SetWriter
) -> tuple[Counter[str], Counter[int]]:
    """Write the usable pictures; returns how many were skipped by reason and written by label."""
    skipped: Counter[str] = Counter()
    counts: Counter[int] = Counter()
    numbers = {name: label for label, name in enumerate(listed.classes)}
    with open(out / SKIPPED, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = csv.writer(file)
        lines.writerow(("file", "reason", "detail"))
        for path, group, made in shown(results, listed.found):
            reason, detail = made.reason, made.detail
            if not reason:
                earlier = index.earlier(made.content, path)
                if earlier is not None:
                    reason, detail = "duplicate", f"same bytes as {earlier}"
            if reason:
                skipped[reason] += 1
                lines.writerow((path, reason, detail))
            else:
                label = numbers.get(group, 0)
                counts[label] += 1
                writer.write(made.tiers, label, path)
    return skipped, counts


def _report(out: Path, found: int, stored: int, skipped: Counter[str], max_skipped: float) -> None:
    """Say what was stored and skipped; DataError when that is too little or too much."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    lost = sum(skipped.values())
    if lost > max_skipped * found:
        raise DataError(
            f"{lost} of {found} images cannot be used ({reasons}), more than the share {max_skipped} allowed; "
            f"see {out / SKIPPED}, then mend or remove them or raise --max-skipped"
        )
    if not stored:
        raise DataError(f"none of {found} images can be used ({reasons}); see {out / SKIPPED}")
    print(
        f"{found} images found, {stored} stored, {found - stored} skipped", reasons and f"({reasons})", file=sys.stderr
    )


# Arguments


def _drawn_count(source: str) -> int | None:
    """COUNT of "drawn:COUNT", None for a folder."""
    if not str(source).startswith("drawn:"):
        return None
    count = str(source).removeprefix("drawn:")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"source is {source!r}, expected drawn:COUNT with a COUNT of 1 or more, for example drawn:2000")
    return int(count)


def _plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "set"


def _check_arguments(
    folder: str | None,
    labels: str,
    image_format: str,
    quality: int,
    channels: int,
    max_skipped: float,
    shard_samples: int | None,
    workers: int,
    seed: int,
    min_size: int,
) -> None:
    problems = []
    if folder is not None and not os.path.isdir(folder):
        problems.append(f"source {folder} is no folder, expected a folder of images or drawn:COUNT")
    if labels not in ("none", "folder"):
        problems.append(f"labels is {labels!r}, expected none or folder")
    if image_format not in manifests.EXTENSIONS:
        problems.append(f"image_format is {image_format!r}, expected {', '.join(manifests.EXTENSIONS)}")
    if not 1 <= quality <= 100:
        problems.append(f"quality is {quality}, expected 1 to 100")
    if channels not in (1, 3):
        problems.append(f"channels is {channels}, expected 1 or 3")
    if not 0 <= max_skipped <= 1:
        problems.append(f"max_skipped is {max_skipped}, expected a share from 0 to 1")
    for field, value in (("workers", workers), ("seed", seed), ("min_size", min_size)):
        if value < 0:
            problems.append(f"{field} is {value}, expected 0 or more")
    if shard_samples is not None and shard_samples < 1:
        problems.append(f"shard_samples is {shard_samples}, expected 1 or more")
    if problems:
        raise UserError("; ".join(problems))


# The output folder


@contextlib.contextmanager
def disk_errors_named(out: Path) -> Iterator[None]:
    """A full or read-only disk as a UserError with the folder, what failed and the free space."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        full = isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_FULL
        refused = isinstance(error, OSError) and error.errno in (
            errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST
        )  # fmt: skip
        if not (full or refused):
            raise
        what = getattr(error, "filename", None) or (INDEX if full else "a file")
        free = f"{shutil.disk_usage(out).free / 2**20:.1f} MB free" if out.is_dir() else "no such folder"
        raise UserError(f"{out}: cannot write {what} ({error}), {free}; make room or choose another OUT") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One build at a time. The kernel drops the lock with this process, however that ends."""
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not held by forked workers
            # The file may have been removed by a build that ended between our opening and locking it.
            current = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, PermissionError):
            current = False
        if not current:
            raise UserError(f"{path.parent}: another build is writing here; wait for it or choose another OUT")
        try:
            yield
        finally:
            path.unlink()


def _is_tier(path: Path) -> bool:
    """Whether a folder is what a build writes: named by a power of two, with tar files only."""
    side = int(path.name) if path.name.isdecimal() else 0
    return side >= 16 and not side & (side - 1) and path.is_dir() and all(p.suffix == ".tar" for p in path.iterdir())


def _is_cache(path: Path) -> bool:
    """Whether a folder is what evaluations leave beside a set: statistics of its pictures."""
    return (
        path.name == "stats"
        and path.is_dir()
        and all(p.suffix == ".safetensors" or p.name.startswith(".") for p in path.iterdir())
    )


@contextlib.contextmanager
def cleaned_on_failure(out: Path) -> Iterator[None]:
    """Leave no half set behind, but the list of what was skipped."""
    try:
        yield
    except BaseException:
        _clean(out, keep=SKIPPED)
        raise


def prepare(out: Path, overwrite: bool, merging: bool = False) -> None:
    """Remove what an interrupted build (or, with overwrite, a finished one) left; UserError for anything else."""
    if (out / PARTS).is_dir() and not merging:
        raise UserError(
            f"{out} holds parts of a set; join them with `hrgan data merge {out}`, or remove {out / PARTS} first"
        )
    if (out / manifests.FILE).exists() and not overwrite:
        raise UserError(f"{out} already holds a set; add --overwrite to replace it or choose another OUT")
    ours = {manifests.FILE, manifests.FILE + ".tmp", SKIPPED, INDEX, LOCK, PARTS}
    for entry in sorted(out.iterdir()):
        if entry.name not in ours and not _is_tier(entry) and not _is_cache(entry):
            raise UserError(f"{out} holds {entry.name}, which no build wrote; choose an empty or new OUT")
    _clean(out)


def _clean(out: Path, keep: str = "") -> None:
    """Remove a set, whole or partial; its manifest first, so that no moment shows a manifest without its shards."""
    for name in (manifests.FILE, manifests.FILE + ".tmp", INDEX, SKIPPED):
        if name != keep:
            (out / name).unlink(missing_ok=True)
    for entry in out.iterdir():
        if entry.is_dir() and (_is_tier(entry) or _is_cache(entry)):
            shutil.rmtree(entry)


# Making, in parallel


def make(options: Options, path: str) -> Made:
    """One picture: read (or draw), crop, resize to each tier, encode. Runs in the worker processes."""
    from hrgan.data import drawn, images

    if options.source is None:
        image = drawn.draw(int(path.removeprefix("drawn/")), options.seed, options.tiers[-1])
        content = hashlib.sha256(path.encode()).digest()
    else:
        try:
            data = Path(options.source, path).read_bytes()
            content = hashlib.sha256(data).digest()
            image = images.read_image(data, options.min_size)
        except OSError as error:
            return Made(reason="unreadable", detail=str(error.strerror))
        except images.Unusable as error:
            return Made(reason=error.args[0], detail=error.args[1])
    tiers = images.make_tiers(image, options.tiers, options.channels)
    return Made(content, tuple(images.encode(tier, options.format, options.quality) for tier in tiers))


def made(options: Options, files: Iterator[tuple[str, str]], workers: int) -> Generator[Result, None, None]:
    """(path, class, result) in the order of `files`, at most a few per worker in flight."""
    if workers <= 1:
        for path, group in files:
            yield path, group, make(options, path)
        return
    # fork: neither the main module nor anything heavy is imported again, and no thread of ours runs at this point.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker)
    flying: deque[tuple[str, str, Future[Made]]] = deque()
    try:
        with stops_held():
            pool.submit(int)  # Forks all workers.
        for path, group in files:
            flying.append((path, group, pool.submit(make, options, path)))
            if len(flying) >= 4 * workers:
                path, group, future = flying.popleft()
                yield path, group, future.result()
        while flying:
            path, group, future = flying.popleft()
            yield path, group, future.result()
    except BrokenProcessPool as error:
        raise UserError(f"a worker process was killed, perhaps for memory; use fewer than {workers} workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave stops to the main process, and end with it even when it is killed."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def shown(results: Iterator[Result], total: int) -> Generator[Result, None, None]:
    """Pass results on while showing progress: a bar on a terminal, else a line each 10 seconds."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    interval = 0.2 if console.is_terminal else 10.0
    last = time.monotonic()
    # auto_refresh would be a thread, which does not go well with fork
    with Progress(console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=total)
        for done, result in enumerate(results, start=1):
            yield result
            if time.monotonic() - last > interval or done == total:
                last = time.monotonic()
                bar.update(task, completed=done, refresh=True)
                if not console.is_terminal and done < total:
                    print(f"{done} of {total} images", file=sys.stderr, flush=True)

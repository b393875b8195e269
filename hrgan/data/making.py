"""Entries of an index to encoded tiers, by worker processes, in the entries' order."""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import NamedTuple

from hrgan.data.index import Entry
from hrgan.data.manifest import Form
from hrgan.errors import UserError
from hrgan.watch import STOP_SIGNALS, stops_held


@dataclass(frozen=True)
class Options:
    """How each picture is made; sent to every worker process. near: whether perceptual hashes are wanted. share: which
    files are taken, see `OTHER_SHARE`."""

    form: Form
    min_size: int
    seed: int
    near: bool
    share: tuple[float, float]


OTHER_SHARE = "other share"
"""As a `Made.reason`: the sha256 of the file, as a share of 2^256, lies outside of [low, high) of Options.share. Asked
for, so not a loss."""


class Made(NamedTuple):
    """One picture's result, or why it was skipped."""

    content: bytes = b""
    """sha256 of what the picture was made from."""
    tiers: tuple[bytes, ...] = ()
    origin: str = ""
    size: tuple[int, int] = (0, 0)
    """Of the source, width and height."""
    values: tuple[int, int] = (0, 255)
    """Least and greatest."""
    near: int = 0
    """64-bit perceptual hash, where wanted."""
    reason: str = ""
    detail: str = ""


Result = tuple[Entry, Made]


def make(options: Options, entry: Entry) -> Made:
    """One picture: fetch (or draw), read, fit, resize to each tier, encode. Runs in the worker processes."""
    from hrgan.data import drawn, fetch, images

    form, place = options.form, entry.place
    try:
        data = entry.path.encode() if place.kind == "drawn" else fetch.fetch(place)
        digest = hashlib.sha256(data)
        low, high = (border * 2**256 for border in options.share)  # Python compares them exactly.
        # Of the file alone: its frames and the crops of it are on one side.
        if not low <= int.from_bytes(digest.digest()) < high:
            return Made(reason=OTHER_SHARE)
        if place.kind == "drawn":
            square = drawn.draw(place.offset, options.seed, max(form.size(form.tiers[-1])))
            picture = images.Picture(images.converted(square, form))
        else:
            picture = images.read_picture(data, form, place.frame, options.min_size)
        tiers = images.make_tiers(picture, form, entry.crop, options.min_size)
    except (fetch.Unfetched, images.Unusable) as error:
        return Made(reason=error.args[0], detail=error.args[1])
    digest.update(repr((place.frame, entry.crop)).encode() if place.frame or entry.crop else b"")
    encoded = tuple(images.encode(tier, form) for tier in tiers.images)
    near = images.perceptual_hash(tiers.images, form) if options.near else 0
    return Made(digest.digest(), encoded, _origin(entry), tiers.size, tiers.values, near)


def _origin(entry: Entry) -> str:
    """What a sample says of where it is from. Of DICOM not the file's name, in which there may be a patient's."""
    if entry.place.frame is None:
        return entry.path.encode(errors="replace").decode()
    return "dicom-" + hashlib.sha256(os.fsencode(entry.path)).hexdigest()[:32]


def made(options: Options, entries: Iterator[Entry], workers: int) -> Generator[Result, None, None]:
    """Entries and what was made of them, in their order, at most a few per worker in flight."""
    if workers <= 1:
        for entry in entries:
            yield entry, make(options, entry)
        return
    # fork: neither the main module nor anything heavy is imported again, and no thread of ours runs at this point.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker)
    flying: deque[tuple[Entry, Future[Made]]] = deque()
    try:
        with stops_held():
            pool.submit(int)  # Forks all workers.
        for entry in entries:
            flying.append((entry, pool.submit(make, options, entry)))
            if len(flying) >= 4 * workers:
                entry, future = flying.popleft()
                yield entry, future.result()
        while flying:
            entry, future = flying.popleft()
            yield entry, future.result()
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


def shown(results: Iterator[Result], total: int, before: int = 0) -> Generator[Result, None, None]:
    """Pass results on while showing progress: a bar on a terminal, else a line each 10 seconds."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    interval = 0.2 if console.is_terminal else 10.0
    last = time.monotonic()
    # auto_refresh would be a thread, which does not go well with fork
    with Progress(console=console, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=total)
        for done, result in enumerate(results, start=before + 1):
            yield result
            if time.monotonic() - last > interval or done == total:
                last = time.monotonic()
                bar.update(task, completed=done, refresh=True)
                if not console.is_terminal and done < total:
                    print(f"{done} of {total} images", file=sys.stderr, flush=True)

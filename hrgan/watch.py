"""Ends of a run: who asks it to stop, and who no longer moves.

A thread beside the training reads signals the moment they come, also while the training sits in a collective; says
once a second, on a board for all (board.py), where this process is; and ends it, with its stack and the ranks that are
behind, when it has not moved for the time-out. Rooms call `beat` as they make progress. There is one
watch a process, like the signals that it reads.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hrgan.board import POST_SECONDS, Board, Post
from hrgan.errors import Stopped, UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
KEEPER = "rank 0, which keeps the processes' store,"


@dataclass
class _Place:
    """Where the training is."""

    name: str = "starting"
    nimg: float = 0.0
    """Images seen, plus a part of a step; the process with the least is behind."""
    moved: float = 0.0
    """time.monotonic() of the last beat."""
    patient: bool = False
    """Whether no time-out holds."""
    waits_for_main: bool = False
    """Whether it counts as moving for as long as the main process does."""


_place = _Place()


def beat(name: str | None = None, nimg: float | None = None) -> None:
    """Say that this process moves, and where it is (None: as before). Costs a microsecond."""
    _place.moved = time.monotonic()
    if name is not None:
        _place.name = name
    if nimg is not None:
        _place.nimg = nimg


@contextmanager
def patience(name: str) -> Iterator[None]:
    """In here no time-out holds: for one call into another library that cannot say how far it is."""
    beat(name)
    _place.patient = True
    try:
        yield
    finally:
        _place.patient = False
        beat()


@contextmanager
def waiting_for_main() -> Iterator[None]:
    """In here the time-out holds for the main process alone: this one moves as long as that says where it is."""
    _place.waits_for_main = True
    try:
        yield
    finally:
        _place.waits_for_main = False
        beat()


class Watch:
    """Of this process, from `start` to `stop`."""

    def __init__(self, rank: int, world: int, timeout_seconds: float, stop_at: float | None, store: Any) -> None:
        """stop_at: time.time() from which a stop is asked for. store: the processes' torch.distributed store; None for
        a world of one."""
        self._rank, self._world, self._timeout, self._stop_at = rank, world, timeout_seconds, stop_at
        self._board = Board(rank, store) if store is not None else None
        self._everyone = tuple(range(world))
        self._signal: signal.Signals | None = None
        self._interrupts = 0
        self._main_post: Post | None = None
        # Only a launcher's workers end with their parent: `nohup hrgan train &` outlives its shell on purpose.
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._thread = threading.Thread(target=self._run, name="hrgan-watch", daemon=True)
        self._ended = threading.Event()

    def start(self) -> None:
        """Take over the stop signals. Call from the main thread."""
        beat("starting", 0)
        self._wakeup, write_end = socket.socketpair()
        write_end.setblocking(False)
        self._write_end = write_end
        self._before = {number: signal.signal(number, _handled_by_the_thread) for number in STOP_SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        if self._board is not None:
            self._board.start(_place.nimg, _place.name)
        self._thread.start()

    def stop(self) -> None:
        """Give the signals back."""
        self._ended.set()
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()
        self._write_end.close()  # Wakes the thread.
        self._thread.join()
        self._wakeup.close()
        if self._board is not None:
            self._board.stop()

    def reason(self) -> str | None:
        """Why this process should stop, if it should: a signal, the time, or a launcher that is gone."""
        if self._signal is not None:
            return self._signal.name
        if self._stop_at is not None and time.time() >= self._stop_at:
            return "the time limit less limits.margin_minutes"
        if self._parent is not None and os.getppid() != self._parent:
            return "the launcher is gone"
        return None

    def lost(self) -> str:
        """The ranks that stopped saying where they are, with the place each was last at; "" when all still do. Takes
        three posts' time."""
        if self._board is None:
            return ""
        before = self._board.look(self._everyone, 3 * POST_SECONDS)
        time.sleep(3 * POST_SECONDS)
        after = self._board.look(self._everyone, 3 * POST_SECONDS)
        if before is None or after is None:
            return KEEPER
        return ", ".join(
            f"rank {rank} ({post})" for rank, post in enumerate(after) if rank != self._rank and post == before[rank]
        )

    # The thread

    def _run(self) -> None:
        told = 0.0
        while not self._ended.is_set():
            if select.select([self._wakeup], [], [], POST_SECONDS / 2)[0]:
                for number in self._wakeup.recv(64):
                    self._take(signal.Signals(number))
            now = time.monotonic()
            still = 0.0 if _place.patient else now - _place.moved
            if still > self._timeout:
                self._end(still)
            if now - told >= POST_SECONDS and not self._ended.is_set():
                told = now
                # Stands behind this thread where that cannot run: it needs no interpreter.
                faulthandler.dump_traceback_later(self._timeout * 1.5 + 10, exit=True, file=2)
                if self._board is not None:
                    self._board.post(_place.nimg, _place.name)
                    if _place.waits_for_main and self._main_goes_on(self._board):
                        beat()

    def _take(self, number: signal.Signals) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os.write(2, b"SIGINT again: ending at once; the last checkpoint is whole\n")
            os._exit(128 + number)
        if number in STOP_SIGNALS and self._signal is None:
            again = ", once more to end at once" if number == signal.SIGINT else ""
            os.write(2, f"{number.name}: saving at the next step{again}\n".encode())
            self._signal = number

    def _main_goes_on(self, board: Board) -> bool:
        """Whether rank 0 has posted since the last look. Its own watch ends it when its training does not move; one
        that is frozen, or cut off, posts no more."""
        posts = board.look((0,), POST_SECONDS / 2)
        if posts is None:
            return board.closed  # Then rank 0 has ended, and the collective fails by itself.
        before, self._main_post = self._main_post, posts[0]
        return posts[0] != before

    def _end(self, still: float) -> None:
        """Name who is behind, print the stacks, leave."""
        lines = [
            f"rank {self._rank} ({socket.gethostname()}, process {os.getpid()}) has not moved for {still:.0f} s "
            f"(limits.timeout_minutes {self._timeout / 60:g}); it is at: {_place.name}"
        ]
        if self._board is not None:
            posts = self._board.look(self._everyone, 3 * POST_SECONDS)
            furthest = max((post.nimg for post in posts or []), default=0.0)
            for rank, post in enumerate(posts or []):
                age = time.time() - post.seconds
                silent = f"; rank {rank} does not answer (for {age:.0f} s)" if age > 5 * POST_SECONDS else ""
                lines.append(f"  rank {rank} is {'behind, ' if post.nimg < furthest else ''}at: {post}{silent}")
            if posts is None:
                lines.append(f"  {KEEPER} does not answer")
        # In one piece: the ranks of a node time out together, and their lines would mix.
        os.write(2, ("\n".join([*lines, *_stacks()]) + "\n").encode())
        os._exit(1)


def _stacks() -> Iterator[str]:
    """What each thread runs, the main one first; without source lines, because reading may be what hangs."""
    threads = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    for ident, frame in sorted(sys._current_frames().items(), key=lambda thread: thread[0] != main):
        yield f"{threads.get(ident, ident)} (most recent call first):"
        for caller, line in traceback.walk_stack(frame):
            yield f'  File "{caller.f_code.co_filename}", line {line} in {caller.f_code.co_name}'


def _handled_by_the_thread(number: int, frame: Any) -> None:
    """Python's part of the handling: the thread has read the signal from the wakeup socket."""


def stop_time(hours: float | None, margin_minutes: float) -> float | None:
    """time.time() from which a run should stop: the earlier of `hours` from now and HRGAN_DEADLINE (seconds since
    1970, which SLURM's scripts set to the end of the job), less the margin."""
    ends = [time.time() + hours * 3600] if hours is not None else []
    deadline = os.environ.get("HRGAN_DEADLINE")
    if deadline:
        if not deadline.replace(".", "", 1).isdecimal():
            raise UserError(f"HRGAN_DEADLINE: {deadline!r} is no number of seconds since 1970")
        ends.append(float(deadline))
    return min(ends) - margin_minutes * 60 if ends else None


class _Interrupted(BaseException):
    """No `except Exception` on the way holds it up. After a KeyboardInterrupt that came within an `exec`, as imports
    of dataclasses have it, Python 3.11 would end by SIGINT and not with an exit code."""


@contextmanager
def stopped_by_signals(message: str) -> Iterator[None]:
    """For commands that can be left anywhere: SIGTERM, SIGINT and SIGUSR1 raise Stopped(message) at once, a second
    SIGINT ends the process."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise _Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except _Interrupted as interrupt:
        raise Stopped(f"{interrupt}: {message}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stops_held() -> Iterator[None]:
    """A stop that comes in here comes at its end: what a signal's handler raises in the hooks that run around a fork
    is dropped by Python."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        os.kill(os.getpid(), came[0])

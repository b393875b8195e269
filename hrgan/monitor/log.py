"""What a run says: log.jsonl, metrics.jsonl, TensorBoard and one live line. For the main process only."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hrgan.errors import to_nowhere
from hrgan.metrics.rows import Row, main_metric, provenance, values
from hrgan.schedule import Phase, Schedule
from hrgan.sizes import size_text


class Output(Console):
    """Falls silent where what read it has ended, as `| head` does: a training goes on."""

    def on_broken_pipe(self) -> None:
        """What rich calls."""
        self.quiet = True
        to_nowhere(self.file)


class RunLog:
    """Writes the records of one run directory. Rows after `nimg` in it are dropped: a resumed run makes them again."""

    def __init__(self, run: Path, nimg: int, tensorboard: bool, grid: Sequence[int] = (4, 4)) -> None:
        self.run, self.grid = run, grid
        self.rows: list[Row] = []
        """Of log.jsonl, as far as it goes now."""
        self.go_back(nimg)
        self.console = Output(file=sys.stdout, highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        if self.live:
            self.live.start()
        self.events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # Takes a second to import: not for runs that do without.

            self.events = SummaryWriter(str(run / "events"), purge_step=nimg)

    def go_back(self, nimg: int) -> None:
        """Drop the rows after `nimg`."""
        for name in ("log.jsonl", "metrics.jsonl"):
            drop_after(self.run / name, nimg)
        self.rows = read_rows(self.run / "log.jsonl")

    def say(self, line: str) -> None:
        """One line for a person."""
        self.console.print(line, markup=False)
        self.console.file.flush()

    def tick(self, row: Row, fading: bool, total_kimg: float, eta_seconds: float) -> None:
        """A row of log.jsonl, and the live line."""
        append(self.run / "log.jsonl", row)
        self.rows.append(row)
        losses = "  ".join(
            f"{name} {'skipped' if row[key] is None else format(row[key], '.3f'):>7}"
            for name, key in (("D", "loss_d"), ("G", "loss_g"))
        )
        size = size_text(self.grid, row["resolution"])
        line = (
            f"{size} {'fade' if fading else 'stable':6} {row['kimg']:8.1f}/{total_kimg:g} kimg  "
            f"{row['img_per_sec']:7.1f} img/s  data {row['data_wait']:4.0%}  {losses}  ETA {clock(eta_seconds)}"
        )
        if self.live:
            self.live.update(Text(line), refresh=True)
        else:
            self.say(line)
        self._scalars("train", row)

    def metric(self, row: Row) -> None:
        """A row of metrics.jsonl."""
        add_row(self.run / "metrics.jsonl", row)
        self._scalars(
            "metrics", {key: value for key, value in row.items() if isinstance(value, float)} | {"nimg": row["nimg"]}
        )

    def _scalars(self, group: str, row: Row) -> None:
        if self.events is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool) and key not in ("nimg", "kimg"):
                    self.events.add_scalar(f"{group}/{key}", value, row["nimg"])
            self.events.flush()

    def close(self) -> None:
        """Flush and release the terminal."""
        if self.live:
            self.live.stop()
        if self.events is not None:
            self.events.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with a file among the processes that write it: the training and `hrgan eval --watch`."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX)
        except OSError as error:  # Some cluster file systems have no locks; `open_run` says so at the start of a run.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


def append(path: Path, row: Row) -> None:
    """Add one line of JSON in a single write, so that a kill leaves whole lines and at most one cut one, which the
    next writer removes."""
    line = json.dumps(row, allow_nan=False) + "\n"
    with locked(path), path.open("ab") as file:
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole < file.tell():  # Another writer was killed in its line: this one would run into it.
            file.truncate(whole)
        file.write(line.encode())


def add_row(path: Path, row: Row, wanted: Callable[[], bool] = lambda: True) -> bool:
    """Add a row to metrics.jsonl, which several programs write, unless it has the same numbers of the same checkpoint
    already, or `wanted`, asked while no other writes, says no. Atomic: a kill leaves the file as it was, or with the
    row. Whether it was added."""
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    with locked(path):
        before = path.read_bytes() if path.exists() else b""
        before = before[: before.rfind(b"\n") + 1]  # Without a line that an older version was killed in.
        if any(same_measurement(row, other) for other in read_rows(path)) or not wanted():
            return False
        partial = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}")
        try:
            with partial.open("wb") as file:
                file.write(before + line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return True


def same_measurement(row: Row, other: Row) -> bool:
    """Whether two rows are of one checkpoint, measured in one way, with the same metrics."""
    same = row["nimg"] == other["nimg"] and provenance(row) == provenance(other)
    return same and set(values(row)) <= set(values(other))


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a JSONL file; one that a kill cut is left out."""
    rows = []
    # Lines are ASCII: what cannot be decoded is damage, found as such below.
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def drop_after(path: Path, nimg: int) -> None:
    """Keep the rows up to `nimg`, atomically."""
    if path.exists():
        with locked(path):
            partial = path.with_name(f".{path.name}")
            partial.write_text("".join(json.dumps(row) + "\n" for row in read_rows(path) if row["nimg"] <= nimg))
            os.replace(partial, path)


def summary(run: Path, grid: Sequence[int]) -> list[str]:
    """Lines for the end of a run: its metric at the first and last evaluation of the last resolution, and its newest
    picture."""
    # In order of nimg: `hrgan eval --watch` adds the rows of older checkpoints after those of newer ones.
    rows = sorted(read_rows(run / "metrics.jsonl"), key=lambda row: int(row["nimg"]))
    rows = [row for row in rows if main_metric(row) is not None]
    lines = []
    if rows:
        last = rows[-1]
        name = str(main_metric(last))
        first = next(row for row in rows if provenance(row) == provenance(last))
        numbers = [
            f"{'none' if row[name] is None else format(row[name], '.4f')} at {row['nimg'] / 1000:g} kimg"
            for row in (first, last)
        ]
        size = size_text(grid, last["resolution"])
        floor = last[f"{name}_floor"]
        beside = f"; reals against reals {floor:.4f}" if floor is not None else ""
        lines.append(f"{name} at {size}: {', '.join(numbers)}{beside}")
    pictures = sorted((run / "samples").glob("*.png"))
    if pictures:
        lines.append(f"pictures (generated left, real right): {pictures[-1]}")
    return lines


def clock(seconds: float) -> str:
    """3 d 04:05, or 4:05:06."""
    days, rest = divmod(int(seconds), 86400)
    hours, minutes = divmod(rest // 60, 60)
    return f"{days} d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{rest % 60:02d}"


def eta(
    schedule: Schedule, phase: Phase, nimg: int, seconds_per_image: dict[int, float], cost: Callable[[int], float]
) -> float:
    """Seconds to the end of the run: measured speed where a resolution was seen. After the last of these a picture
    takes as many times longer as its cost grows, but at most four times for each doubling: while pictures are small,
    what does not grow with them takes most of the time."""
    seconds = {phase.resolution: 0.0} | seconds_per_image
    total = 0.0
    for later in schedule.phases[phase.index :]:
        if (size := later.resolution) not in seconds:
            seconds[size] = seconds[size // 2] * min(4.0, cost(size) / cost(size // 2))
        total += seconds[size] * (later.nimg_to - max(nimg, later.nimg_from))
    return total

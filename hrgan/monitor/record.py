"""What a run directory says to those who look at it: whatever can be read, and what could not."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hrgan.config import Config, from_dict, read_yaml
from hrgan.errors import HrganError, UserError, one_line
from hrgan.metrics.rows import PROVENANCE, Row
from hrgan.monitor.curves import Band
from hrgan.monitor.log import read_rows
from hrgan.schedule import Schedule, make_schedule
from hrgan.sizes import size_text

SIGNS = ("environment.json", "config.yaml", "log.jsonl")
"""A folder with none of these is no run."""


@dataclass(frozen=True)
class Record:
    """A run directory, read at one moment."""

    folder: Path
    log: list[Row]
    """In order of nimg."""
    metrics: list[Row]
    """As they stand in the file."""
    config: Config | None
    """None: there is none, or it is damaged."""
    schedule: Schedule | None
    environment: dict[str, Any]
    finished: bool
    stopped: str | None
    """What the STOP file says; None: there is none."""
    damage: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.resolve().name

    @property
    def grid(self) -> Sequence[int]:
        """Base grid of the pictures."""
        return self.config.network.grid if self.config else (4, 4)

    @property
    def state(self) -> str:
        """For people."""
        if self.finished:
            return "finished"
        if self.stopped is not None:
            return f"stopped: {self.stopped or 'on request'}"
        return "running or interrupted"

    @property
    def kimg(self) -> float:
        """Thousands of images trained, as far as the logs know."""
        return max([float(row["nimg"]) for row in (*self.log[-1:], *self.metrics)], default=0.0) / 1000

    @property
    def seconds(self) -> float | None:
        """Time trained."""
        return number(self.log[-1].get("seconds")) if self.log else None

    @cached_property
    def _clock(self) -> tuple[list[float], list[float]]:
        pairs = [(float(row["nimg"]), s) for row in self.log if (s := number(row.get("seconds"))) is not None]
        return [nimg for nimg, _ in pairs], [s for _, s in pairs]

    def hours_at(self, nimg: float) -> float | None:
        """Hours trained until `nimg`, between two lines of the log by proportion; None outside of what it holds."""
        nimgs, seconds = self._clock
        if not nimgs or nimg > nimgs[-1]:
            return None
        at = bisect_left(nimgs, nimg)
        before, began = (nimgs[at - 1], seconds[at - 1]) if at else (0.0, 0.0)
        share = (nimg - before) / (nimgs[at] - before) if nimgs[at] > before else 1.0
        return (began + share * (seconds[at] - began)) / 3600

    def size(self, resolution: int) -> str:
        """For people."""
        return size_text(self.grid, resolution)

    def bands(self) -> list[Band]:
        """The phases: as planned, or where the plan cannot be read, as logged."""
        if self.schedule:
            return [
                Band(p.kimg_from, p.kimg_to, self.size(p.resolution), p.fading) for p in self.schedule.phases
            ]
        found: list[Band] = []
        last = None
        for row in self.log:
            resolution, kimg = row.get("resolution"), row["nimg"] / 1000
            if not isinstance(resolution, int):
                continue
            # A line is about the images before it: the first of a phase begins where the line before ends.
            phase = (resolution, row.get("phase"))
            if phase == last:
                fading = found[-1].fading or number(row.get("alpha")) not in (1.0, None)
                found[-1] = Band(found[-1].start, kimg, found[-1].size, fading)
            else:
                fading = number(row.get("alpha")) not in (1.0, None)
                found.append(Band(found[-1].end if found else 0.0, kimg, self.size(resolution), fading))
            last = phase
        return found


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def read_record(folder: Path) -> Record:
    """Read a run directory, whatever state it is in. UserError where it is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run directory, such as runs/demo")
    if not any((folder / name).exists() for name in SIGNS):
        raise UserError(f"{folder}: no run (it has none of {', '.join(SIGNS)}); name a folder that hrgan train made")
    damage: list[str] = []
    config = _config(folder / "config.yaml", damage)
    log = sorted(_rows(folder / "log.jsonl", ("nimg",), damage), key=lambda row: float(row["nimg"]))
    stop = folder / "STOP"
    return Record(
        folder,
        log,
        _rows(folder / "metrics.jsonl", ("nimg", "resolution"), damage),
        config,
        _schedule(config, damage),
        _environment(folder / "environment.json", damage),
        (folder / "FINISHED").exists(),
        one_line(stop.read_text(errors="replace")) if stop.is_file() else None,
        damage,
    )


def _rows(path: Path, needed: Sequence[str], damage: list[str]) -> list[Row]:
    """The lines that can be used; numbers that are not finite as None."""
    if not path.exists():
        return []
    lines = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    rows = read_rows(path)
    if lines > len(rows):
        cut = lines - len(rows) == 1
        damage.append(f"{path.name}: {'its last line is cut' if cut else f'unreadable from line {len(rows) + 1:,} on'}")
    good = []
    for row in rows:
        if not isinstance(row, dict) or any(number(row.get(key)) is None for key in needed):
            continue
        if any(isinstance(row.get(key), (list, dict)) for key in PROVENANCE):
            continue
        good.append({key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()})
    if len(good) < len(rows):
        damage.append(f"{path.name}: {len(rows) - len(good):,} lines lack {' or '.join(needed)} and are left out")
    return good


def _config(path: Path, damage: list[str]) -> Config | None:
    try:
        return from_dict(read_yaml(path))
    except (HrganError, TypeError, ValueError, AttributeError) as error:
        damage.append(f"config.yaml: {one_line(error)}" if path.exists() else "config.yaml is missing")
        return None


def _schedule(config: Config | None, damage: list[str]) -> Schedule | None:
    """Types of values are not checked by `from_dict`: a damaged file may hold anything."""
    if config is None:
        return None
    try:
        return make_schedule(config)
    except (HrganError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        damage.append(f"config.yaml gives no schedule: {one_line(error)}")
        return None


def _environment(path: Path, damage: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        damage.append(f"environment.json: {one_line(error)}" if path.exists() else "environment.json is missing")
        return {}
    return found if isinstance(found, dict) else {}

"""Measuring a run's checkpoints beside its training, or after it: `hrgan eval RUN --watch`."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from hrgan.apps.evaluate import Settings, chosen_extractor
from hrgan.apps.generate import load_generator
from hrgan.checkpoint import name_best, numbered
from hrgan.config import Config, from_dict, read_yaml
from hrgan.data.dataset import Dataset, open_dataset
from hrgan.engine import from_all, join, on_first
from hrgan.errors import UserError
from hrgan.metrics.evaluation import METRICS, evaluated, save_neighbours
from hrgan.metrics.extractor import Extractor
from hrgan.metrics.features import Ranks
from hrgan.metrics.rows import Row, describe, values
from hrgan.metrics.source import reference
from hrgan.monitor.log import add_row, locked, read_rows
from hrgan.watch import stopped_by_signals


@dataclass(frozen=True)
class Watcher:
    """What a run is measured with."""

    run: Path
    config: Config
    dataset: Dataset
    extractor: Extractor
    lpips: bool
    ranks: Ranks
    own_set: bool
    """Whether it is compared with the set that it was trained on."""
    passed_over: set[tuple[str, bytes]] = field(default_factory=set)
    """The checkpoints (nimg, manifest) that were pruned too soon or do not verify."""
    measured: set[tuple[str, bytes]] = field(default_factory=set)
    """Those measured here. Where some reals cannot be read, their rows say fewer than are asked for."""

    def left(self) -> list[Path]:
        """The checkpoints that lack a row of the same extractor, counts and set with all metrics, the newest first."""
        rows = read_rows(self.run / "metrics.jsonl")
        done = self.measured | self.passed_over
        return [path for path in numbered(self.run) if mark_of(path) not in done and not self._known(path, rows)]

    def _known(self, path: Path, rows: list[Row]) -> bool:
        settings, extractor = self.config.eval, self.extractor
        real = reference(self.config, self.dataset, self.dataset.resolution)
        wanted = {
            "nimg": int(path.name),
            "extractor": extractor.name,
            "extractor_sha256": extractor.sha256,
            "num_fake": settings.num_fake,
            "real_set": real.identity,
            "mirror": real.mirror,
        }
        compared = {"fid", *settings.metrics} - {"ppl"}
        names = {extractor.called(base) for name in compared for base in METRICS[name][1]}
        # Where some reals could not be read, a row has fewer than were asked for.
        found = any(
            _holds(row, wanted)
            and row["num_real"] + row.get("lost_reals", 0) == real.count
            and names <= set(values(row))
            for row in rows
        )
        if found and "ppl" in settings.metrics:
            path_length = "ppl" if self.lpips else f"ppl_{extractor.short}"
            named = {"nimg": int(path.name), "num_fake": settings.num_fake}
            return any(_holds(row, named) and path_length in row for row in rows)
        return found

    def measure(self, folder: Path) -> None:
        """Add the rows of a checkpoint, or say why it gets none. All processes of this watcher call it."""
        nimg, mark = int(folder.name), mark_of(folder)
        try:
            problem, loaded = None, load_generator(folder, True, self.extractor.device, as_trained=True)
        except (UserError, OSError, SafetensorError) as error:
            gone = not folder.is_dir()
            problem = "the training pruned it before it was measured" if gone else str(error)
        problem = next(filter(None, from_all(problem, self.ranks.world)), None)
        if problem is not None:
            self.say(f"{folder} passed over: {problem}")
            self.passed_over.add(mark)
            return
        generator, alpha, _, _ = loaded
        real = reference(self.config, self.dataset, int(generator.resolution))  # type: ignore[arg-type]  # a plain int
        folders = [self.dataset.stats_folder(), self.run / "stats"]
        found = evaluated(self.config, generator, alpha, real, self.extractor, self.lpips, self.ranks, folders)
        self.measured.add(mark)
        if found.problem is not None:
            self.say(f"warning: {folder}: {found.problem}")
        for row in found.rows:
            if not add_row(self.run / "metrics.jsonl", {"nimg": nimg, **row}, lambda: not rolled_back(folder, mark)):
                self.say(f"{nimg / 1000:g} kimg was measured by another process meanwhile, or the run went back")
                continue
            self.say(f"{describe(row, self.dataset.form.grid)} at {nimg / 1000:g} kimg, {row['seconds']:.1f} s")
        if found.neighbours is not None and self.own_set:
            save_neighbours(found.neighbours, self.run, nimg, real.level)
        if self.ranks.rank == 0:
            with locked(self.run / "metrics.jsonl"):
                name_best(self.run)

    def say(self, line: str) -> None:
        """One line from the first process."""
        if self.ranks.rank == 0:
            print(line, flush=True)


def _holds(row: Row, wanted: Row) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())


def mark_of(folder: Path) -> tuple[str, bytes]:
    """Which checkpoint this is: after a rollback another one may take its place."""
    manifest = folder / "manifest.json"
    return folder.name, manifest.read_bytes() if manifest.exists() else b""


def rolled_back(folder: Path, mark: tuple[str, bytes]) -> bool:
    """Whether the run went back to before a checkpoint, and so has none of these weights; a pruned one it has had."""
    if folder.exists():
        return mark_of(folder) != mark
    latest = folder.parent.parent / "latest"
    return latest.exists() and int(latest.read_text()) < int(folder.name)


@contextmanager
def claimed(run: Path, nimg: int) -> Iterator[bool]:
    """Whether this watcher alone measures a checkpoint in here. A claim ends with the process that holds it, however
    that ends; where files cannot be locked two may do the same work, of which one row is kept."""
    (run / ".watch").mkdir(exist_ok=True)
    with (run / ".watch" / str(nimg)).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield True


def watch(run: Path, settings: Settings, every: float) -> None:
    """Follow a run: add rows to its metrics.jsonl for each checkpoint that has none of the same extractor, counts and
    set, the newest first, point `best` at the best, and look again after `every` seconds, until it is finished and
    none is left. Several of these share the work.

    Raises Stopped on SIGTERM, SIGINT and SIGUSR1.
    """
    settings.check()
    if every <= 0:
        raise UserError(f"--every: {every:g}, expected more than 0 seconds")
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; --watch follows a run directory, for example runs/demo")
    # What may be there before a run's configuration is: SLURM's logs, its lock, its environment.
    begun = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    if begun - {"slurm", "STOP", "environment.json"} and not (run / "config.yaml").exists():
        raise UserError(f"{run}: holds no run; --watch follows a run directory, for example runs/demo")
    for name in ("resolution", "picture"):
        if getattr(settings, name) is not None:
            raise UserError(f"--{name}: says nothing together with --watch; leave it out")
    rank, world, device = join()
    with stopped_by_signals(f"stopped following {run}; the same command goes on"):
        if not (run / "checkpoints").is_dir() and rank == 0:
            print(f"{run}: no training has begun there yet: waiting for it", flush=True)
        while not (run / "checkpoints").is_dir():  # The last thing that a new run makes.
            time.sleep(every)
        config = settings.of(from_dict(read_yaml(run / "config.yaml")))
        ranks = Ranks(rank, world)
        extractor, lpips = chosen_extractor(config, device, ranks)
        watcher = Watcher(run, config, open_dataset(config.data), extractor, lpips, ranks, settings.data is None)
        while _round(watcher, every):
            pass
    watcher.say(f"{run} is finished and measured; checkpoints passed over: {len(watcher.passed_over)}")


def _round(watcher: Watcher, every: float) -> bool:
    """Measure the newest checkpoint that no other watcher measures, or wait. False when the run is finished and none is
    left. The first process decides."""
    first = watcher.ranks.rank == 0
    finished = (watcher.run / "FINISHED").exists()  # Before looking for checkpoints: no more come after it.
    left = watcher.left() if first else []
    for folder in left:
        with claimed(watcher.run, int(folder.name)) as mine:
            # Another may have been done with it between the look and the claim.
            if mine and folder in watcher.left():
                _agreed(str(folder), watcher.ranks)
                watcher.measure(folder)
                return True
    word = _agreed("end" if first and finished and not left else "wait", watcher.ranks)
    if word not in ("end", "wait"):
        watcher.measure(Path(word))
        return True
    if word == "wait":
        time.sleep(min(every, 1.0) if left else every)  # What others are at comes free when they die.
    return word == "wait"


def _agreed(word: str, ranks: Ranks) -> str:
    """The first process's word."""
    agreed: str = on_first(ranks.rank, ranks.world, lambda: word)
    return agreed

"""One run in this process, and what happens between its steps: ticks, sample grids, evaluations, checkpoints, stops."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor

from hrgan import checkpoint
from hrgan.checkpoint import Progress, Saved
from hrgan.checkup import SIGNS, Checkup
from hrgan.config import Config
from hrgan.data import stream
from hrgan.data.dataset import Dataset
from hrgan.engine import PARTS, Engine, State
from hrgan.errors import DataError, Diverged, Stopped, UserError
from hrgan.metrics.evaluation import Evaluated, evaluated, save_neighbours
from hrgan.metrics.extractor import Extractor
from hrgan.metrics.features import Ranks
from hrgan.metrics.rows import Row, describe
from hrgan.metrics.source import reference
from hrgan.monitor.health import unsaid, warnings
from hrgan.monitor.log import RunLog, eta, read_rows, summary
from hrgan.monitor.meter import Meter
from hrgan.networks import multiplications
from hrgan.noise import latents
from hrgan.pictures import grid_side, save_png, side_by_side, tile, to_array, to_float, to_uint8
from hrgan.schedule import Due, Phase, Schedule, rates, what_is_due
from hrgan.sizes import size_text
from hrgan.watch import Watch, beat

LOOK_SECONDS = 2.0
"""Between two looks for a reason to stop, where a step is shorter."""


STOP_FILE = "a STOP file"
"""As a reason to stop."""


class TooDear(Exception):
    """An evaluation that would take more time than eval.max_share leaves: it is left out."""

    def __init__(self, seconds: float) -> None:
        """seconds: what it would take."""
        super().__init__(seconds)
        self.seconds = seconds


@dataclass
class Budget:
    """The time that an evaluation may take, and what it has taken."""

    allowed: float
    """Seconds."""
    began: float | None = None
    """When the first round was done: that one also warms up."""
    share: float = 0.0
    """What of the evaluation was done then."""

    def expected(self, share: float) -> float:
        """Seconds that all of it will take, by what `share` of it took; 0 as long as nothing is known."""
        now = time.perf_counter()
        if share > 0 and self.began is None:
            self.began, self.share = now, share
        if self.began is None or share <= self.share:
            return 0.0
        return (now - self.began) / (share - self.share)


@dataclass
class Run:
    """One run in this process."""

    config: Config
    folder: Path
    engine: Engine
    schedule: Schedule
    dataset: Dataset
    extractor: Extractor
    lpips: bool
    """Whether eval.metrics' ppl has LPIPS."""
    log: RunLog | None
    """On the main process only."""
    progress: Progress
    meter: Meter
    bad: stream.BadSamples = field(default_factory=stream.BadSamples)
    speeds: dict[int, float] = field(default_factory=dict)
    """Seconds per image at each resolution, as last measured."""
    failure: DataError | None = None
    """Why this process cannot read on; raised on all processes at the next tick, before anything is saved."""
    bad_since_tick: int = 0
    """Samples that this process replaced since the last tick."""
    watch: Watch | None = None
    warned_of_waiting: int | None = None
    """The phase in which waiting for data was last warned of."""
    ticks: int = 0
    """Since the phase began: in the first one the loader starts."""
    checkup: Checkup | None = None
    """Signs of health, measured on the main process; None where nobody wants them."""
    budget: Budget | None = None
    """Of the evaluation that is being made; None where its time does not matter."""
    look_every: int = 1
    """Steps between two looks for a reason to stop, so that looking costs next to nothing."""

    def __post_init__(self) -> None:
        self.cost = cache(partial(multiplications, self.config))  # Counting an r3-1024's takes tenths of a second.

    def stop_reason(self) -> str | None:
        """Why to stop, agreed on by all processes, or None. All processes must call it."""
        reason = self.watch.reason() if self.watch else None
        if reason is None and self.engine.rank == 0 and (self.folder / "STOP").exists():
            reason = STOP_FILE
        return self.engine.agree(reason)

    def pause(self, share: float) -> None:
        """Between two rounds of an evaluation, of which `share` is done: raises Stopped on all processes where one has
        a reason, and TooDear where it would take more time than is left for it."""
        beat()
        reason = self.stop_reason()
        if reason is not None:
            raise Stopped(reason)
        expected = self.budget.expected(share) if self.budget is not None else 0.0
        if self.budget is not None and self.engine.any(expected > self.budget.allowed):
            raise TooDear(expected)

    def next_images(self, reals: Iterator[stream.Batch], phase: Phase) -> tuple[Tensor, Tensor]:
        """This process's next (n, C, H, W) reals as stored and their labels; black ones after a failure, so that no
        other process waits for ever."""
        if self.failure is None:
            try:
                batch = next(reals)
                self.note_bad(batch)
                return batch.images, batch.labels
            except DataError as error:
                self.failure = error
        shape = (self.config.network.channels, *self.dataset.form.size(phase.resolution))
        kind = torch.uint16 if self.config.network.bits == 16 else torch.uint8
        count = phase.batch // self.engine.world
        return torch.zeros(count, *shape, dtype=kind), torch.zeros(count, dtype=torch.int64)

    def note_bad(self, batch: stream.Batch) -> None:
        """Count replaced samples; the first ten of each process are named at once, then one in a thousand."""
        for line in batch.bad:
            if self.bad.bad < 10 or self.bad.bad % 1000 == 0:
                print(f"replaced: {line}", file=sys.stderr, flush=True)
        self.bad.add(batch)
        self.bad_since_tick += len(batch.bad)

    def say(self, line: str) -> None:
        """One line from the main process."""
        if self.log is not None:
            self.log.say(line)


def at_lr(phase: Phase, scale: float) -> Phase:
    """The phase with its learning rates multiplied, as rollbacks ask for."""
    return replace(phase, lr_g=phase.lr_g * scale, lr_d=phase.lr_d * scale)


def between_steps(run: Run, phase: Phase, nimg: int, due: Due, stop: str | None) -> None:
    """Tick, sample grid, evaluation and checkpoint, in this order. With a reason to stop, which may come during the
    evaluation too: save, and raise Stopped. An evaluation that was left out is made on the way on."""
    end_tick(run, phase, nimg, hurried=stop is not None)
    if due.samples:
        run.engine.on_main(lambda: save_samples(run, phase, nimg))
    measured = False
    if due.evaluate and stop is None:
        try:
            measure(run, phase, nimg, last=due.finish)
            measured = True
        except Stopped as stopped:
            stop = str(stopped)
    if due.save or stop:
        save(run)
        stop = stop or run.stop_reason()  # Else one that came during the save would cost a second one.
    if stop and not (due.finish and measured):
        stop_here(run, stop)


def stop_here(run: Run, reason: str) -> NoReturn:
    """Leave with everything saved. STOP says why, as a job that ran this must know whether to run it again; one that a
    person made stays as it is."""

    def mark() -> None:
        with (run.folder / "STOP").open("a") as file:
            file.write("" if reason.startswith(STOP_FILE) else f"{reason}\n")

    run.engine.on_main(mark)
    place = f"stopped at {run.progress.nimg / 1000:g} kimg with everything saved in {run.folder}"
    raise Stopped(f"{place} ({reason}); the same command goes on")


def end_tick(run: Run, phase: Phase, nimg: int, *, hurried: bool = False) -> None:
    """Count, check and log what happened since the last tick. Raises Diverged or DataError before anything is saved.
    hurried: leave out what would keep a stop waiting."""
    config, engine = run.config, run.engine
    row, bad_samples = run.meter.read(engine.mean), run.progress.bad_samples + count_bad(run)
    run.progress = replace(
        run.progress,
        nimg=nimg,
        seconds=run.progress.seconds + run.meter.seconds_since_read(),
        skipped_steps=run.progress.skipped_steps + row.pop("skipped"),
        bad_samples=bad_samples,
    )
    in_a_row = row.pop("skipped_in_a_row")
    engine.settle_ema()  # For all that comes between steps; after the tick's time was taken.
    waits = engine.gather(row["data_wait"])
    warn_of_waiting(run, phase, waits)
    seconds = engine.mean(torch.tensor([row["sec_per_kimg"] * phase.batch / 1000], device=engine.device)).item()
    run.look_every = max(1, int(LOOK_SECONDS / seconds)) if seconds > 0 else 1
    if row["img_per_sec"] > 0:
        run.speeds[phase.resolution] = 1 / row["img_per_sec"]
    signs = engine.on_main(lambda: signs_of_health(run, phase, nimg, hurried))
    if run.log is not None:
        memory = torch.cuda.max_memory_allocated(engine.device) / 2**30 if engine.device.type == "cuda" else 0.0
        row = {
            "nimg": nimg,
            "kimg": nimg / 1000,
            "step": run.schedule.step(nimg - phase.batch) + 1,
            "phase": phase.index,
            "resolution": phase.resolution,
            "fading": phase.fading,
            "alpha": phase.alpha(nimg),
            "batch": phase.batch,
            **settings(run, phase, nimg),
            **row,
            **signs,
            "gpu_mem_gb": memory,
            "cpu_mem_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "seconds": run.progress.seconds,
            "skipped_steps": run.progress.skipped_steps,
            "bad_samples": run.progress.bad_samples,
            "rollbacks": run.progress.rollbacks,
            "data_wait_ranks": [round(wait, 4) for wait in waits],
        }
        row |= warn_of_sickness(run, run.log, row)
        left = eta(run.schedule, phase, nimg, run.speeds, run.cost)
        run.log.tick(row, phase.fading, config.schedule.total_kimg, left)
    if in_a_row > config.optim.max_skipped:
        raise Diverged(
            f"{in_a_row} steps in a row had non-finite losses or gradients (limit optim.max_skipped "
            f"{config.optim.max_skipped}) before "
            f"{nimg / 1000:g} kimg; checkpoints are untouched: go on with --optim.on_divergence rollback, or start "
            "another --run with a lower optim.lr or in float32",
            since=nimg - in_a_row * phase.batch,
        )


def settings(run: Run, phase: Phase, nimg: int) -> Row:
    """What decided the last step before `nimg`."""
    now = rates(run.config, phase, nimg - phase.batch)
    named = {key: getattr(now, key) for key in ("lr_g", "lr_d", "r1_gamma", "r2_gamma", "beta2", "ema_kimg")}
    strength = run.engine.feedback["augment_strength"].item() if run.config.augment.ops else 0.0
    return named | {"augment_strength": strength}


def signs_of_health(run: Run, phase: Phase, nimg: int, hurried: bool) -> Row:
    """A value for each of SIGNS, None where log.max_share leaves no time for them. On one process."""
    if run.checkup is None or not run.checkup.affordable(run.progress.seconds, hurried):
        return dict.fromkeys(SIGNS)
    return run.checkup.measure(run.engine, phase, nimg)


def warn_of_sickness(run: Run, log: RunLog, row: Row) -> Row:
    """Say what was not said in this phase yet. `warnings`: the names, if there are any."""
    said = {(before["phase"], name) for before in log.rows for name in before.get("warnings", ())}
    new = unsaid(warnings(log.rows, row, run.config.loss.kind), row["phase"], said)
    for warning in new:
        run.say(f"warning: {warning.name}: {warning.says}; {warning.remedy}")
    return {"warnings": [warning.name for warning in new]} if new else {}


WAITED_TOO_LONG = 0.1
"""Share of a tick in which a process waited for data that is worth a warning."""


def warn_of_waiting(run: Run, phase: Phase, waits: list[float]) -> None:
    """Name the process that waited longest for data, once a phase, with what can be done. waits: share of the tick, a
    number for each rank."""
    run.ticks += 1
    rank = max(range(len(waits)), key=waits.__getitem__)
    if waits[rank] <= WAITED_TOO_LONG or run.ticks < 2 or run.warned_of_waiting == phase.index:
        return
    run.warned_of_waiting = phase.index
    data, form = run.config.data, run.dataset.form
    remedies = [f"more --data.workers ({data.workers} a process now)"]
    if form.format == "png" and form.bits == 8:
        remedies.append("a set built with --format webp, which decodes faster")
    elif form.format == "webp":
        remedies.append("a set built with --format jpeg, which is smaller and decodes twice as fast, not lossless")
    if any(member.store.local_root is None for member in run.dataset.members):
        remedies.append("a --data.cache on a local disk that holds the whole tier")
    else:
        remedies.append("shards on a disk of this machine")
    run.say(
        f"warning: rank {rank} waited for data in {waits[rank]:.0%} of the last tick at "
        f"{size_text(run.config.network.grid, phase.resolution)}: {', '.join(remedies)}; "
        f"`hrgan bench data` shows where the time goes"
    )


def count_bad(run: Run) -> int:
    """Samples that all processes replaced since the last tick. DataError on all of them when any has had too many."""
    count = (
        run.engine.mean(torch.tensor([float(run.bad_since_tick)], device=run.engine.device)).item() * run.engine.world
    )
    run.bad_since_tick = 0
    try:
        run.bad.check(run.config.data.max_bad)
    except DataError as error:
        run.failure = run.failure or error
    if run.engine.any(run.failure is not None):
        raise run.failure or DataError("another process cannot read its shards; its line names what is wrong")
    return round(count)


def save_samples(run: Run, phase: Phase, nimg: int) -> None:
    """Generated images from fixed latents on the left, reals of the same resolution on the right. On one process."""
    side = grid_side(phase.resolution, run.config.log.grid)
    z = latents(0, side * side, run.config.network.latent, run.config.seed, "grid").to(run.engine.device)
    # A row for a class, over again where there are fewer classes than rows.
    classes = run.config.network.num_classes
    labels = torch.arange(side * side, device=z.device) // side % classes if classes else None
    alpha = phase.alpha(nimg)
    with torch.no_grad():
        parts = [
            run.engine.ema(z[i : i + 16], None if labels is None else labels[i : i + 16], alpha)
            for i in range(0, len(z), 16)
        ]
    fakes = torch.cat([to_uint8(part).cpu() for part in parts])
    wanted = min(side * side, run.dataset.num_samples)
    stored = stream.read_range(run.dataset, phase.resolution, 0, wanted)
    reals = torch.cat([to_uint8(to_float(batch.images, run.dataset.values)) for batch in stored])
    if not len(reals):
        raise DataError(f"{run.dataset.where}: none of its first {wanted} samples can be read")
    reals = reals[torch.arange(side * side) % len(reals)]  # A set smaller than the grid shows its pictures again.
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    picture = side_by_side(tile(fakes, side), tile(reals, side))
    save_png(to_array(picture), folder / f"{nimg / 1000:08.1f}kimg-{phase.resolution}px.png")


def measure(run: Run, phase: Phase, nimg: int, *, last: bool = False) -> None:
    """Evaluate the EMA, if eval.max_share leaves the time or it is the run's last evaluation. Stopped where a stop is
    asked for meanwhile."""
    beat(f"evaluating at {nimg / 1000:g} kimg")
    place, most = f"at {nimg / 1000:g} kimg", run.config.eval.max_share
    if not last and most < 1:
        left = (most * run.progress.seconds - run.progress.eval_seconds) / (1 - most)
        run.budget = Budget(max(run.engine.gather(left)))
    began = time.perf_counter()
    try:
        if run.budget is not None and run.engine.any(run.budget.allowed <= run.progress.eval_took):
            raise TooDear(run.progress.eval_took)
        found = evaluate(run, phase)
        took = expected = time.perf_counter() - began - found.reference_seconds
    except TooDear as error:
        assert run.budget is not None
        took, expected = time.perf_counter() - (run.budget.began or time.perf_counter()), error.seconds
        about = f"it would take about {error.seconds:.1f} s, and " if error.seconds else ""
        run.say(
            f"evaluation {place} left out: {about}eval.max_share {most:g} leaves {max(run.budget.allowed, 0):.1f} s of "
            f"{run.progress.seconds:.0f} s so far; {run.progress.eval_seconds:.0f} s of them went into evaluations"
        )
        found = Evaluated([], None, None, 0.0)
    finally:
        run.budget = None
    run.progress = replace(run.progress, eval_seconds=run.progress.eval_seconds + took, eval_took=expected)
    if run.log is None:
        return
    if found.problem is not None:
        run.say(f"warning: evaluation {place}: {found.problem}")
    for row in found.rows:
        run.log.metric({"nimg": nimg, **row})
        run.say(f"{describe(row, run.config.network.grid)} {place}, {row['seconds']:.1f} s")
    if found.neighbours is not None:
        save_neighbours(found.neighbours, run.folder, nimg, phase.resolution)


def evaluate(run: Run, phase: Phase) -> Evaluated:
    """The rows of an evaluation of the EMA at this moment. On the main process; others find none."""
    engine, config = run.engine, run.config
    return evaluated(
        config,
        engine.ema,
        phase.alpha(run.progress.nimg),
        reference(config, run.dataset, phase.resolution),
        run.extractor,
        run.lpips,
        Ranks(engine.rank, engine.world),
        [run.dataset.stats_folder(), run.folder / "stats"],
        run.pause,
        meet=lambda: engine.on_main(lambda: None),  # There no time runs out for those who wait.
    )


def save(run: Run) -> None:
    """Write the checkpoint of this moment, point `best` at the best, and prune."""
    beat(f"saving at {run.progress.nimg / 1000:g} kimg")
    state, progress, config = run.engine.state(), run.progress, run.config
    run.engine.check_same(state)

    def write() -> None:
        checkpoint.save(run.folder, state, progress, config, run.dataset.real_set)
        settle(run)

    run.engine.on_main(write)


def settle(run: Run) -> None:
    """What follows once a checkpoint is in place: `latest` and `best` name theirs, old ones go. On one process.

    Also when a run goes on, because a kill may have come between; a finished run would keep an old `latest` for ever.
    """
    progress, limits = run.progress, run.config.checkpoint
    checkpoint.point(run.folder, "latest", progress.nimg)
    checkpoint.prune(run.folder, progress.nimg, limits.keep, limits.keep_every_kimg)


def finish(run: Run) -> None:
    """Mark the run as finished and say what came out."""
    run.engine.on_main(lambda: (run.folder / "FINISHED").write_text(f"{run.progress.nimg}\n"))
    for line in summary(run.folder, run.config.network.grid):
        run.say(line)


# Going on


def load_everywhere(engine: Engine, folder: Path, parts: tuple[str, ...] = PARTS) -> Saved:
    """The checkpoint, or some of its files, on each process. UserError on all where one cannot read it."""
    saved, problem = None, None
    try:
        saved = checkpoint.load(folder, parts)
    except (OSError, SafetensorError) as error:
        problem = f"{folder} cannot be read ({error}); the disk must be shared by all machines"
    problem = engine.agree(problem)
    if saved is None or problem is not None:
        raise UserError(problem or "")
    return saved


def owes_evaluation(run: Run) -> bool:
    """Whether the run was stopped after the step that an evaluation was due at, and before it was made."""
    nimg = run.progress.nimg
    if nimg == 0:
        return False
    phase = run.schedule.at(nimg - 1)
    due = what_is_due(run.config, run.schedule, phase, nimg - phase.batch, nimg)
    rows = run.engine.on_main(lambda: read_rows(run.folder / "metrics.jsonl"))
    return due.evaluate and not any(row["nimg"] == nimg and run.extractor.called("fd") in row for row in rows)


def make_up_evaluation(run: Run, state: State) -> State:
    """Evaluate in the phase that the checkpoint ends, and save what it says."""
    nimg = run.progress.nimg
    phase = run.schedule.at(nimg - 1)
    run.engine.enter(at_lr(phase, run.progress.lr_scale), state)
    run.engine.settle_ema()
    try:
        measure(run, phase, nimg, last=nimg >= run.schedule.nimg_total)
    except Stopped as stopped:
        stop_here(run, str(stopped))
    save(run)
    return run.engine.state()


def roll_back(run: Run, error: Diverged) -> State:
    """Go back to the newest checkpoint from before the trouble began, with lower learning rates. Raises the error again
    where the configuration does not ask for that, or it has been tried often enough."""
    config, rollbacks = run.config.optim, run.progress.rollbacks + 1
    if config.on_divergence == "stop":
        raise error
    if rollbacks > config.max_rollbacks:
        raise Diverged(f"{error} (after {config.max_rollbacks} rollbacks, optim.max_rollbacks)", error.since)
    start = run.engine.on_main(lambda: checkpoint.newest(run.folder, run.say, error.since))
    if start is None:
        raise Diverged(f"{error} (no checkpoint from before it is left to go back to)", error.since)
    saved = load_everywhere(run.engine, start)
    diverged_at, scale = run.progress.nimg, run.progress.lr_scale * config.rollback_lr
    run.progress = replace(
        saved.progress,
        rollbacks=rollbacks,
        lr_scale=scale,
        skipped_steps=run.progress.skipped_steps,
        seconds=run.progress.seconds,
        eval_seconds=run.progress.eval_seconds,
        eval_took=run.progress.eval_took,
    )
    run.say(
        f"diverged at {diverged_at / 1000:g} kimg: back to {run.progress.nimg / 1000:g} kimg with learning rates "
        f"x {scale:g} (rollback {rollbacks} of at most {config.max_rollbacks})"
    )

    def keep_the_lower_rates() -> None:
        # In this order a kill never leaves a checkpoint to go on from whose rows are gone.
        checkpoint.point(run.folder, "latest", run.progress.nimg)
        checkpoint.forget_after(run.folder, run.progress.nimg)
        # At once, so that a crash before the next checkpoint does not lose the lower rates.
        checkpoint.save(run.folder, saved.state, run.progress, run.config, run.dataset.real_set)

    run.engine.on_main(keep_the_lower_rates)
    if run.log is not None:
        run.log.go_back(run.progress.nimg)
    run.meter = Meter(run.engine.device)
    return saved.state

"""The training loop, read top to bottom: `train` sets a run up, `run_phases` is the loop, `d_step` and `g_step` are
the mathematics' order.

Everything is a function of (config, seed, nimg): nothing but tensors and nimg is carried from step to step.
"""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from hrgan import checkpoint, losses
from hrgan.checkpoint import Progress
from hrgan.config import CHUNK, Config, at, refuse, world_problems
from hrgan.data import manifest as shards
from hrgan.data import stream
from hrgan.data.manifest import Manifest
from hrgan.engine import Engine, State
from hrgan.errors import DataError, Diverged, Stopped, UserError
from hrgan.metrics.extractor import Extractor, make_extractor, settle_weights
from hrgan.metrics.frechet import evaluate
from hrgan.monitor.log import RunLog, eta, summary
from hrgan.monitor.meter import Meter
from hrgan.networks import full_precision
from hrgan.networks.layers import downsample, upsample
from hrgan.noise import draw, latents, local_rows, pixel_noise
from hrgan.pictures import grid_side, save_png, side_by_side, tile, to_float, to_uint8
from hrgan.rundir import check_shards, open_run
from hrgan.schedule import Due, Phase, Schedule, make_schedule, what_is_due

# Steps


@dataclass(frozen=True)
class Micro:
    """What one process puts through the networks at once. n is a multiple of 4."""

    real: Tensor
    """(n, C, R, R) float32 in [-1, 1], cross-faded like the fakes."""
    z_d: Tensor
    """(n, latent) for D's fakes."""
    z_g: Tensor
    """(n, latent) for G's step."""
    mix: Tensor
    """(n, 1, 1, 1) in [0, 1) for the penalty's points between real and fake."""
    chunks: list[int]
    """Number in the run of each four images."""


def d_step(engine: Engine, config: Config, phase: Phase, micros: list[Micro], alpha: float, weight: float) -> Tensor:
    """One update of D. `weight` multiplies the penalty (0 leaves it out). Returns loss, logit_real, logit_fake,
    penalty, skipped: (5,) float32."""
    net, sums = engine.discriminator, torch.zeros(4, device=engine.device)
    for micro in micros:
        with torch.no_grad():
            fake = engine.generator.module(micro.z_d, None, alpha)
        with engine.micro_step(net, last=micro is micros[-1]):
            real_logits, fake_logits = net.wrapped(torch.cat([micro.real, fake]), None, alpha).chunk(2)
            loss = adversarial_d(config, real_logits, fake_logits)
            penalty = penalise(engine, config, phase, micro, fake, alpha) if weight else torch.zeros_like(loss)
            engine.backward(net, (loss + weight * penalty) / len(micros))
        sums += torch.stack([loss + weight * penalty, real_logits.mean(), fake_logits.mean(), penalty]).detach() / len(
            micros
        )
    return torch.cat([sums, engine.update(net, sums[0]).view(1)])


def g_step(engine: Engine, config: Config, micros: list[Micro], alpha: float) -> Tensor:
    """One update of G through the frozen D. Returns loss, skipped: (2,) float32."""
    net, critic, total = (
        engine.generator,
        engine.discriminator.module.requires_grad_(False),
        torch.zeros((), device=engine.device),
    )
    for micro in micros:
        with engine.micro_step(net, last=micro is micros[-1]):
            logits = critic(net.wrapped(micro.z_g, None, alpha), None, alpha)
            loss = losses.wasserstein_g(logits) if config.loss.kind == "wgan-gp" else losses.logistic_g(logits)
            engine.backward(net, loss / len(micros))
        total += loss.detach() / len(micros)
    critic.requires_grad_(True)
    return torch.stack([total, engine.update(net, total)])


def adversarial_d(config: Config, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss without its penalty."""
    if config.loss.kind == "wgan-gp":
        return losses.wasserstein_d(real_logits, fake_logits, config.loss.drift)
    return losses.logistic_d(real_logits, fake_logits)


def penalise(engine: Engine, config: Config, phase: Phase, micro: Micro, fake: Tensor, alpha: float) -> Tensor:
    """The configured penalty through the bare D (see engine.py)."""
    module, loss, scale = engine.discriminator.module, config.loss, engine.discriminator.adam.scale

    def critic(x: Tensor) -> Tensor:
        logits: Tensor = module(x, None, alpha)
        return logits

    if loss.kind == "wgan-gp":
        return losses.gradient_penalty(critic, micro.real, fake, micro.mix, loss.gp_lambda, loss.gp_target, scale)
    gamma = at(loss.r1_gamma, phase.resolution)
    if loss.penalty == "exact":
        return losses.r1_penalty(critic, micro.real, gamma, scale)
    noise = pixel_noise(micro.chunks, micro.real.shape[1:], micro.real.device, config.seed, "penalty")
    with full_precision(module):
        return losses.finite_difference_penalty(critic, micro.real, noise, loss.fd_sigma, gamma)


def penalty_weight(config: Config, step: int) -> float:
    """WGAN-GP: 1 in each step. R1: the interval in every interval-th step, else 0."""
    if config.loss.kind == "wgan-gp":
        return 1.0
    return float(config.loss.r1_every) if step % config.loss.r1_every == 0 else 0.0


def micro_size(config: Config, resolution: int, local: int) -> int:
    """Images at once: the largest multiple of 4 that divides this process's share, at most schedule.micro_batch."""
    limit = local if config.schedule.micro_batch is None else at(config.schedule.micro_batch, resolution)
    return max(size for size in range(4, local + 1, 4) if local % size == 0 and size <= max(4, limit))


def prepare_step(engine: Engine, config: Config, phase: Phase, nimg: int, images: Tensor) -> list[Micro]:
    """This process's reals (uint8, already its rows of the global batch) and noise, in micro-batches on the device."""
    rows = local_rows(nimg, phase.batch, engine.rank, engine.world)

    def noise(role: str, *shape: int) -> Tensor:
        sampler = torch.randn if role in ("z_d", "z_g") else torch.rand
        values = draw(sampler, (phase.batch, *shape), config.seed, role, nimg)[rows]
        # Only from pinned memory does a copy to the GPU not hold the host up.
        return (values.pin_memory() if engine.device.type == "cuda" else values).to(engine.device, non_blocking=True)

    real = to_float(images.to(engine.device, non_blocking=True))
    if config.data.mirror:
        real = torch.where(noise("mirror", 1, 1, 1) < 0.5, real.flip(3), real)
    if phase.fading:  # Reals fade as the generator's images do (Karras et al. 2018, appendix A).
        real = torch.lerp(upsample(downsample(real)), real, phase.alpha(nimg))
    length = config.network.latent
    inputs = (real, noise("z_d", length), noise("z_g", length), noise("mix", 1, 1, 1))
    size = micro_size(config, phase.resolution, len(rows))
    chunks = torch.split((nimg + rows[::CHUNK]) // CHUNK, size // CHUNK)
    parts = zip(*(torch.split(tensor, size) for tensor in inputs), chunks, strict=True)
    return [Micro(real, z_d, z_g, mix, numbers.tolist()) for real, z_d, z_g, mix, numbers in parts]


# The run


@dataclass
class Run:
    """One run in this process."""

    config: Config
    folder: Path
    engine: Engine
    schedule: Schedule
    manifest: Manifest
    extractor: Extractor
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
    stop_asked: bool = False

    def next_images(self, reals: Iterator[stream.Batch], phase: Phase) -> Tensor:
        """This process's next (n, C, R, R) uint8 reals; black ones after a failure, so that no other process waits
        for ever."""
        if self.failure is None:
            try:
                batch = next(reals)
                self.note_bad(batch)
                return batch.images
            except DataError as error:
                self.failure = error
        shape = (self.config.network.channels, phase.resolution, phase.resolution)
        return torch.zeros(phase.batch // self.engine.world, *shape, dtype=torch.uint8)

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


def train(config: Config, folder: Path) -> None:
    """Train, or go on where the run directory stands. Raises Stopped after saving on request; HrganError with one
    line for what is wrong."""
    schedule = make_schedule(config)
    engine = Engine(config)
    try:
        refuse(world_problems(config, engine.world), "config")
        if not config.data.path:
            raise UserError("data.path: empty; name the folder that `hrgan data build` wrote: --data.path FOLDER")
        manifest = shards.load(Path(config.data.path))
        check_shards(config, manifest, schedule)
        say = print if engine.rank == 0 else _silent
        weights = engine.on_main(lambda: settle_weights(config.eval, say))
        start = engine.on_main(lambda: open_run(folder, config, manifest, say))
        saved = checkpoint.load(start) if start is not None else None
        progress = saved.progress if saved else Progress()
        if progress.nimg >= schedule.nimg_total:
            say(f"{folder} is finished at {progress.nimg / 1000:g} kimg; raise schedule.total_kimg to go on")
            engine.on_main(lambda: (folder / "FINISHED").write_text(f"{progress.nimg}\n"))
            for line in summary(folder):
                say(line)
            return
        log = RunLog(folder, progress.nimg, config.log.tensorboard) if engine.rank == 0 else None
        try:
            extractor = make_extractor(weights, engine.device)
            run = Run(config, folder, engine, schedule, manifest, extractor, log, progress, Meter(engine.device))
            run.say(
                f"{'going on' if saved else 'starting'} at {progress.nimg / 1000:g} kimg in {folder}: "
                f"{manifest.num_samples:,} images, "
                f"{engine.world} x {engine.device.type} ({engine.name}), {config.precision}, {extractor.metric}"
            )
            with stop_on_signals(run):
                run_phases(run, saved.state if saved else None)
        finally:
            if log is not None:
                log.close()
    finally:
        engine.close()


def run_phases(run: Run, state: State | None) -> None:
    """The loop: phases, steps, and what is due between steps."""
    config, engine, schedule, meter = run.config, run.engine, run.schedule, run.meter
    nimg = run.progress.nimg
    while nimg < schedule.nimg_total:
        phase = schedule.at(nimg)
        engine.enter(phase, state)
        part = "fading in" if phase.fading else "stable"
        place = f"phase {phase.index + 1}/{len(schedule.phases)}"
        run.say(f"{place}: {phase.resolution}² {part}, batch {phase.batch}, to {phase.nimg_to / 1000:g} kimg")
        reals, unmoved = open_reals(config, engine, run.manifest, phase, nimg), engine.weights()
        meter.restart()
        while nimg < phase.nimg_to:
            # One step
            with meter.waiting():
                images = run.next_images(reals, phase)
            alpha, weight = phase.alpha(nimg), penalty_weight(config, phase.step(nimg))
            micros = prepare_step(engine, config, phase, nimg, images)
            d_values = d_step(engine, config, phase, micros, alpha, weight)
            g_values = g_step(engine, config, micros, alpha)
            engine.update_ema()
            meter.add(phase.batch, d_values, g_values, with_penalty=weight > 0)
            if unmoved:
                unmoved = check_moved(engine, unmoved, d_values, g_values)

            # What is due
            nimg, before = nimg + phase.batch, nimg
            due = what_is_due(config, schedule, phase, before, nimg)
            if due.tick:
                between_steps(run, phase, nimg, due)
                meter.restart()
        state = engine.state()
    engine.on_main(lambda: (run.folder / "FINISHED").write_text(f"{nimg}\n"))
    run.say(f"finished at {nimg / 1000:g} kimg in {run.folder}")
    for line in summary(run.folder):
        run.say(line)


def open_reals(config: Config, engine: Engine, manifest: Manifest, phase: Phase, nimg: int) -> Iterator[stream.Batch]:
    """This process's share of the endless batches from `nimg` on."""
    data = config.data
    return stream.batches(
        Path(data.path),
        manifest,
        phase.resolution,
        seed=config.seed,
        slots=data.slots,
        window=data.window,
        nimg=nimg,
        batch=phase.batch,
        rank=engine.rank,
        world=engine.world,
        workers=data.workers,
        prefetch=data.prefetch,
        pin_memory=engine.device.type == "cuda",
    )


def check_moved(
    engine: Engine, unmoved: dict[str, list[Tensor]], d_values: Tensor, g_values: Tensor
) -> dict[str, list[Tensor]]:
    """Fail if a step that was not skipped left a network as it was (a wrapper that trains nothing does so silently).
    What is left to check."""
    left, now = {}, engine.weights()
    for name, skipped in (("generator", g_values[-1]), ("discriminator", d_values[-1])):
        if name not in unmoved:
            continue
        if skipped:
            left[name] = unmoved[name]
        elif all(torch.equal(a, b) for a, b in zip(unmoved[name], now[name], strict=True)):
            raise RuntimeError(
                f"the {name} did not move in the first step of a phase: its optimizer does not hold its parameters"
            )
    return left


# Between steps


def between_steps(run: Run, phase: Phase, nimg: int, due: Due) -> None:
    """Tick, sample grid, evaluation and checkpoint, in this order. Raises Stopped, after saving, where a stop was
    asked for."""
    end_tick(run, phase, nimg)
    stop = run.engine.any(run.stop_asked or (run.engine.rank == 0 and (run.folder / "STOP").exists()))
    if due.samples:
        run.engine.on_main(lambda: save_samples(run, phase, nimg))
    if due.evaluate:
        measure(run, phase, nimg)
    if due.save or stop:
        save(run)
    if stop and not due.finish:
        run.engine.on_main((run.folder / "STOP").touch)
        place = f"stopped at {nimg / 1000:g} kimg with everything saved in {run.folder}"
        raise Stopped(f"{place}; the same command goes on")


def end_tick(run: Run, phase: Phase, nimg: int) -> None:
    """Count, check and log what happened since the last tick. Raises Diverged or DataError before anything is saved."""
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
    if row["img_per_sec"] > 0:
        run.speeds[phase.resolution] = 1 / row["img_per_sec"]
    if run.log is not None:
        memory = torch.cuda.max_memory_allocated(engine.device) / 2**30 if engine.device.type == "cuda" else 0.0
        row = {
            "nimg": nimg,
            "kimg": nimg / 1000,
            "step": run.schedule.step(nimg - phase.batch) + 1,
            "phase": phase.index,
            "resolution": phase.resolution,
            "alpha": phase.alpha(nimg),
            "batch": phase.batch,
            "lr_g": phase.lr_g,
            "lr_d": phase.lr_d,
            **row,
            "gpu_mem_gb": memory,
            "cpu_mem_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "seconds": run.progress.seconds,
            "skipped_steps": run.progress.skipped_steps,
            "bad_samples": run.progress.bad_samples,
        }
        run.log.tick(row, phase.fading, config.schedule.total_kimg, eta(run.schedule, phase, nimg, run.speeds))
    if in_a_row > config.optim.max_skipped:
        raise Diverged(
            f"{in_a_row} steps in a row had non-finite losses or gradients (limit optim.max_skipped "
            f"{config.optim.max_skipped}) before "
            f"{nimg / 1000:g} kimg; checkpoints are untouched: start another --run with a lower "
            "optim.lr or in float32"
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
    with torch.no_grad():
        fakes = torch.cat(
            [to_uint8(run.engine.ema(part, None, phase.alpha(nimg))).cpu() for part in torch.split(z, 16)]
        )
    wanted = min(side * side, run.manifest.num_samples)
    stored = stream.read_range(Path(run.config.data.path), run.manifest, phase.resolution, 0, wanted)
    reals = torch.cat([batch.images for batch in stored])
    if not len(reals):
        raise DataError(
            f"{run.config.data.path}: none of its first {wanted} samples at {phase.resolution}² can be read"
        )
    reals = reals[torch.arange(side * side) % len(reals)]  # A set smaller than the grid shows its pictures again.
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    picture = side_by_side(tile(fakes, side), tile(reals, side))
    save_png(picture, folder / f"{nimg / 1000:08.1f}kimg-{phase.resolution}px.png")


def measure(run: Run, phase: Phase, nimg: int) -> None:
    """Evaluate the EMA; remember it if it is the best of its kind."""
    config, engine = run.config, run.engine
    folders = [Path(config.data.path) / "stats", run.folder / "stats"]
    row = evaluate(
        config, run.manifest, engine.ema, phase.alpha(nimg), run.extractor, engine.rank, engine.world, folders
    )
    if run.log is None:
        return
    run.log.metric({"nimg": nimg, **row})
    value, name = row[run.extractor.metric], f"{run.extractor.metric} {run.extractor.sha256} {phase.resolution}"
    run.say(
        f"{run.extractor.metric} {value:.4f} at {nimg / 1000:g} kimg, {phase.resolution}² (floor "
        f"{row[run.extractor.metric + '_floor']:.4f}; "
        f"{row['num_fake']} fakes, {row['num_real']} reals, {row['seconds']:.1f} s)"
        if value is not None
        else f"{run.extractor.metric} cannot be computed at {nimg / 1000:g} kimg: generated images are not finite"
    )
    old = run.progress
    if isinstance(value, float) and (old.best_metric is None or old.best_name != name or value < old.best_metric):
        run.progress = replace(old, best_nimg=nimg, best_metric=value, best_name=name)


def save(run: Run) -> None:
    """Write the checkpoint of this moment, point `best` at the best, and prune."""
    state, progress, config = run.engine.state(), run.progress, run.config
    run.engine.check_same(state)

    def write() -> None:
        checkpoint.save(run.folder, state, progress, config, run.manifest.real_set)
        if progress.best_nimg == progress.nimg:
            checkpoint.point(run.folder, "best", progress.nimg)
        checkpoint.prune(
            run.folder, progress.nimg, config.checkpoint.keep, config.checkpoint.keep_every_kimg, progress.best_nimg
        )

    run.engine.on_main(write)


@contextmanager
def stop_on_signals(run: Run) -> Iterator[None]:
    """SIGTERM or Ctrl-C asks for a stop at the next tick; a second one ends at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        run.stop_asked = True
        signal.signal(number, before[signal.Signals(number)])
        sys.stderr.write(f"{signal.Signals(number).name}: saving at the next tick, once more to end at once\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silent(line: str) -> None:
    """What the other processes say."""

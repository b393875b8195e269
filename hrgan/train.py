"""The training loop, read top to bottom: `train` sets a run up, `run_phases` is the loop, `d_step` and `g_step` are
the mathematics' order.

Everything is a function of (config, seed, nimg): nothing but tensors and nimg is carried from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hrgan import losses
from hrgan.checkpoint import Progress
from hrgan.checks import world_problems
from hrgan.config import CHUNK, Config, at, refuse
from hrgan.data import stream
from hrgan.data.dataset import Dataset, open_dataset
from hrgan.engine import Engine, State
from hrgan.errors import Diverged, HrganError, UserError
from hrgan.metrics.evaluation import Side, refuse_too_few, side
from hrgan.metrics.extractor import Extractor, feature_size, make_extractor, other_weights, settle_weights
from hrgan.metrics.source import reference
from hrgan.monitor.log import RunLog
from hrgan.monitor.meter import Meter
from hrgan.networks import full_precision
from hrgan.networks.layers import downsample, upsample
from hrgan.noise import draw, local_rows, pixel_noise
from hrgan.pictures import to_float
from hrgan.run import (
    Run,
    at_lr,
    between_steps,
    finish,
    load_everywhere,
    make_up_evaluation,
    owes_evaluation,
    roll_back,
    settle,
)
from hrgan.rundir import check_shards, open_run, with_values
from hrgan.schedule import Phase, make_schedule, what_is_due
from hrgan.sizes import size_text
from hrgan.watch import Watch, beat, patience, stop_time

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


def stored_range(config: Config) -> tuple[int, int]:
    """The stored numbers that become -1 and 1."""
    low, high = config.data.values or (0, 2**config.network.bits - 1)
    return low, high


def prepare_step(engine: Engine, config: Config, phase: Phase, nimg: int, images: Tensor) -> list[Micro]:
    """This process's reals (as stored, its rows of the global batch) and noise, in micro-batches on the device."""
    rows = local_rows(nimg, phase.batch, engine.rank, engine.world)

    def noise(role: str, *shape: int) -> Tensor:
        sampler = torch.randn if role in ("z_d", "z_g") else torch.rand
        values = draw(sampler, (phase.batch, *shape), config.seed, role, nimg)[rows]
        # Only from pinned memory does a copy to the GPU not hold the host up.
        return (values.pin_memory() if engine.device.type == "cuda" else values).to(engine.device, non_blocking=True)

    real = to_float(images.to(engine.device, non_blocking=True), stored_range(config))
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


def train(config: Config, folder: Path) -> None:
    """Train, or go on where the run directory stands. Raises Stopped after saving on request; HrganError with one
    line for what is wrong."""
    schedule = make_schedule(config)
    engine = Engine(config)
    with watching(config, engine) as watch:
        refuse(world_problems(config, engine.world), "config")
        if not config.data.path:
            raise UserError("data.path: empty; name the folder or URL of a set of shards: --data.path SHARDS")
        dataset = open_dataset(config.data)
        check_shards(config, dataset, schedule)
        config = with_values(config, dataset)
        reals = reference(config, dataset, dataset.resolution)
        refuse_too_few(config.eval, Side("generated ones (eval.num_fake)", config.eval.num_fake), side(reals))
        say = print if engine.rank == 0 else _silent
        with patience("fetching the extractor's weights"):
            settled = engine.on_main(lambda: settle_weights(config.eval, say))
        start = engine.on_main(lambda: open_run(folder, config, dataset, say))
        saved = load_everywhere(engine, start) if start is not None else None
        progress = saved.progress if saved else Progress()
        log = RunLog(folder, progress.nimg, config.log.tensorboard, config.network.grid) if engine.rank == 0 else None
        try:
            extractor = make_extractor(settled, engine.device)
            agree_on_extractor(engine, extractor, {dataset.form.size(phase.resolution) for phase in schedule.phases})
            meter = Meter(engine.device)
            run = Run(
                config, folder, engine, schedule, dataset, extractor, settled.lpips, log, progress, meter, watch=watch
            )
            if saved is not None:
                engine.on_main(lambda: settle(run))
            if progress.nimg >= schedule.nimg_total and not owes_evaluation(run):
                run.say(f"{folder} is finished at {progress.nimg / 1000:g} kimg; raise schedule.total_kimg to go on")
                finish(run)
                return
            run.say(
                f"{'going on' if saved else 'starting'} at {progress.nimg / 1000:g} kimg in {folder}: "
                f"{dataset.num_samples:,} images, "
                f"{engine.world} x {engine.device.type} ({engine.name}), {config.precision}, {extractor.called('fd')}"
            )
            run_phases(run, saved.state if saved else None)
        finally:
            if log is not None:
                log.close()


def agree_on_extractor(engine: Engine, extractor: Extractor, sizes: set[tuple[int, int]]) -> None:
    """At launch: all processes have the same one, and it takes pictures of each size that will come."""
    problem = engine.agree(other_weights(extractor, engine.on_main(lambda: extractor.sha256)))
    if problem is not None:
        raise UserError(problem)
    for size in sorted(sizes):
        feature_size(extractor, size)


def run_phases(run: Run, state: State | None) -> None:
    """Phase after phase, and back to a checkpoint where training diverges and the configuration says so."""
    if state is not None and owes_evaluation(run):
        state = make_up_evaluation(run, state)
    while run.progress.nimg < run.schedule.nimg_total:
        try:
            state = run_phase(run, at_lr(run.schedule.at(run.progress.nimg), run.progress.lr_scale), state)
        except Diverged as error:
            state = roll_back(run, error)
    run.say(f"finished at {run.progress.nimg / 1000:g} kimg in {run.folder}")
    finish(run)


def run_phase(run: Run, phase: Phase, state: State | None) -> State:
    """The loop: steps, and what is due between steps. The tensors at the phase's end."""
    config, engine, schedule, meter = run.config, run.engine, run.schedule, run.meter
    nimg = run.progress.nimg
    beat(f"step {schedule.step(nimg)}, building {size_text(config.network.grid, phase.resolution)}", nimg)
    engine.enter(phase, state)
    part = "fading in" if phase.fading else "stable"
    place = f"phase {phase.index + 1}/{len(schedule.phases)}"
    size = size_text(config.network.grid, phase.resolution)
    run.say(f"{place}: {size} {part}, batch {phase.batch}, to {phase.nimg_to / 1000:g} kimg")
    reals, unmoved = open_reals(config, engine, run.dataset, phase, nimg), engine.weights()
    meter.restart()
    run.look_every, run.ticks = 1, 0
    while nimg < phase.nimg_to:
        # One step
        step = schedule.step(nimg)
        beat(f"step {step}, reading data", nimg)
        with meter.waiting():
            images = run.next_images(reals, phase)
        beat(f"step {step}", nimg + 0.5)
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
        stop = run.stop_reason() if due.tick or phase.step(nimg) % run.look_every == 0 else None
        if due.tick or stop:
            between_steps(run, phase, nimg, due, stop)
            meter.restart()
    return engine.state()


@contextmanager
def watching(config: Config, engine: Engine) -> Iterator[Watch]:
    """Signals, time limits and hangs are watched in here; the processes part at the end. An error that comes from
    another process's death names that process."""
    limits = config.limits
    stop_at = stop_time(limits.hours, limits.margin_minutes)
    watch = Watch(engine.rank, engine.world, limits.timeout_minutes * 60, stop_at, engine.store)
    watch.start()
    try:
        yield watch
    except HrganError:
        raise
    except Exception as error:
        lost = watch.lost()
        if not lost:
            raise
        raise HrganError(
            f"rank {engine.rank} ends, because it has lost {lost} ({str(error).splitlines()[0]})"
        ) from error
    finally:
        try:
            engine.close()  # Can hang where a collective was broken off.
        finally:
            watch.stop()


def open_reals(config: Config, engine: Engine, dataset: Dataset, phase: Phase, nimg: int) -> Iterator[stream.Batch]:
    """This process's share of the endless batches from `nimg` on."""
    data = config.data
    return stream.batches(
        dataset,
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
        fleeting=True,  # prepare_step turns them into floats of their own.
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


def _silent(line: str) -> None:
    """What the other processes say."""

"""The training loop, read top to bottom: `train` sets a run up, `run_phases` is the loop, `d_step` and `g_step` are
the mathematics' order.

Everything is a function of (config, seed, nimg): nothing but tensors and nimg is carried from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hrgan import augment, losses
from hrgan.adopt import NETWORKS, adopted, source_of
from hrgan.checkpoint import Progress
from hrgan.checks import cautions, world_problems
from hrgan.checkup import Checkup, faded, open_held_out
from hrgan.config import CHUNK, Config, at, refuse
from hrgan.data import stream
from hrgan.data.dataset import Dataset, open_dataset
from hrgan.engine import Engine, Net, State
from hrgan.errors import Diverged, HrganError, UserError
from hrgan.metrics.evaluation import Side, refuse_too_few, side
from hrgan.metrics.extractor import Extractor, feature_size, make_extractor, other_weights, settle_weights
from hrgan.metrics.source import reference
from hrgan.monitor.log import RunLog
from hrgan.monitor.meter import D_VALUES, G_VALUES, Meter
from hrgan.networks.derivatives import Kinks, same_kinks
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
from hrgan.rundir import begun_precision, check_shards, open_run, with_values
from hrgan.schedule import Phase, Rates, make_schedule, rates, what_is_due
from hrgan.sizes import size_text
from hrgan.watch import Watch, beat, patience, stop_time

# Steps


@dataclass(frozen=True)
class Micro:
    """What one process puts through the networks at once. n is a multiple of 4."""

    real: Tensor
    """(n, C, R, R) float32 in [-1, 1], cross-faded like the fakes."""
    labels: Tensor | None
    """(n,) int64, of the reals and for the fakes alike, so that both have the same classes; None without classes."""
    z_d: Tensor
    """(n, latent) for D's fakes."""
    z_g: Tensor
    """(n, latent) for G's step."""
    mix: Tensor
    """(n, 1, 1, 1) in [0, 1) for the penalty's points between real and fake."""
    path: Tensor | None
    """(n, C, R, R) from N(0, 1), where this step penalises path lengths."""
    twists: dict[str, Tensor]
    """(n, augment.LENGTH) in [0, 1) for each of TWISTS: how its pictures are augmented; {} without augmentation."""


IN_D = ("real in d", "fake in d")
TWISTS = (*IN_D, "real in g", "fake in g")
"""What pictures are augmented for, each use with numbers of its own."""


@dataclass(frozen=True)
class Now:
    """What a step's place in the run decides."""

    alpha: float
    """Weight of the new resolution in a fade."""
    rates: Rates
    penalty: float
    """What D's penalty is multiplied by in this step; 0 leaves it out."""
    path: float
    """The same of G's path-length penalty."""
    adapts: bool
    """Whether the strength of augmentation is adapted at the end of this step."""


def moment(config: Config, phase: Phase, nimg: int) -> Now:
    """Of the step that begins at `nimg`. Lazy penalties come in every so many steps, and count as many times."""
    values, step, loss = rates(config, phase, nimg), phase.step(nimg), config.loss
    if loss.kind == "wgan-gp":
        penalty = float(loss.gp_every) if step % loss.gp_every == 0 and loss.gp_lambda > 0 else 0.0
    else:
        penalty = float(loss.r1_every) if step % loss.r1_every == 0 and values.r1_gamma + values.r2_gamma > 0 else 0.0
    path = float(loss.path_every) if step % loss.path_every == 0 and loss.path_weight > 0 else 0.0
    adapts = config.augment.target is not None and nimg // phase.batch % ADAPT_EVERY == ADAPT_EVERY - 1
    return Now(phase.alpha(nimg), values, penalty, path, adapts)


ADAPT_EVERY = 4
"""Steps between two adaptations of augmentation (Karras et al. 2020, arXiv 2006.06676)."""


def d_step(engine: Engine, config: Config, micros: list[Micro], now: Now) -> Tensor:
    """One update of D. Returns meter.D_VALUES: (8,) float32."""
    net, sums = engine.discriminator, torch.zeros(len(D_VALUES) - 2, device=engine.device)
    with_slopes = takes_slopes(engine, config, now)
    differs = now.penalty and config.loss.penalty == "finite_difference" and config.loss.kind != "wgan-gp"
    for micro in micros:
        kinks: Sides = ([], []) if differs else (None, None)
        with torch.no_grad():
            made = engine.generator.module(micro.z_d, micro.labels, now.alpha)
        plain = micro.real.detach().requires_grad_(with_slopes[0]), made.requires_grad_(with_slopes[1])
        real, fake = (twisted(engine, config, x, micro, use) for use, x in zip(IN_D, plain, strict=True))
        with engine.micro_step(net, last=micro is micros[-1]):
            real_out, fake_out = judged(config, net, real, fake, micro.labels, now.alpha, kinks)
            real_logits, fake_logits = real_out[:, :1], fake_out[:, :1]
            loss = losses.adversarial_d(config.loss.kind, real_logits, fake_logits, config.loss.drift)
            loss = loss + classified(config, real_out, micro) + classified(config, fake_out, micro)
            penalty = torch.zeros_like(loss)
            if now.penalty:
                with uncompiled(config):
                    penalty = penalise(engine, config, micro, plain, (real_logits, fake_logits), kinks, now)
                loss = loss + now.penalty * penalty
            engine.backward(net, loss / len(micros))
        told = signs(config.loss.kind, real_logits, fake_logits)
        sums += torch.stack([loss, real_logits.mean(), fake_logits.mean(), penalty, *told]).detach() / len(micros)
    skipped = engine.update(net, sums[0])
    return torch.cat([sums, torch.stack([net.adam.norm, skipped])])


def g_step(engine: Engine, config: Config, micros: list[Micro], now: Now) -> Tensor:
    """One update of G through the frozen D. Returns meter.G_VALUES: (4,) float32."""
    net, sums = engine.generator, torch.zeros(len(G_VALUES) - 2, device=engine.device)
    critic = engine.discriminator.module.requires_grad_(False)
    for micro in micros:
        with engine.micro_step(net, last=micro is micros[-1]):
            fake = net.wrapped(micro.z_g, micro.labels, now.alpha)
            out = critic(twisted(engine, config, fake, micro, "fake in g"), micro.labels, now.alpha)
            real_logits = None
            if config.loss.kind == "relativistic":
                with torch.no_grad():
                    real = twisted(engine, config, micro.real, micro, "real in g")
                    real_logits = critic(real, micro.labels, now.alpha)[:, :1]
            loss = losses.adversarial_g(config.loss.kind, real_logits, out[:, :1]) + classified(config, out, micro)
            lengths = torch.zeros_like(loss)
            if now.path:
                lengths = path_lengths(engine, micro, now.alpha)
                penalty = losses.path_penalty(lengths, engine.feedback["path_mean"])
                loss = loss + now.path * config.loss.path_weight * penalty
            engine.backward(net, loss / len(micros))
        sums += torch.stack([loss, lengths.mean()]).detach() / len(micros)
    critic.requires_grad_(True)
    skipped = engine.update(net, sums[0])
    return torch.cat([sums, torch.stack([net.adam.norm, skipped])])


Sides = tuple[Kinks | None, Kinks | None]
"""Of the passes of D over reals and over fakes, where a penalty by finite differences needs them."""


def judged(
    config: Config, net: Net, real: Tensor, fake: Tensor, labels: Tensor | None, alpha: float, kinks: Sides
) -> tuple[Tensor, Tensor]:
    """What D says of reals and fakes: in one call, where its family allows and neither its slope nor its kinks at them
    are asked for."""
    alone = real.requires_grad or fake.requires_grad or kinks != (None, None)
    if alone or net.module.batch_statistics:
        with uncompiled(config) if alone else nullcontext():
            with same_kinks(kinks[0]):
                real_out = net.wrapped(real, labels, alpha)
            with same_kinks(kinks[1]):
                fake_out = net.wrapped(fake, labels, alpha)
            return real_out, fake_out
    both = None if labels is None else torch.cat([labels, labels])
    real_out, fake_out = net.wrapped(torch.cat([real, fake]), both, alpha).chunk(2)
    return real_out, fake_out


def uncompiled(config: Config) -> AbstractContextManager[None]:
    """For what is differentiated by the pictures, too: a compiled network goes backwards but once."""
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


def signs(kind: str, real: Tensor, fake: Tensor) -> Pair:
    """The mean signs of D's logits, which a number that is none leaves alone; of their differences, pair by pair, for
    the relativistic loss, whose D has no zero."""
    if kind == "relativistic":
        real, fake = real - fake, fake - real
    return real.sign().nan_to_num().mean(), fake.sign().nan_to_num().mean()


def classified(config: Config, out: Tensor, micro: Micro) -> Tensor:
    """The auxiliary classifier's loss; 0 without one."""
    if config.network.condition != "acgan" or micro.labels is None:
        return out.new_zeros(())
    return config.loss.class_weight * losses.class_loss(out[:, 1:], micro.labels)


def twisted(engine: Engine, config: Config, images: Tensor, micro: Micro, use: str) -> Tensor:
    """Pictures as D gets them: augmented, as the numbers for their use, one of TWISTS, say."""
    if not micro.twists:
        return images
    strength = engine.feedback["augment_strength"]
    return augment.augment(images, micro.twists[use], strength, augment.expanded(config.augment.ops))


Pair = tuple[Tensor, Tensor]
"""Of reals and of fakes."""


def takes_slopes(engine: Engine, config: Config, now: Now) -> tuple[bool, bool]:
    """Whether this step's penalty takes the slopes, at reals and at fakes, of the adversarial term's own logits."""
    if not now.penalty or config.loss.kind == "wgan-gp" or engine.zero_stage == 3:
        return False, False
    return now.rates.r1_gamma > 0, now.rates.r2_gamma > 0


def penalise(
    engine: Engine, config: Config, micro: Micro, images: Pair, logits: Pair, kinks: Sides, now: Now
) -> Tensor:
    """The configured penalty at the pictures before they are augmented: D's slope through the augmentation, as in
    R3GAN and StyleGAN2-ADA. logits, kinks: what D said of them, and how. Where D is asked again, it is the bare one
    (see engine.py)."""
    module, loss, scale = engine.discriminator.module, config.loss, engine.discriminator.adam.scale

    def critic(x: Tensor, around: Kinks | None, use: str) -> Tensor:
        with same_kinks(around):
            of_x: Tensor = module(twisted(engine, config, x, micro, use), micro.labels, now.alpha)[:, :1]
        return of_x

    def penalised(penalty: losses.Penalty, x: Tensor, of_x: Tensor, around: Kinks | None, use: str) -> Tensor:
        if loss.penalty == "exact":
            return losses.exact_penalty(penalty, of_x, x, scale)
        of_pictures = partial(critic, around=around, use=use)
        # All step equally far where they share a batch's statistics. Elsewhere each its own way: the rounding of a
        # micro-batch then does not hang on which others there are.
        shared = {"mean": engine.mean} if module.batch_statistics else {}
        return losses.finite_difference_penalty(penalty, of_pictures, x, of_x, loss.fd_sigma, scale, **shared)

    if loss.kind == "wgan-gp":
        x = torch.lerp(*images, micro.mix).detach().requires_grad_(engine.zero_stage != 3)
        around = None if loss.penalty == "exact" else Kinks()
        to_target = partial(losses.gradient_penalty, weight=loss.gp_lambda, target=loss.gp_target)
        between = IN_D[0]  # Augmented as the reals are.
        return penalised(to_target, x, critic(x, around, between), around, between)
    total = images[0].new_zeros(())
    gammas = (now.rates.r1_gamma, now.rates.r2_gamma)
    for x, of_x, around, gamma, use in zip(images, logits, kinks, gammas, IN_D, strict=True):
        if gamma:
            total = total + penalised(partial(losses.r1_penalty, gamma=gamma), x, of_x, around, use)
    return total


def path_lengths(engine: Engine, micro: Micro, alpha: float) -> Tensor:
    """(n/2,) path lengths of half of the pictures, as in the paper, through the bare G (see engine.py): of two of each
    chunk, so that it is the same ones however the batch is divided."""

    def half(x: Tensor) -> Tensor:
        return x.view(-1, CHUNK, *x.shape[1:])[:, : CHUNK // 2].flatten(0, 1)

    module = engine.generator.module
    z, labels = half(micro.z_g), None if micro.labels is None else half(micro.labels)
    ws = module.mapped(z, labels)  # type: ignore[operator]  # style has it, and only style has such a penalty
    images = module.drawn(ws, z, alpha)  # type: ignore[operator]
    assert micro.path is not None
    return losses.path_lengths(images, ws, half(micro.path), engine.generator.adam.scale)


def feed_back(engine: Engine, config: Config, now: Now, d: Tensor, g: Tensor) -> None:
    """What a step changes for the steps after it: augmentation's strength and the mean path length. Both are training
    state. d, g: what d_step and g_step returned. Nothing is read back to the host."""
    state, settings = engine.feedback, config.augment
    if settings.ops and settings.target is not None:
        sign = engine.mean(d[D_VALUES.index("sign_real"), None])
        state["augment_signs"] += torch.cat([sign, torch.ones_like(sign)])
        if now.adapts:
            signs, steps = state["augment_signs"].unbind()
            strength, images = state["augment_strength"], ADAPT_EVERY * engine.phase.batch
            changed = (settings.target, images, settings.adapt_kimg, settings.most)
            strength.copy_(augment.adapted(strength, signs / steps, *changed))
            state["augment_signs"].zero_()
    if now.path:
        lengths = engine.mean(g[G_VALUES.index("path_length"), None])
        mean = torch.lerp(state["path_mean"], lengths, config.loss.path_decay)
        state["path_mean"].copy_(torch.where(mean.isfinite(), mean, state["path_mean"]))


def micro_size(config: Config, resolution: int, local: int) -> int:
    """Images at once: the largest multiple of 4 that divides this process's share, at most schedule.micro_batch."""
    limit = local if config.schedule.micro_batch is None else at(config.schedule.micro_batch, resolution)
    return max(size for size in range(4, local + 1, 4) if local % size == 0 and size <= max(4, limit))


def stored_range(config: Config) -> tuple[int, int]:
    """The stored numbers that become -1 and 1."""
    low, high = config.data.values or (0, 2**config.network.bits - 1)
    return low, high


def prepare_step(
    engine: Engine, config: Config, phase: Phase, nimg: int, images: Tensor, labels: Tensor | None = None
) -> list[Micro]:
    """This process's reals (as stored, its rows of the global batch), their labels and noise, in micro-batches on the
    device."""
    rows = local_rows(nimg, phase.batch, engine.rank, engine.world)

    def place(values: Tensor) -> Tensor:
        # Only from pinned memory does a copy to the GPU not hold the host up.
        return (values.pin_memory() if engine.device.type == "cuda" else values).to(engine.device, non_blocking=True)

    def noise(role: str, *shape: int) -> Tensor:
        sampler = torch.randn if role in ("z_d", "z_g") else torch.rand
        return place(draw(sampler, (phase.batch, *shape), config.seed, role, nimg)[rows])

    real = to_float(images.to(engine.device, non_blocking=True), stored_range(config))
    if config.data.mirror:
        real = torch.where(noise("mirror", 1, 1, 1) < 0.5, real.flip(3), real)
    if phase.fading:
        real = faded(engine.ema, real, phase.alpha(nimg))
    length = config.network.latent
    inputs = {"real": real, "z_d": noise("z_d", length), "z_g": noise("z_g", length), "mix": noise("mix", 1, 1, 1)}
    if config.network.num_classes and labels is not None:
        inputs["labels"] = place(labels)
    roles = TWISTS if config.augment.ops else ()
    inputs |= {role: noise(role, augment.LENGTH) for role in roles}
    if moment(config, phase, nimg).path > 0:
        chunks = ((nimg + rows[::CHUNK]) // CHUNK).tolist()
        inputs["path"] = pixel_noise(chunks, real.shape[1:], engine.device, config.seed, "path")
    size = micro_size(config, phase.resolution, len(rows))
    parts = {name: torch.split(tensor, size) for name, tensor in inputs.items()}
    return [
        Micro(
            real=parts["real"][index],
            labels=parts["labels"][index] if "labels" in parts else None,
            z_d=parts["z_d"][index],
            z_g=parts["z_g"][index],
            mix=parts["mix"][index],
            path=parts["path"][index] if "path" in parts else None,
            twists={role: parts[role][index] for role in roles},
        )
        for index in range(len(parts["real"]))
    ]


def one_step(
    engine: Engine, config: Config, phase: Phase, nimg: int, images: Tensor, labels: Tensor | None = None
) -> tuple[Now, Tensor, Tensor]:
    """One update of D, of G and of the EMA, for this process's reals. What decided it, and what it returned."""
    now = moment(config, phase, nimg)
    engine.set_rates(now.rates)
    if config.augment.target is None:
        engine.feedback["augment_strength"].fill_(now.rates.augment)
    micros = prepare_step(engine, config, phase, nimg, images, labels)
    d_values, g_values = engine.graphs.run(partial(device_step, engine, config), micros, now)
    return now, d_values, g_values


def device_step(engine: Engine, config: Config, micros: list[Micro], now: Now) -> tuple[Tensor, Tensor]:
    """All that a step does on the device, a function of tensors and `now` alone. What d_step and g_step return."""
    d_values = d_step(engine, config, micros, now)
    g_values = g_step(engine, config, micros, now)
    feed_back(engine, config, now, d_values, g_values)
    engine.update_ema(now.rates.ema_kimg)
    return d_values, g_values


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
        if config.precision == "auto":
            begun = engine.on_main(lambda: begun_precision(folder))
            config = replace(config, precision=begun or engine.best_precision)
        config = engine.config = with_values(config, dataset)
        held_out = open_held_out(config, dataset, schedule)
        reals = reference(config, dataset, dataset.resolution)
        made = Side("generated ones (eval.num_fake)", config.eval.num_fake, tuple(config.network.classes or ()))
        refuse_too_few(config.eval, made, side(reals))
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
                config, folder, engine, schedule, dataset, extractor, settled.lpips, log, progress, meter, watch=watch,
                checkup=Checkup(config, dataset, held_out, extractor, since=progress.seconds),
            )  # fmt: skip
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
            for line in cautions(config):
                run.say(f"warning: {line}")
            if config.precision == "bf16" and not engine.has_bf16:
                run.say("precision: bf16 is emulated here, several times as slowly as float32; begin a run with auto")
            if config.cuda_graphs and not engine.can_record:
                run.say("cuda_graphs: only on one GPU in one process; here each step is launched")
            state = saved.state if saved else None
            if state is None and config.init_from is not None:
                source = engine.on_main(lambda: source_of(config))
                state = adopted(config, schedule.phases[0], source, load_everywhere(engine, source, NETWORKS), run.say)
            run_phases(run, state)
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
            images, labels = run.next_images(reals, phase)
        beat(f"step {step}", nimg + 0.5)
        now, d_values, g_values = one_step(engine, config, phase, nimg, images, labels)
        meter.add(phase.batch, d_values, g_values, with_penalty=now.penalty > 0, with_path=now.path > 0)
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

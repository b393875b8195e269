"""nimg -> Phase, pure. Progressive growing as in Karras et al. 2018 (arXiv 1710.10196), section 2 and appendix A."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from hrgan.config import Config, at, resolutions
from hrgan.errors import UserError
from hrgan.sizes import size_text


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which only the fade's alpha and the ramps change."""

    index: int
    """Place in the run, from 0."""
    resolution: int
    """Width and height in pixels; in a fade the new one."""
    fading: bool
    """Whether the new resolution is being faded in."""
    kimg_from: float
    """Planned border in thousands of images."""
    kimg_to: float
    """Planned border in thousands of images, at most the run's total."""
    fade_kimg: float
    """Length of the whole fade in thousands of images, also where the total cuts it; 0 in a stable part."""
    nimg_from: int
    """Images seen when the first step begins: the first step border at or after kimg_from."""
    steps: int
    """Steps of each network."""
    batch: int
    """Images per step over all processes."""
    lr_g: float
    """Learning rate of the generator."""
    lr_d: float
    """Learning rate of the discriminator."""
    resets_adam: bool
    """Whether both Adams start anew when the phase begins."""

    @property
    def nimg_to(self) -> int:
        """Images seen after the last step."""
        return self.nimg_from + self.steps * self.batch

    def alpha(self, nimg: int) -> float:
        """Weight of the new resolution, linear from 0 to 1 over a fade; 1 outside."""
        if not self.fading:
            return 1.0
        return min(1.0, max(0.0, (nimg / 1000 - self.kimg_from) / self.fade_kimg))

    def step(self, nimg: int) -> int:
        """Number of the step within the phase, from 0."""
        return (nimg - self.nimg_from) // self.batch


@dataclass(frozen=True)
class Schedule:
    """All phases of a run, in order."""

    phases: tuple[Phase, ...]

    def at(self, nimg: int) -> Phase:
        """The phase that the step beginning at `nimg` belongs to (the last one from the end on)."""
        return self.phases[max(0, bisect_right([phase.nimg_from for phase in self.phases], nimg) - 1)]

    def step(self, nimg: int) -> int:
        """Number of the step beginning at `nimg`, counted from the start of the run."""
        phase = self.at(nimg)
        return sum(before.steps for before in self.phases[: phase.index]) + phase.step(nimg)

    @property
    def nimg_total(self) -> int:
        """Images seen when the run ends: the first step border at or after total_kimg."""
        return self.phases[-1].nimg_to


def make_schedule(config: Config) -> Schedule:
    """The phases of a configuration. Steps never straddle a planned border backwards: a phase begins with the first
    whole step after it."""
    phases: list[Phase] = []
    nimg = 0
    for resolution, fading, kimg_from, kimg_to in _planned(config):
        batch = at(config.schedule.batch, resolution)
        steps = max(0, -(-(round(kimg_to * 1000) - nimg) // batch))
        if steps == 0:
            continue
        lr = at(config.optim.lr, resolution)
        phases.append(
            Phase(
                index=len(phases),
                resolution=resolution,
                fading=fading,
                kimg_from=kimg_from,
                kimg_to=kimg_to,
                fade_kimg=at(config.schedule.fade_kimg, resolution) if fading else 0.0,
                nimg_from=nimg,
                steps=steps,
                batch=batch,
                lr_g=lr,
                lr_d=lr if config.optim.lr_d is None else at(config.optim.lr_d, resolution),
                resets_adam=not phases or _resets(config.schedule.reset_adam, fading),
            )
        )
        nimg += steps * batch
    for before, after in pairwise(phases):
        if after.resolution > 2 * before.resolution:
            skipped = 2 * before.resolution
            raise UserError(
                f"schedule: {skipped}² gets no step, so nothing can grow from it; give schedule.stable_kimg "
                f"or fade_kimg at {skipped} at least one batch ({at(config.schedule.batch, skipped) / 1000:g} kimg)"
            )
    return Schedule(tuple(phases))


def _resets(policy: str, fading: bool) -> bool:
    return policy == "both" or (policy == "fade_start" and fading)


def _planned(config: Config) -> list[tuple[int, bool, float, float]]:
    """(resolution, fading, kimg_from, kimg_to) with the last stable part stretched, or the plan cut, to the total."""
    schedule, sizes = config.schedule, resolutions(config)
    first = at(schedule.stable_kimg, sizes[0])
    if schedule.order == "fade_first":
        first += at(schedule.fade_kimg, sizes[0])
    parts = [(sizes[0], False, first)]
    for size in sizes[1:]:
        parts += [(size, True, at(schedule.fade_kimg, size)), (size, False, at(schedule.stable_kimg, size))]
    borders = [0.0]
    for _, _, kimg in parts[:-1]:
        borders.append(min(borders[-1] + kimg, schedule.total_kimg))
    borders.append(schedule.total_kimg)
    return [(size, fading, a, b) for (size, fading, _), (a, b) in zip(parts, pairwise(borders), strict=True) if b > a]


@dataclass(frozen=True)
class Due:
    """What follows a step."""

    tick: bool
    samples: bool
    evaluate: bool
    save: bool
    finish: bool


def what_is_due(config: Config, schedule: Schedule, phase: Phase, before: int, after: int) -> Due:
    """Pure: what follows the step that took nimg from `before` to `after`. Whatever else is due, a tick is: it counts
    and checks first."""
    border, finish = after >= phase.nimg_to, after >= schedule.nimg_total
    resolution = phase.resolution
    samples = finish or crossed(before, after, at(config.log.samples_kimg, resolution))
    evaluation = finish or (border and not phase.fading) or crossed(before, after, config.eval.every_kimg)
    save_now = evaluation or border or crossed(before, after, config.checkpoint.every_kimg)
    tick = samples or save_now or crossed(before, after, at(config.log.tick_kimg, resolution))
    return Due(tick, samples, evaluation, save_now, finish)


def crossed(before: int, after: int, kimg: float) -> bool:
    """Whether a multiple of `kimg` thousand images lies in (before, after]; never for 0."""
    unit = kimg * 1000
    return unit > 0 and after // unit > before // unit


@dataclass(frozen=True)
class Rates:
    """What the ramps make of the configured values at a moment."""

    lr_g: float
    lr_d: float
    r1_gamma: float
    r2_gamma: float
    beta2: float
    ema_kimg: float
    augment: float
    """Strength where it is not adapted."""


def rates(config: Config, phase: Phase, nimg: int) -> Rates:
    """Pure: the values of the step that begins at `nimg`, in its phase."""
    optim, ramp = config.optim, config.ramp
    share = min(1.0, nimg / (ramp.kimg * 1000)) if ramp.kimg else 0.0
    done = (1 - math.cos(math.pi * share)) / 2

    def between(start: float, end: float | None) -> float:
        return start if end is None else start + (end - start) * done

    lr, (r1, r2), gamma = between(1.0, ramp.lr), gammas(config, phase.resolution), between(1.0, ramp.gamma)
    return Rates(
        lr_g=phase.lr_g * lr,
        lr_d=phase.lr_d * lr,
        r1_gamma=r1 * gamma,
        r2_gamma=r2 * gamma,
        beta2=between(optim.beta2, ramp.beta2),
        ema_kimg=between(optim.ema_kimg, ramp.ema_kimg),
        augment=between(config.augment.strength, ramp.augment),
    )


def gammas(config: Config, resolution: int) -> tuple[float, float]:
    """Weights of R1 and R2 at a resolution, before a ramp; 0, 0 where the loss takes none."""
    loss = config.loss
    if loss.kind == "wgan-gp":
        return 0.0, 0.0
    r1 = ruled_gamma(config, resolution) if loss.r1_gamma is None else float(at(loss.r1_gamma, resolution))
    return r1, r1 if loss.r2_gamma is None else float(at(loss.r2_gamma, resolution))


GAMMA_RULE = 0.0002
"""R1's weight for a pixel and a batch of one, StyleGAN2-ADA's rule of thumb (Karras et al. 2020, arXiv 2006.06676)."""


def ruled_gamma(config: Config, resolution: int) -> float:
    """R1's weight at a resolution by that rule."""
    rows_, columns = config.network.grid
    pixels = rows_ * columns * (resolution // 4) ** 2
    return GAMMA_RULE * pixels / at(config.schedule.batch, resolution)


RAMPED = ("lr_g", "lr_d", "r1_gamma", "r2_gamma")


def rows(schedule: Schedule, config: Config) -> list[dict[str, float | int | bool]]:
    """The phase table that `hrgan schedule` prints; learning rates, and weights of R1 and R2, at a phase's first and
    last image."""
    keys = ("kimg_from", "kimg_to", "resolution", "fading", "batch", "steps", "resets_adam")
    found = []
    for phase in schedule.phases:
        first, last = rates(config, phase, phase.nimg_from), rates(config, phase, phase.nimg_to - phase.batch)
        row: dict[str, float | int | bool] = {key: getattr(phase, key) for key in keys}
        for name in RAMPED:
            row |= {name: getattr(first, name), f"{name}_end": getattr(last, name)}
        found.append(row)
    return found


def table(schedule: Schedule, config: Config) -> str:
    """The same for people."""
    penalised = config.loss.kind != "wgan-gp"
    names = RAMPED if penalised else RAMPED[:2]
    heads = "".join(f"  {name:>19}" for name in ("lr G", "lr D", "R1", "R2")[: len(names)])
    lines = [f"{'kimg':>17}  {'size':>9}  {'part':6}  {'batch':>5}  {'steps':>8}{heads}  Adam"]
    for p, row in zip(schedule.phases, rows(schedule, config), strict=True):
        line = (
            f"{f'{p.kimg_from:g} - {p.kimg_to:g}':>17}  {size_text(config.network.grid, p.resolution):>9}  "
            f"{'fade' if p.fading else 'stable':6}  {p.batch:>5}  {p.steps:>8,}"
        )
        for name in names:
            first, last = row[name], row[f"{name}_end"]
            line += f"  {f'{first:.4g}' if first == last else f'{first:.3g} - {last:.3g}':>19}"
        lines.append(f"{line}  {'starts anew' if p.resets_adam else 'goes on'}")
    lines.append(
        f"{sum(p.steps for p in schedule.phases):,} steps, {schedule.nimg_total:,} images, Adam starts "
        f"{sum(p.resets_adam for p in schedule.phases)} times"
    )
    if any(row["r1_gamma"] for row in rows(schedule, config)):
        lines.append(gamma_text(config, schedule.phases[-1].resolution))
    if config.ramp.kimg:
        lines.append(f"ramp: {ramp_text(config)}")
    return "\n".join(lines)


def gamma_text(config: Config, resolution: int) -> str:
    """Whether R1's weight follows the rule, and the rule's reason, for people. resolution: of the last phase."""
    if config.loss.kind == "relativistic":
        return "R1 is given: no rule is known for the relativistic loss; R3GAN took 0.05 at 32², 2 at 64², 150 at 256²"
    return (
        f"R1 {'is' if config.loss.r1_gamma is None else 'is given; it would be'} by the rule {GAMMA_RULE:g} x pixels / "
        f"batch ({ruled_gamma(config, resolution):.3g} in the last phase; made for the logistic loss): a gradient's "
        "square is a sum over pixels, and a larger batch needs less of it; then try 4 times as much, for few images, "
        "or a quarter"
    )


def ramp_text(config: Config) -> str:
    """What changes over the run, for people."""
    ramp, optim = config.ramp, config.optim
    parts = [f"{name} x {factor:g}" for name, factor in (("lr", ramp.lr), ("gamma", ramp.gamma)) if factor != 1]
    for name, start, end in (
        ("beta2", optim.beta2, ramp.beta2),
        ("ema_kimg", optim.ema_kimg, ramp.ema_kimg),
        ("augment.strength", config.augment.strength, ramp.augment if config.augment.ops else None),
    ):
        if end is not None:
            parts.append(f"{name} {start:g} to {end:g}")
    return f"{', '.join(parts) or 'nothing'}, on a cosine up to {ramp.kimg:g} kimg"

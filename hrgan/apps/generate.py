"""Pictures from a trained generator."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hrgan.checkpoint import find, load
from hrgan.config import Config
from hrgan.engine import join
from hrgan.errors import UserError
from hrgan.metrics.source import draw_labels
from hrgan.networks import AUTOCAST, make_generator
from hrgan.noise import latents
from hrgan.pictures import grid_side, save_png, tile, to_array, to_stored, to_uint8
from hrgan.schedule import make_schedule
from hrgan.sizes import size_text

GROUP = 8
"""Pictures that are always computed together: a batch of another size may round differently, and a picture must
depend on its number alone."""


def load_generator(
    target: Path, ema: bool, device: torch.device, as_trained: bool
) -> tuple[nn.Module, float, Config, int]:
    """A generator in evaluation mode, the fade's alpha, the configuration and nimg of a run or checkpoint.

    `as_trained` computes in the run's precision, as its evaluations did; otherwise in float32.
    """
    part = "ema" if ema else "generator"
    saved = load(find(target), parts=(part,))
    network = make_generator(
        saved.config,
        saved.state.resolution,
        saved.state.fading,
        AUTOCAST[saved.config.precision] if as_trained else None,
    )
    network.load_state_dict(saved.state.parts[part])
    network.eval().requires_grad_(False).to(device)
    nimg = saved.progress.nimg
    phase = next(
        p
        for p in make_schedule(saved.config).phases
        if (p.resolution, p.fading) == (saved.state.resolution, saved.state.fading)
    )
    return network, phase.alpha(nimg), saved.config, nimg


def labels_of(config: Config, first: int, seed: int, name: str | None) -> Tensor | None:
    """(GROUP,) int64 labels of the pictures from number `first` on: of the class `name`, else each class as often,
    decided by (seed, number). None for a generator without classes, UserError for a class that it does not have."""
    classes = config.network.classes or [] if config.network.num_classes else []
    if name is not None and name not in classes:
        near = difflib.get_close_matches(name, classes, 1, 0)
        raise UserError(
            f"--class: {name}, but the generator "
            + (f"knows {', '.join(classes[:10])}; nearest: {near[0]}" if near else "was trained without classes")
        )
    if not classes:
        return None
    if name is not None:
        return torch.full((GROUP,), classes.index(name))
    return draw_labels([1.0] * len(classes), first, first + GROUP, seed)


def truncated(network: nn.Module, psi: float, config: Config) -> Callable[[Tensor, Tensor | None, float], Tensor]:
    """The generator with its w drawn towards their mean, of each class its own: mean + psi (w - mean) (Karras et al.
    2019, arXiv 1812.04948, appendix B). psi: 1 leaves it as it is. UserError for a family without w."""
    if psi == 1:
        return network
    if config.network.family != "style":
        raise UserError(f"--truncation: {psi:g}, but {config.network.family} has no w to truncate; leave it at 1")
    device = next(network.parameters()).device
    z = latents(0, MEAN_OF, config.network.latent, 0, "mean w").to(device)
    mapped: Callable[[Tensor, Tensor | None], Tensor] = network.mapped  # type: ignore[assignment]  # of style
    drawn: Callable[[Tensor, Tensor, float], Tensor] = network.drawn  # type: ignore[assignment]
    labels: list[Tensor | None] = [
        torch.full((MEAN_OF,), label, device=device) for label in range(config.network.num_classes)
    ]
    means = torch.stack([mapped(z, of).mean(0) for of in labels or [None]])  # (classes or 1, layers, W)

    def made(z: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
        mean, w = means[labels] if labels is not None else means, mapped(z, labels)
        return drawn(torch.lerp(mean.expand(len(z), -1, -1), w, w.new_tensor(psi)), z, alpha)

    return made


def refuse_broken(made: Tensor, source: Path, psi: float = 1.0) -> None:
    """UserError where pictures hold numbers that are not finite, which would be written as black."""
    if not bool(made.isfinite().all()):
        other = "name another checkpoint" + (", or a --truncation nearer to 1" if psi != 1 else "")
        raise UserError(f"{source}: the pictures of its generator hold non-finite numbers; {other}")


MEAN_OF = 4096
"""Latents that the mean w is taken of."""


@dataclass(frozen=True)
class Wanted:
    """What pictures are wanted."""

    count: int
    seed: int = 0
    ema: bool = True
    """Of the averaged generator, not the last one."""
    class_name: str | None = None
    """None: of every class as often."""
    truncation: float = 1.0
    """Of style's w; 1: none."""


def generate(target: Path, out: Path, wanted: Wanted) -> None:
    """Write PNGs (of 16 bits where the set has them) and grid.png (of 8). Picture i depends on (checkpoint, seed, i,
    class, truncation) alone. float32 whatever the run trained in."""
    count = wanted.count
    if count < 1:
        raise UserError(f"--count: {count} is below the least, 1")
    *_, device = join()
    network, alpha, config, nimg = load_generator(target, wanted.ema, device, as_trained=False)
    labels_of(config, 0, wanted.seed, wanted.class_name)
    with torch.no_grad():
        make = truncated(network, wanted.truncation, config)
    out.mkdir(parents=True, exist_ok=True)
    low, high = config.data.values or (0, 2**config.network.bits - 1)
    level = int(network.resolution)  # type: ignore[arg-type]  # a plain int
    side = grid_side(level, 8)
    shown: list[Tensor] = []
    for first in range(0, count, GROUP):
        z = latents(first, first + GROUP, config.network.latent, wanted.seed, "generate").to(device)
        labels = labels_of(config, first, wanted.seed, wanted.class_name)
        with torch.no_grad():
            made = make(z, None if labels is None else labels.to(device), alpha)[: count - first]
        refuse_broken(made, target, wanted.truncation)
        images = to_uint8(made).cpu()
        # 16 bits: in the set's own numbers, as the stored pictures are.
        stored = to_stored(made, (low, high)) if config.network.bits == 16 else map(to_array, images)
        for number, pixels in enumerate(stored, first):
            save_png(pixels, out / f"{number:06d}.png")
        shown += list(images)[: side * side - len(shown)]
    save_png(to_array(tile(torch.stack(shown), min(side, len(shown)))), out / "grid.png")
    print(
        f"{count} pictures of {size_text(config.network.grid, level)} at {nimg / 1000:g} kimg in {out}; "
        f"{out / 'grid.png'} shows {len(shown)} of them"
    )

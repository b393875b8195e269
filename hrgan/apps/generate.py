"""Pictures from a trained generator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hrgan.checkpoint import find, load
from hrgan.config import Config
from hrgan.errors import UserError
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


def generate(target: Path, out: Path, count: int, seed: int, ema: bool) -> None:
    """Write `count` PNGs (of 16 bits where the set has them) and grid.png (of 8). Picture i depends on (checkpoint,
    seed, i) alone. float32 whatever the run
    trained in."""
    if count < 1:
        raise UserError(f"--count: {count} is below the least, 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, alpha, config, nimg = load_generator(target, ema, device, as_trained=False)
    out.mkdir(parents=True, exist_ok=True)
    low, high = config.data.values or (0, 2**config.network.bits - 1)
    level = int(network.resolution)  # type: ignore[arg-type]  # a plain int
    side = grid_side(level, 8)
    shown: list[Tensor] = []
    for first in range(0, count, GROUP):
        z = latents(first, first + GROUP, config.network.latent, seed, "generate").to(device)
        made = network(z, None, alpha)[: count - first]
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

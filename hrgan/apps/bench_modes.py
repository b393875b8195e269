"""How many of the drawn set's 48 modes a generator covers, beside the reals of the set as the limit.

What counting modes on a grid of Gaussians or on stacked digits (Srivastava et al. 2017, VEEGAN) says of a toy, said of
a network that grows: each picture is recognised exactly (metrics/modes.py), by no classifier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hrgan.apps.generate import GROUP, load_generator
from hrgan.data.drawn import draw
from hrgan.engine import join
from hrgan.errors import UserError
from hrgan.metrics.modes import MODES, Mode, recognise
from hrgan.metrics.rows import Row
from hrgan.metrics.source import draw_labels
from hrgan.noise import latents
from hrgan.pictures import to_uint8
from hrgan.sizes import size_at, size_text

AT_ONCE = 32 * GROUP
"""Pictures that are looked at together: of 8 at once most of the time goes into calls."""
FEWEST = 0.1
"""Share of its even share (count / 48) that a mode must have to count as covered: one picture may be an accident."""


def bench_modes(target: Path, count: int, seed: int) -> list[Row]:
    """Two rows, `generated` (by the EMA, in float32) and `reals`: pictures, modes `covered` and `met` at all, the share
    `recognised`, and the modes `missed`. UserError for a run on pictures that the drawn set has none of."""
    if count < 1:
        raise UserError(f"--count: {count} is below the least, 1")
    *_, device = join()
    network, alpha, config, nimg = load_generator(target, True, device, as_trained=False)
    level = int(network.resolution)  # type: ignore[arg-type]  # a plain int
    height, width = size_at(config.network.grid, level)
    if config.network.channels != 3 or height != width:
        raise UserError(
            f"{target}: makes pictures of {size_text(config.network.grid, level)} with {config.network.channels} "
            "channels, expected square ones with 3, as those of a set that was built from drawn:COUNT"
        )
    classes = config.network.num_classes

    def generated(first: int) -> Tensor:
        z = latents(first, first + GROUP, config.network.latent, seed, "generate").to(device)
        labels = draw_labels([1.0] * classes, first, first + GROUP, seed).to(device) if classes else None
        return to_uint8(network(z, labels, alpha)).cpu()

    def reals(first: int) -> Tensor:
        pictures = [np.array(draw(index, seed, height)) for index in range(first, first + GROUP)]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    about = {"resolution": height, "nimg": nimg}
    sides = {"generated": generated, "reals": reals}
    return [{"what": what, **about, **tally(_recognised(make, count))} for what, make in sides.items()]


def _recognised(make: Callable[[int], Tensor], count: int) -> list[Mode | None]:
    """The modes of `count` pictures. make: the GROUP pictures from a number on, (GROUP, 3, H, H) uint8."""
    found: list[Mode | None] = []
    for first in range(0, count, AT_ONCE):
        found += recognise(torch.cat([make(at) for at in range(first, min(first + AT_ONCE, count), GROUP)]))
    return found[:count]


def tally(found: Sequence[Mode | None]) -> Row:
    """count: of pictures; met: modes that any shows; covered: those that at least a tenth of count / 48 pictures
    show; recognised: share of pictures that show one; missed: the modes that are not covered, as "red disc"."""
    times = Counter(mode for mode in found if mode is not None)
    covered = {mode for mode, number in times.items() if number >= FEWEST * len(found) / len(MODES)}
    return {
        "count": len(found),
        "modes": len(MODES),
        "covered": len(covered),
        "met": len(times),
        "recognised": sum(times.values()) / len(found),
        "missed": [f"{colour} {shape}" for shape, colour in MODES if (shape, colour) not in covered],
    }


def print_table(rows: list[Row]) -> None:
    """For people."""
    first = rows[0]
    size, kimg = f"{first['resolution']}²", f"{first['nimg'] / 1000:g} kimg"
    print(f"modes of the drawn set in {first['count']:,} pictures of {size} at {kimg}")
    print(f"{'':10} {'covered':>10} {'met':>10} {'recognised':>11}")
    for row in rows:
        covered, met = (f"{row[key]} of {row['modes']}" for key in ("covered", "met"))
        print(f"{row['what']:10} {covered:>10} {met:>10} {row['recognised']:11.1%}")
    if first["missed"]:
        print(f"not covered: {', '.join(first['missed'])}")

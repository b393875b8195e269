"""What tells a sick run early: signs that are measured at each tick, and warnings by the rows of log.jsonl.

Every limit was chosen by small runs on the drawn set (ProGAN to 16², batch 32, 3 to 48 ticks of 1 kimg, logistic loss),
one healthy and several made sick on purpose; what these showed stands beside it. "Healthy" is the one with R1 and equal
learning rates, 30 kimg. No dead fade and no finished memorising came of them: those limits are by what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hrgan.metrics.rows import Row
from hrgan.monitor.record import number
from hrgan.networks.layers import downsample, upsample
from hrgan.pictures import to_float, to_uint8

# Signs

NEAR = 0.25
"""Of the median distance from a real to its nearest other real: pictures nearer than that are duplicates. A collapsed
G's all are (1.00), a healthy one's 0.00 to 0.08."""


def vital_signs(fakes: Tensor, reals: Tensor, embed: Callable[[Tensor], Tensor]) -> dict[str, float | None]:
    """How varied and how detailed generated pictures are, beside reals.

    fakes, reals: (N, C, H, W) uint8, or float in [-1, 1], of fixed latents and of fixed reals, as many, 32 to 64; in a
    fade both as D sees them, so that `detail` does not depend on alpha. float shows detail at a small alpha, uint8
    hides it. embed: (N, C, H, W) uint8 -> (N, F), such as Extractor.features of the seeded random network.

    diversity_pixel: mean distance of two fakes (RMS over the pixels), over that of two reals. diversity_feature: the
    same of features. duplicates: share of fakes whose nearest other fake is nearer in features than NEAR times the
    median of what the nearest other real is to a real. detail: energy of the highest octave, x - up(down(x)), over the
    reals'. A sign is None where it cannot be computed: pictures that are not finite, fewer than two, reals all alike.

    Takes 0.3 s at 32² with N = 64 on one core, 3 s at 256² and, with N = 32, 14 s at 1024².
    """
    made, real = (x.float() if x.is_floating_point() else to_float(x) for x in (fakes, reals))
    names = ("diversity_pixel", "diversity_feature", "duplicates", "detail")
    # What is not finite has no uint8, and one such picture would spoil every mean.
    if min(len(made), len(real)) < 2 or not (made.isfinite().all() and real.isfinite().all()):
        return dict.fromkeys(names)
    seen, known = (_distances(embed(to_uint8(x)).float()) for x in (made, real))  # (N, N)
    near = NEAR * known.amin(1).median()
    values = (
        _mean(_distances(made.flatten(1))) / _mean(_distances(real.flatten(1))),
        _mean(seen) / _mean(known),
        (seen.amin(1) < near).float().mean().where(near > 0, math.nan),
        _octave(made) / _octave(real),
    )
    numbers: list[float] = torch.stack(values).tolist()
    return {name: value if math.isfinite(value) else None for name, value in zip(names, numbers, strict=True)}


def _distances(x: Tensor) -> Tensor:
    """(N, F) -> (N, N), infinite from each to itself. Without a matrix product, which rounds small ones away."""
    found = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return found.fill_diagonal_(math.inf)


def _mean(distances: Tensor) -> Tensor:
    return distances[distances.isfinite()].mean()


def _octave(x: Tensor) -> Tensor:
    return (x - upsample(downsample(x))).square().mean()


# Warnings

PERSISTS = 3
"""Ticks of one phase in a row that must show it: a healthy run has single odd ticks at growth."""
GRACE = 4
"""First ticks of a run that count for nothing: G's first pictures are noise, which D tells from reals at once (in the
healthy run D called 100 % of the fakes and 97 % of the reals right, in one tick each)."""
REACH = GRACE + PERSISTS
"""Rows that `warnings` must see, this one among them, to say anything."""
SEPARATED = 0.9
"""Least mean sign of D's logits on reals, and of minus those on fakes, where D has won. Healthy: at most 0.74 on both
sides; a G that learns 1000 times slower: 0.94 to 1.00 from the second tick on; D at 20 times the rate: at most 0.85."""
DIVERSE = 0.5
"""Least diversity_feature of a G that has not collapsed. Healthy: never below 0.71. G at 15 times its rate and D at a
third: 0.49, 0.31, 0.21, 0.18 in the ticks from the third on. No R1: 0.40 for six ticks at 8², in which all of the raw
G's pictures were duplicates for a while, and back to 1. Not of pixels, which noise keeps apart (above 1 with a D that
says nothing)."""
DUPLICATES = 0.4
"""Most duplicates. Healthy at most 0.08, without R1 0.17; of few clusters, far from each other, the mean distance says
nothing."""
MEMORISED = 0.5
"""Of the way from D's training reals to the fakes: held-out reals beyond are, to D, more like fakes (0: no overfitting,
1: all of it; Karras et al. 2020, arXiv 2006.06676, r_v of equation 1). Healthy: a median of at most 0.06 over five
ticks, a set of 20 pictures 0.17 after only 8 kimg."""
VANISHED = 0.05
"""Of D's gradient norm: G's below that does not move it. Healthy 0.41 to 2.0; a D held flat by an R1 of 100,000: at
most 0.04."""
DETAILED = 0.05
"""Least detail from the second half of a fade on. Healthy 0.52 and more, the blurriest sick run 0.35; nothing drawn is
0."""


class Warning(NamedTuple):
    """One thing that is wrong."""

    name: str
    """mode collapse, D overpowering, D memorising, vanishing G or dead fade."""
    says: str
    """What was seen."""
    remedy: str


def warnings(history: Sequence[Row], row: Row, loss: str = "logistic") -> list[Warning]:
    """What is wrong with a run by the tick `row` and those before it, the oldest first (REACH - 1 are enough, fewer say
    nothing). loss: as of loss.kind. Not of a phase's first PERSISTS - 1 ticks.

    Rows are those of log.jsonl with vital_signs (of the EMA), sign_real and sign_fake (mean sign of D's logits in the
    steps), grad_norm_g, grad_norm_d (means over the steps), and logit_held_out and logit_seen: D's mean logit, both at
    the tick, of as many held-out reals and of reals that it trains on (its offset wanders from step to step: no mean
    over steps can be compared). What rows lack, or have as None, is not judged.
    """
    rows = [*history, row][-REACH:]
    last = rows[-PERSISTS:]
    if len(rows) < REACH or any(other["phase"] != row["phase"] for other in last):
        return []
    found = (
        _collapse(last),
        _overpowering(last) if loss == "logistic" else None,  # A Wasserstein critic's zero means nothing.
        _memorising(last),
        _vanishing(last),
        _dead_fade(last),
    )
    return [warning for warning in found if warning is not None]


def unsaid(found: Sequence[Warning], phase: int, said: set[tuple[int, str]]) -> list[Warning]:
    """Those that were not raised in this phase yet; `said`, which the caller keeps, then has them, too."""
    new = [warning for warning in found if (phase, warning.name) not in said]
    said.update((phase, warning.name) for warning in new)
    return new


def _of(rows: Sequence[Row], *keys: str) -> list[tuple[float, ...]] | None:
    """The numbers of each row; None where one is missing or not finite."""
    found = [[number(row.get(key)) for key in keys] for row in rows]
    values = [tuple(value for value in row if value is not None) for row in found]
    return values if all(len(row) == len(keys) for row in values) else None


def _collapse(rows: Sequence[Row]) -> Warning | None:
    varied, alike = _of(rows, "diversity_feature"), _of(rows, "duplicates")
    said = []
    if varied is not None and all(share < DIVERSE for (share,) in varied):
        said.append(f"generated pictures differ from each other {varied[-1][0]:.2f} times as much as reals do")
    if alike is not None and all(share > DUPLICATES for (share,) in alike):
        said.append(f"{alike[-1][0]:.0%} of generated pictures have a near duplicate")
    if not said:
        return None
    return Warning(
        "mode collapse",
        f"{' and '.join(said)}, {len(rows)} ticks in a row",
        "a lower optim.lr, or a higher loss.r1_gamma; go on from a checkpoint before it",
    )


def _overpowering(rows: Sequence[Row]) -> Warning | None:
    signs = _of(rows, "sign_real", "sign_fake")
    if signs is None or not all(min(real, -fake) >= SEPARATED for real, fake in signs):
        return None
    real, fake = signs[-1]
    return Warning(
        "D overpowering",
        f"D tells {(1 + real) / 2:.1%} of reals and {(1 - fake) / 2:.1%} of generated pictures right, {len(rows)} "
        "ticks in a row: G learns nothing from it",
        "a lower optim.lr_d, or a higher loss.r1_gamma; see that G learns at all (optim.lr)",
    )


def _memorising(rows: Sequence[Row]) -> Warning | None:
    logits = _of(rows, "logit_seen", "logit_held_out", "logit_real", "logit_fake")
    # Where D tells reals from fakes by nothing, there is no way to be a share of.
    if logits is None or not all(real > fake for _, _, real, fake in logits):
        return None
    shares = [(seen - held_out) / (real - fake) for seen, held_out, real, fake in logits]
    if min(shares) <= MEMORISED:
        return None
    stronger = " stronger" if rows[-1].get("augment_strength") else ""
    return Warning(
        "D memorising",
        f"to D, held-out reals are {shares[-1]:.0%} of the way from the reals it trains on to generated pictures, "
        f"over {MEMORISED:.0%} for {len(rows)} ticks",
        f"more pictures, data.mirror,{stronger} augmentation or a higher loss.r1_gamma; a shorter run",
    )


def _vanishing(rows: Sequence[Row]) -> Warning | None:
    norms = _of(rows, "grad_norm_g", "grad_norm_d")
    if norms is None or not all(g < VANISHED * d for g, d in norms):
        return None
    g, d = norms[-1]
    return Warning(
        "vanishing G",
        f"G's gradient norm is {g:.2g}, {g / d:.1g} of D's, {len(rows)} ticks in a row: D is flat where G's pictures "
        "are",
        "a lower loss.r1_gamma (its scale grows with the number of pixels), or loss.kind wgan-gp",
    )


def _dead_fade(rows: Sequence[Row]) -> Warning | None:
    """A block that begins at zero may draw nothing at first."""
    detail = _of(rows, "detail", "alpha")
    fading = all(row.get("fading", row["alpha"] < 1) for row in rows)
    if detail is None or not fading or not all(energy < DETAILED and alpha >= 0.5 for energy, alpha in detail):
        return None
    return Warning(
        "dead fade",
        f"generated pictures have {detail[-1][0]:.1%} of the reals' detail at {rows[-1]['resolution']}, "
        f"{detail[-1][1]:.0%} into its fade: the new layers draw nothing",
        "a higher optim.lr at this resolution, or a longer schedule.fade_kimg",
    )

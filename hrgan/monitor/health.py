"""What tells a sick run early: signs that are measured at each tick, and warnings by the rows of log.jsonl.

Every limit was chosen by small runs on the drawn set (ProGAN to 16², batch 32, 3 to 48 ticks of 1 kimg, logistic loss),
one healthy and several made sick on purpose; what these showed stands beside it. "Healthy" is the one with R1 and equal
learning rates, 30 kimg. The tests make each sickness happen anew, in runs of 2 to 7 kimg at 16².
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
"""Ticks of one phase in a row, of those that have the values, that must show it: a healthy run has single odd ticks at
growth."""
GRACE = 4
"""First ticks of a run that count for nothing: G's first pictures are noise, which D tells from reals at once (in the
healthy run D called 100 % of the fakes and 97 % of the reals right, in one tick each)."""
REACH = GRACE + PERSISTS
"""Rows that `warnings` must see, this one among them, to say anything."""
SEPARATED = {"logistic": 0.9, "hinge": 0.9, "relativistic": 0.98}
"""By loss.kind: least mean sign of D's logits on reals, and of minus those on fakes, where D has won. Healthy: at most
0.74 on both sides; a G that learns 1000 times slower: 0.94 to 1.00 from the second tick on; D at 20 times the rate: at
most 0.85. Of relativistic pairs, which are told apart sooner, healthy: at most 0.93 after the grace; the slow G: 1.00.
Not of the other losses: least squares draws the line at 1/2, and a Wasserstein critic should tell all."""
DIVERSE = 0.25
"""Least diversity_feature of a G that has not collapsed. Healthy: never below 0.71, but a young one whose pictures are
still pale 0.26 to 0.5 for 5 kimg after it has grown. G at 15 times its rate and D at a third: 0.49, 0.31, 0.21, 0.18 in
the ticks from the third on, 0.07 and less in the end. No R1: 0.40 for six ticks at 8², in which all of the raw
G's pictures were duplicates for a while, and back to 1. Not of pixels, which noise keeps apart (above 1 with a D that
says nothing)."""
DUPLICATES = 0.4
"""Most duplicates. Healthy at most 0.08, without R1 0.17, 0.38 where G draws the eight pictures of its set; of few
clusters, far from each other, the mean distance says nothing."""
MEMORISED = 0.5
"""Of the way from D's training reals to the fakes: held-out reals beyond are, to D, more like fakes (0: no overfitting,
1: all of it; Karras et al. 2020, arXiv 2006.06676, r_v of equation 1). Healthy: a median of at most 0.06 over five
ticks, a set of 20 pictures 0.17 after only 8 kimg, of eight over 1 from 1.5 kimg on."""
VANISHED = 0.05
"""Of D's gradient norm: G's below that does not move it. Healthy 0.41 to 2.0; a D held flat by an R1 of 100,000: at
most 0.04, in ticks of at least loss.r1_every steps."""
DETAILED = 0.05
"""Least detail from the second half of a fade on. Healthy 0.52 and more, the blurriest sick run 0.35; layers that draw
nothing 0.00."""


class Warning(NamedTuple):
    """One thing that is wrong."""

    name: str
    """mode collapse, D overpowering, D memorising, vanishing G or dead fade."""
    says: str
    """What was seen."""
    remedy: str


REMEDIES = {
    "mode collapse": "a new run with --init_from a checkpoint from before it, a lower optim.lr or a higher {penalty}",
    "D overpowering": "a lower optim.lr_d, or a higher {penalty}; see that G learns at all (optim.lr)",
    "D memorising": "more pictures, data.mirror, {augmentation} or a higher {penalty}; a shorter run",
    "vanishing G": "a lower {penalty} (its scale grows with the number of pixels), or loss.kind wgan-gp",
    "dead fade": "a higher optim.lr at this resolution, or a longer schedule.fade_kimg",
}
"""Most of it takes a new run, which --init_from begins with the weights of this one."""
REMEDIES_OF_A_CRITIC = {"vanishing G": "a lower {penalty}, or a higher loss.gp_target"}
"""Under loss.kind wgan-gp, where they differ."""


def remedy(name: str, row: Row, loss: str) -> str:
    """What helps against what was warned of by a row of a run with this loss.kind."""
    critic = loss == "wgan-gp"
    return (REMEDIES | REMEDIES_OF_A_CRITIC if critic else REMEDIES)[name].format(
        penalty="loss.gp_lambda" if critic else "loss.r1_gamma",
        augmentation="stronger augmentation" if row.get("augment_strength") else "augmentation",
    )


def warnings(history: Sequence[Row], row: Row, loss: str = "logistic") -> list[Warning]:
    """What is wrong with a run by the tick `row` and those before it, the oldest first (where each has all values
    REACH - 1 are enough, fewer say nothing). loss: as of loss.kind. Not of a phase's first PERSISTS - 1 ticks.

    Rows are those of log.jsonl with vital_signs (of the EMA), sign_real and sign_fake (mean sign of D's logits in the
    steps, of their differences under relativistic), grad_norm_g, grad_norm_d (means over the steps), and logit_held_out
    and logit_seen: D's mean logit, both at the tick, of as many held-out reals and of reals that it trains on (its
    offset wanders from step to step: no mean over steps can be compared). What `row` lacks, or has as None, is not
    judged; rows before it without it are passed over.
    """
    rows = [other for other in [*history, row][GRACE:] if other["phase"] == row["phase"]]
    found = {
        "mode collapse": _collapse(rows),
        "D overpowering": _overpowering(rows, SEPARATED[loss]) if loss in SEPARATED else None,
        "D memorising": _memorising(rows),
        "vanishing G": _vanishing(rows),
        "dead fade": _dead_fade(rows),
    }
    return [Warning(name, says, remedy(name, row, loss)) for name, says in found.items() if says is not None]


def unsaid(found: Sequence[Warning], phase: int, said: set[tuple[int, str]]) -> list[Warning]:
    """Those that were not raised in this phase yet; `said`, which the caller keeps, then has them, too."""
    new = [warning for warning in found if (phase, warning.name) not in said]
    said.update((phase, warning.name) for warning in new)
    return new


def _of(rows: Sequence[Row], *keys: str) -> list[tuple[float, ...]] | None:
    """The numbers of the last PERSISTS rows that have them all; None where the last has not, or there are fewer."""
    found = [tuple(value for key in keys if (value := number(row.get(key))) is not None) for row in rows]
    if not found or len(found[-1]) < len(keys):
        return None
    whole = [values for values in found if len(values) == len(keys)][-PERSISTS:]
    return whole if len(whole) == PERSISTS else None


def _collapse(rows: Sequence[Row]) -> str | None:
    varied, alike = _of(rows, "diversity_feature"), _of(rows, "duplicates")
    said = []
    if varied is not None and all(share < DIVERSE for (share,) in varied):
        said.append(f"generated pictures differ from each other {varied[-1][0]:.2f} times as much as reals do")
    if alike is not None and all(share > DUPLICATES for (share,) in alike):
        said.append(f"{alike[-1][0]:.0%} of generated pictures have a near duplicate")
    return f"{' and '.join(said)}, {PERSISTS} ticks in a row" if said else None


def _overpowering(rows: Sequence[Row], separated: float) -> str | None:
    signs = _of(rows, "sign_real", "sign_fake")
    if signs is None or not all(min(real, -fake) >= separated for real, fake in signs):
        return None
    real, fake = signs[-1]
    return (
        f"D tells {(1 + real) / 2:.1%} of reals and {(1 - fake) / 2:.1%} of generated pictures right, {PERSISTS} ticks "
        "in a row: G learns nothing from it"
    )


def _memorising(rows: Sequence[Row]) -> str | None:
    logits = _of(rows, "logit_seen", "logit_held_out", "logit_real", "logit_fake")
    # Where D tells reals from fakes by nothing, there is no way to be a share of.
    if logits is None or not all(real > fake for _, _, real, fake in logits):
        return None
    shares = [(seen - held_out) / (real - fake) for seen, held_out, real, fake in logits]
    if min(shares) <= MEMORISED:
        return None
    return (
        f"to D, held-out reals are {shares[-1]:.0%} of the way from the reals it trains on to generated pictures, "
        f"over {MEMORISED:.0%} for {PERSISTS} ticks"
    )


def _vanishing(rows: Sequence[Row]) -> str | None:
    norms = _of(rows, "grad_norm_g", "grad_norm_d")
    if norms is None or not all(g < VANISHED * d for g, d in norms):
        return None
    g, d = norms[-1]
    return f"G's gradient norm is {g:.2g}, {g / d:.1g} of D's, {PERSISTS} ticks in a row: D is flat where G draws"


def _dead_fade(rows: Sequence[Row]) -> str | None:
    """A block that begins at zero may draw nothing at first."""
    detail = _of(rows, "detail", "alpha")
    if detail is None or not all(energy < DETAILED and alpha >= 0.5 for energy, alpha in detail):
        return None
    if not rows[-1].get("fading", detail[-1][1] < 1):
        return None
    return (
        f"generated pictures have {detail[-1][0]:.1%} of the reals' detail at {rows[-1]['resolution']}, "
        f"{detail[-1][1]:.0%} into its fade: the new layers draw nothing"
    )

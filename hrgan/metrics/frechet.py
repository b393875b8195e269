"""The Frechet distance (Heusel et al. 2017, arXiv 1706.08500) from moments of features: its error, its limit for
endless samples, and by class. The numbers are torch-fidelity's, from eigenvalues of a symmetric matrix, which take a
small part of the time of those that its formula has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
import torch.distributed as dist
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from hrgan.watch import beat

GROUPS = 8
"""Parts that generated pictures are summed in, so that the spread between them shows the number's error. Each takes
D x D float64: 33 MB for Inception."""


@dataclass
class Moments:
    """Sums over features f: count (), total (D,) of f, outer (D, D) of f f^T, all float64."""

    count: Tensor
    total: Tensor
    outer: Tensor

    @staticmethod
    def zero(size: int, device: torch.device) -> Moments:
        """Of no features."""
        count, total, outer = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), (size,), (size, size))
        )
        return Moments(count, total, outer)

    def add(self, features: Tensor) -> None:
        """Features (N, D)."""
        features = features.double()
        self.count += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)

    def reduce(self) -> None:
        """Sum over the processes."""
        if dist.is_initialized():
            for tensor in (self.count, self.total, self.outer):
                dist.all_reduce(tensor)

    def to(self, device: torch.device) -> Moments:
        """On a device."""
        return Moments(self.count.to(device), self.total.to(device), self.outer.to(device))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def mean(self) -> Tensor:
        """(D,) float64."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased."""
        mu = self.mean()
        return (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)

    def finite(self) -> bool:
        """Whether no feature was NaN or infinite."""
        return bool(self.outer.isfinite().all())


def summed(parts: Sequence[Moments]) -> Moments:
    """Of all the features."""
    total = Moments.zero(len(parts[0].total), parts[0].total.device)
    for part in parts:
        total.count += part.count
        total.total += part.total
        total.outer += part.outer
    return total


@dataclass
class Projected:
    """Moments between the roots of a reference's covariance, of rank R. They add up as moments do, so that distances of
    many sums of the same groups take their products once."""

    count: Tensor
    total: Tensor
    squares: Tensor
    """() sum of f . f."""
    root_total: Tensor
    """(R,) root^T total."""
    root_outer: Tensor
    """(R, R) root^T outer root."""

    def __add__(self, other: Projected) -> Projected:
        return Projected(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Reference:
    """One side of many distances: a root of its covariance, B = root root^T, is made once.

    tr sqrt(A B) = tr sqrt(root^T A root), which is symmetric and as large as B's rank, which of few pictures is small.
    """

    def __init__(self, moments: Moments) -> None:
        self.mu, sigma = moments.mean(), moments.covariance()
        self.trace = sigma.trace()
        self.root = root_of(sigma)  # (D, R)

    def project(self, moments: Moments) -> Projected:
        """Moments as `distance` takes them."""
        beat()
        root_outer = self.root.T @ moments.outer @ self.root
        return Projected(moments.count, moments.total, moments.outer.trace(), self.root.T @ moments.total, root_outer)

    def distance(self, side: Projected) -> float:
        """The Frechet distance to the reference."""
        beat()
        mu, root_mu = side.total / side.count, side.root_total / side.count
        trace = (side.squares - side.count * (mu @ mu)) / (side.count - 1)
        inner = (side.root_outer - side.count * torch.outer(root_mu, root_mu)) / (side.count - 1)
        overlap = torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum()
        return float((mu - self.mu).square().sum() + trace + self.trace - 2 * overlap)


def root_of(sigma: Tensor) -> Tensor:
    """(D, R) with root root^T = sigma, (D, D) float64 of rank R: Cholesky's with pivots, which stops where the rest is
    rounding. Eigenvectors take seven times as long, and as long for few pictures as for many."""
    factor, order, rank, _ = dpstrf(sigma.cpu().numpy(), lower=1)
    root = np.zeros_like(factor[:, :rank])
    root[order - 1] = np.tril(factor[:, :rank])
    return torch.from_numpy(root).to(sigma.device)


def frechet(a: Moments, b: Moments) -> float:
    """The Frechet distance between two sets of features."""
    reference = Reference(b)
    return reference.distance(reference.project(a))


def frechet_error(groups: Sequence[Projected], reference: Reference, replicates: int, seed: int = 0) -> float | None:
    """Bootstrap standard error over generated pictures, the reals held as they are; None where it cannot be told.

    Each replicate holds half of the groups, drawn without replacement (Politis and Romano 1994): drawing groups with
    replacement changes how many different pictures there are, and so the distance's bias, which hides its spread. The
    spread of halves around the whole is that of the whole around the truth.
    """
    full = [group for group in groups if group.count > 0]
    half = len(full) // 2
    # One picture alone has no covariance.
    if replicates < 2 or sum(sorted(int(group.count) for group in full)[:half]) < 2:
        return None
    random = np.random.default_rng(seed)
    found = []
    for _ in range(replicates):
        picked = random.choice(len(full), size=half, replace=False)
        found.append(reference.distance(reduce(add, (full[index] for index in picked))))
    return float(np.std(found, ddof=1) * np.sqrt(half / (len(full) - half)))


def by_count(groups: Sequence[Projected], reference: Reference) -> dict[int, float]:
    """The distance at growing numbers of pictures: 2/8, 3/8, ... of them, or as many groups as hold any."""
    found, total = {}, groups[0]
    for group in groups[1:]:
        total = total + group
        found[int(total.count)] = reference.distance(total)
    return found


def at_infinity(distances: dict[int, float]) -> float:
    """Where a straight line through the distances over 1/N meets 0: FID without the bias of few samples (Chong and
    Forsyth 2020, arXiv 1911.07023)."""
    counts = np.array(list(distances), dtype=np.float64)
    _, intercept = np.polyfit(1 / counts, np.array(list(distances.values())), 1)
    return float(intercept)


def infinity_error(groups: Sequence[Projected], reference: Reference) -> float:
    """Standard error of `at_infinity`, by leaving out a group at a time (jackknife): drawn groups that repeat would
    look like fewer samples, which is what is extrapolated over."""
    left = [at_infinity(by_count([*groups[:index], *groups[index + 1 :]], reference)) for index in range(len(groups))]
    return float(np.std(left) * np.sqrt(len(groups) - 1))


def frechet_rows(a: Tensor, b: Tensor) -> float:
    """The Frechet distance between features (N, D) and (M, D). With fewer samples than features it is the sum of the
    singular values of an N x M matrix that takes the place of the D x D root."""
    if min(len(a), len(b)) >= a.shape[1]:
        sides = [Moments.zero(a.shape[1], a.device) for _ in range(2)]
        for side, rows in zip(sides, (a, b), strict=True):
            side.add(rows)
        return frechet(*sides)
    a, b = a.double(), b.double()
    difference = a.mean(0) - b.mean(0)
    a, b = ((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (a, b))
    overlap = torch.linalg.svdvals(a @ b.T).sum()
    return float(difference @ difference + a.square().sum() + b.square().sum() - 2 * overlap)

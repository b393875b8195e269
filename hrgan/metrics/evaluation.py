"""The numbers of one side of pictures against another, with everything that they depend on: a row of metrics.jsonl.

The formulas are torch-fidelity's, on features that all processes extract.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from hrgan.config import Config, EvalConfig
from hrgan.errors import HrganError, UserError, one_line
from hrgan.metrics.extractor import Extractor, feature_size
from hrgan.metrics.features import Features, Ranks, extract, go_on, keep_floors, of_reals
from hrgan.metrics.frechet import (
    GROUPS,
    Projected,
    at_infinity,
    by_count,
    frechet_error,
    frechet_rows,
    infinity_error,
)
from hrgan.metrics.neighbours import Nearest, nearest, picture_of
from hrgan.metrics.ppl import path_length
from hrgan.metrics.rows import Row
from hrgan.metrics.source import Source, from_generator
from hrgan.pictures import save_png, to_array
from hrgan.watch import beat

KID_SUBSETS, NEIGHBOURHOOD, SPLITS, SEED = 100, 3, 10, 2020
"""torch-fidelity's: subsets of KID, nearest neighbours of precision and recall, parts of the Inception Score, and the
seed of what is drawn among them."""
BY_ROW = ("kid", "prc", "class_fid", "memorization")
"""Metrics that need the features one by one."""


# One metric


class Number(NamedTuple):
    """A metric's value with its bootstrap standard error, where there is one."""

    value: float | None
    error: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two sides and what they look like to an extractor."""

    fake: Source
    real: Source
    fakes: Features
    reals: Features
    settings: EvalConfig
    device: torch.device

    @cached_property
    def finite(self) -> tuple[bool, bool]:
        """Whether the features of generated and of real pictures are all numbers."""
        return self.fakes.all.finite(), self.reals.all.finite()

    @cached_property
    def projected(self) -> list[Projected]:
        """The groups of generated pictures, for many distances to the reals."""
        return [self.reals.reference.project(group) for group in self.fakes.groups]

    @cached_property
    def by_count(self) -> dict[int, float]:
        """The Frechet distance at several numbers of generated pictures."""
        return by_count(self.projected, self.reals.reference)

    @cached_property
    def nearest(self) -> Nearest:
        """The nearest reals of generated pictures."""
        assert self.fakes.rows is not None
        assert self.reals.rows is not None
        return nearest(self.fakes.rows, self.reals.rows, self.device)

    @cached_property
    def classes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Features of generated and real pictures by class, of those that both sides have twice at least."""
        assert self.fakes.rows is not None
        assert self.reals.rows is not None
        assert self.fakes.labels is not None
        assert self.reals.labels is not None
        found = {}
        for name in sorted(set(self.fake.classes) & set(self.real.classes)):
            fakes = self.fakes.rows[self.fakes.labels == self.fake.classes.index(name)]
            reals = self.reals.rows[self.reals.labels == self.real.classes.index(name)]
            if min(len(fakes), len(reals)) > 1:
                found[name] = fakes.to(self.device), reals.to(self.device)
        return found

    @cached_property
    def by_class(self) -> dict[str, float]:
        """The Frechet distance of each class."""
        return {name: frechet_rows(fakes, reals) for name, (fakes, reals) in self.classes.items()}


def fid(pair: Pair) -> dict[str, Number]:
    """The Frechet distance."""
    reference, replicates = pair.reals.reference, pair.settings.bootstrap
    if len(pair.fakes.groups) == 1 or replicates < 2:
        return {"fd": Number(reference.distance(reference.project(pair.fakes.all)))}
    error = frechet_error(pair.projected, reference, replicates)
    return {"fd": Number(reference.distance(reduce(add, pair.projected)), error)}


def fid_infinity(pair: Pair) -> dict[str, Number]:
    """The Frechet distance without the bias of few generated pictures."""
    return {"fd_infinity": Number(at_infinity(pair.by_count), infinity_error(pair.projected, pair.reals.reference))}


def isc(pair: Pair) -> dict[str, Number]:
    """The Inception Score (Salimans et al. 2016, arXiv 1606.03498); its error is that of the mean over its parts."""
    found = isc_features_to_metric(pair.fakes.scores, SPLITS, True, SEED)
    return {"isc": Number(found["inception_score_mean"], found["inception_score_std"] / math.sqrt(SPLITS))}


def kid(pair: Pair) -> dict[str, Number]:
    """The kernel distance (Binkowski et al. 2018, arXiv 1801.01401). Its error is the spread over subsets of m of the n
    pictures, at most half of them, by sqrt(m / (n - m)) (Politis and Romano 1994): both sides are drawn anew."""

    def over_subsets(size: int) -> tuple[float, float]:
        found = kid_features_to_metric(
            pair.fakes.rows,
            pair.reals.rows,
            kid_subsets=KID_SUBSETS,
            kid_subset_size=size,
            rng_seed=SEED,
            verbose=False,
        )
        return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]

    fewest = min(pair.fakes.count, pair.reals.count)
    size = min(pair.settings.kid_subset_size, fewest)  # Halves of the reals may be smaller; the mean does not change.
    value, spread = over_subsets(size)
    part = min(size, fewest // 2)
    if part < 2:
        return {"kd": Number(value)}
    spread = spread if part == size else over_subsets(part)[1]
    return {"kd": Number(value, spread * math.sqrt(part / (fewest - part)))}


def prc(pair: Pair) -> dict[str, Number]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), with the error of a share of n pictures: what
    a bootstrap of them comes to, the manifolds held as they are."""
    assert pair.fakes.rows is not None
    assert pair.reals.rows is not None
    found = prc_features_to_metric(
        pair.fakes.rows.to(pair.device),
        pair.reals.rows.to(pair.device),
        prc_neighborhood=NEIGHBOURHOOD,
        save_cpu_ram=True,
        verbose=False,
    )
    counts = {"precision": pair.fakes.count, "recall": pair.reals.count}
    return {name: Number(found[name], share_error(found[name], count)) for name, count in counts.items()}


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count`, which is not 0 for none or all of them (Agresti and Coull 1998)."""
    share = (share * count + 2) / (count + 4)
    return math.sqrt(share * (1 - share) / (count + 4))


def memorization(pair: Pair) -> dict[str, Number]:
    """The share of generated pictures that are new ones, not a real's close copies."""
    share = pair.nearest.authenticity
    return {"authenticity": Number(share, share_error(share, pair.fakes.count))}


def class_fid(pair: Pair) -> dict[str, Number]:
    """The mean over the classes of their Frechet distances; its error from halves, as that of the whole."""
    if not pair.by_class:
        return {"class_fd": Number(None)}
    random = torch.Generator().manual_seed(0)

    def of_halves() -> float:
        found = []
        for fakes, reals in pair.classes.values():
            beat()
            picked = torch.randperm(len(fakes), generator=random)[: max(2, len(fakes) // 2)]
            found.append(frechet_rows(fakes[picked.to(fakes.device)], reals))
        return statistics.mean(found)

    value = statistics.mean(pair.by_class.values())
    replicates = [of_halves() for _ in range(pair.settings.bootstrap)]
    return {"class_fd": Number(value, statistics.stdev(replicates) if len(replicates) > 1 else None)}


METRICS: dict[str, tuple[Callable[[Pair], dict[str, Number]], tuple[str, ...]]] = {
    "fid": (fid, ("fd",)),
    "fid_infinity": (fid_infinity, ("fd_infinity",)),
    "class_fid": (class_fid, ("class_fd",)),
    "kid": (kid, ("kd",)),
    "isc": (isc, ("isc",)),
    "prc": (prc, ("precision", "recall")),
    "memorization": (memorization, ("authenticity",)),
}
"""By the words of eval.metrics (besides ppl, which compares no reals), with what they find."""
FLOORED = ("fid", "kid", "prc", "memorization")
"""Those that say something of one half of the reals against the other."""
IN_HALF = {"prc": NEIGHBOURHOOD + 1}
"""Fewest reals of a half that a floor can be computed of, where 2 are not enough."""


# All of them


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found, on the main process."""

    rows: list[Row]
    """Of metrics.jsonl, besides nimg; none on other processes."""
    neighbours: Tensor | None
    """(3, H, W) uint8: the generated pictures that are nearest to reals, beside those."""
    problem: str | None
    """Why there are no numbers; None where there are."""
    reference_seconds: float
    """Time that the reference's features took; next to nothing where they were kept."""


def nothing() -> None:
    """Where one process is alone, or time does not run out."""


def evaluated(
    config: Config,
    generator: nn.Module,
    alpha: float,
    real: Source,
    extractor: Extractor,
    lpips: bool,
    ranks: Ranks,
    folders: list[Path],
    pause: Callable[[float], None] = go_on,
    meet: Callable[[], None] = nothing,
) -> Evaluated:
    """A generator against reals, by all of eval.metrics. Its training mode is left as it was. meet: called by all
    processes after what the first does alone, so that none waits for it where time runs out."""
    shares = real.shares if int(generator.classes) else None  # type: ignore[arg-type]  # a plain int
    fake = from_generator(config, generator, alpha, real.level, "the generator", shares)
    parts = 2 if "ppl" in config.eval.metrics else 1
    training = generator.training
    generator.eval()
    try:
        found = measure(config, fake, real, extractor, ranks, folders, lambda share: pause(share / parts))
        meet()
        rows = found.rows
        if parts == 2:
            row = path_length(
                config, generator, alpha, real.level, extractor, lpips, ranks, lambda share: pause((1 + share) / 2)
            )
            rows = [*rows, row] if row else rows
        return replace(found, rows=rows)
    finally:
        generator.train(training)


def save_neighbours(picture: Tensor, run: Path, nimg: int, resolution: int) -> None:
    """RUN/neighbours/<kimg>kimg-<res>px.png, named as the sample grids are."""
    folder = run / "neighbours"
    folder.mkdir(exist_ok=True)
    save_png(to_array(picture), folder / f"{nimg / 1000:08.1f}kimg-{resolution}px.png")


class Side(NamedTuple):
    """What must be enough of a side."""

    where: str
    pictures: int
    classes: tuple[str, ...] = ()


def too_few(metric: str, settings: EvalConfig, fake: Side, real: Side) -> str | None:
    """Why a metric cannot be computed of so many pictures; None where it can. Of reals there must be enough in each
    half, too, for the floor."""
    kid = settings.kid_subset_size
    fakes = {"kid": kid, "prc": NEIGHBOURHOOD + 2, "memorization": 3, "isc": SPLITS, "fid_infinity": 2 * GROUPS}
    reals = {name: 2 * IN_HALF.get(name, 2) for name in FLOORED}
    reals["kid"] = max(reals["kid"], kid)
    for side, least in ((fake, fakes), (real, reals)):
        if side.pictures < least.get(metric, 2):
            more = ", a smaller eval.kid_subset_size" if metric == "kid" else ""
            out = f", or leave {metric} out" if metric != "fid" else ""  # It is always measured.
            return (
                f"{metric} needs at least {least.get(metric, 2)} pictures, but there are {side.pictures} of "
                f"{side.where}; take more of them{more}{out}"
            )
    return None


def refuse_too_few(settings: EvalConfig, fake: Side, real: Side) -> None:
    """UserError for metrics that cannot be computed of so many pictures, or not without classes."""
    for metric in dict.fromkeys(("fid", *settings.metrics)):
        problem = too_few(metric, settings, fake, real)
        if problem is not None:
            raise UserError(f"eval.metrics: {problem}")
    if "class_fid" in settings.metrics and not set(fake.classes) & set(real.classes):
        sides = " and ".join(f"{side.where} ({', '.join(side.classes[:3]) or 'none'})" for side in (fake, real))
        raise UserError(f"eval.metrics: class_fid needs classes that both sides have; there are those of {sides}")


def side(source: Source) -> Side:
    """Of a source."""
    return Side(source.where, source.count, source.classes)


def measure(
    config: Config,
    fake: Source,
    real: Source,
    extractor: Extractor,
    ranks: Ranks,
    folders: list[Path],
    pause: Callable[[float], None] = go_on,
) -> Evaluated:
    """Compare `fake` with the reference `real`. folders: where statistics of the reference may be kept."""
    began, settings = time.perf_counter(), config.eval
    refuse_too_few(settings, side(fake), side(real))
    if feature_size(extractor, fake.size) != extractor.size:
        raise UserError(f"eval.extractor: {extractor.name} makes features of another length of {fake.size} pixels")
    rows = bool(set(settings.metrics) & set(BY_ROW))
    # The reals are measured once for all evaluations: what they take is no part of this one's share.
    reals = of_reals(real, extractor, ranks, folders, rows=rows, pause=lambda share: pause(0.0), batch=settings.batch)
    reference_seconds = time.perf_counter() - began
    scores = "isc" in settings.metrics
    fakes = extract(fake, extractor, ranks, GROUPS, rows=rows, scores=scores, pause=pause, batch=settings.batch)
    if ranks.rank > 0:
        return Evaluated([], None, None, reference_seconds)
    pair, known = Pair(fake, real, fakes, reals, settings, extractor.device), dict(reals.floors)
    row = {
        "resolution": fake.level,
        **numbers_of(pair, extractor),
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "resize": extractor.resize,
        "num_fake": fakes.count,
        "num_real": reals.count,
        "real_set": real.identity,
        "mirror": real.mirror,
        "truncation": 1.0,
        "seed": config.seed,
        "labels": fake.labels,
        **({"lost_reals": reals.lost} if reals.lost else {}),
    }
    if reals.floors != known:
        keep_floors(real, extractor, folders, reals)
    problem = not_finite(pair)
    shown = _neighbours(pair) if "memorization" in settings.metrics and problem is None else None
    seconds = round(time.perf_counter() - began, 3)
    return Evaluated([{**row, "seconds": seconds}], shown, problem, reference_seconds)


def not_finite(pair: Pair) -> str | None:
    """Why there is no distance between two sides; None where there is."""
    for source, finite in zip((pair.fake, pair.real), pair.finite, strict=True):
        if not finite:
            return (
                f"{source.where}: features that are NaN or infinite, so there is no number: its pictures are, as those "
                "of a broken checkpoint, or the extractor makes them so; take another checkpoint or eval.extractor"
            )
    return None


def _neighbours(pair: Pair) -> Tensor | None:
    fakes, reals = pair.fakes, pair.reals
    assert fakes.places is not None
    assert reals.places is not None
    try:
        return picture_of(pair.nearest, pair.fake, fakes.places, pair.real, reals.places)
    except HrganError as error:  # The numbers are there: a picture must not end a training.
        print(f"no picture of nearest reals: {error}", file=sys.stderr)
        return None


def numbers_of(pair: Pair, extractor: Extractor) -> Row:
    """The metrics by name with their errors and floors. None for each number where pictures are not finite, as there is
    no distance to them, and where too many of them could not be read; such numbers are never the best."""
    found: Row = {}
    fake, real = Side(pair.fake.where, pair.fakes.count), Side(pair.real.where, pair.reals.count)
    for metric, (compute, names) in METRICS.items():
        if metric != "fid" and metric not in pair.settings.metrics:  # It decides which checkpoint is best.
            continue
        beat()
        numbers, floors = dict.fromkeys(names, Number(None)), dict[str, float]()
        try:
            problem = too_few(metric, pair.settings, fake, real)
            if problem is not None:
                print(f"no {problem}", file=sys.stderr)
            elif metric in FLOORED and pair.finite[1]:
                floors = floors_of(pair, metric)
            if problem is None and all(pair.finite):
                numbers = compute(pair)
                found |= details_of(pair, metric, extractor)
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            print(f"{metric} cannot be computed: {one_line(error)}", file=sys.stderr)
        for base, number in numbers.items():
            name = extractor.called(base)
            found[name], found[f"{name}_error"] = number
            if metric in FLOORED:
                found[f"{name}_floor"] = floors.get(base)
    return found


def details_of(pair: Pair, metric: str, extractor: Extractor) -> Row:
    """Numbers by count and by class."""
    if metric == "fid_infinity":
        return {f"{extractor.called('fd')}_at": {str(count): value for count, value in pair.by_count.items()}}
    return {f"{extractor.called('class_fd')}_by_class": pair.by_class} if metric == "class_fid" else {}


def floors_of(pair: Pair, metric: str) -> dict[str, float]:
    """The metric of one half of the reals against the other: what a perfect generator of half as many pictures would
    get. Kept with the reals; {} where a half has too few that could be read."""
    compute, names = METRICS[metric]
    keys = {name: f"{name} {pair.settings.kid_subset_size}" if metric == "kid" else name for name in names}
    if not set(keys.values()) <= set(pair.reals.floors):
        halves = Pair(
            pair.real,
            pair.real,
            pair.reals.half(0, pair.real),
            pair.reals.half(1, pair.real),
            pair.settings,
            pair.device,
        )
        if min(halves.fakes.count, halves.reals.count) < IN_HALF.get(metric, 2):
            return {}
        for name, number in compute(halves).items():
            assert number.value is not None
            pair.reals.floors[keys[name]] = number.value
    return {name: pair.reals.floors[key] for name, key in keys.items()}

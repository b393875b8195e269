"""What a careful reader of a run must know before believing its numbers, with what can be done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from hrgan.data import manifest as manifests
from hrgan.errors import DataError
from hrgan.metrics.rows import Row, best_row, main_metric, provenance, values
from hrgan.monitor.curves import short
from hrgan.monitor.groups import against, by_kind, less_is_better, metrics_of, stands_in
from hrgan.monitor.health import REMEDIES, remedy
from hrgan.monitor.record import Record, number
from hrgan.page import plural

WAITED = 0.1
"""Share of the time spent waiting for data that is worth a warning."""
NEAR = 1.2
"""Times the floor: below this the floor's own noise is what a number shows."""


class Caution(NamedTuple):
    """One thing to know."""

    about: str
    """A word for it."""
    says: str
    remedy: str = ""


def cautions(record: Record) -> list[Caution]:
    """All of a run, the gravest first."""
    return [
        *_state(record),
        *(Caution("damage", line, "What is left is shown.") for line in record.damage),
        *_training(record),
        *_waiting(record),
        *_extractor(record),
        *_kinds(record),
        *_reals(record),
        *_nulls(record),
        *_course(record),
        *_memorised(record),
    ]


def _state(record: Record) -> Iterator[Caution]:
    if not record.finished:
        total = f" of {short(record.schedule.nimg_total / 1000, 6)}" if record.schedule else ""
        yield Caution(
            "not finished",
            f"The run is not finished: {short(record.kimg, 6)}{total} kimg, {record.state}.",
            "The command it was started with goes on with it.",
        )
    if not record.metrics:
        yield Caution("no metrics", "Nothing has been evaluated yet.", "hrgan eval RUN --watch measures checkpoints.")


def _training(record: Record) -> Iterator[Caution]:
    def most(key: str) -> int:
        return int(max((n for row in record.log if (n := number(row.get(key))) is not None), default=0))

    if skipped := most("skipped_steps"):
        yield Caution(
            "skipped",
            f"{plural(skipped, 'step')} {'was' if skipped == 1 else 'were'} skipped, because losses or gradients were "
            "not finite.",
            "A few in fp16 are normal; of many, lower optim.lr or train in float32 or bf16.",
        )
    if bad := most("bad_samples"):
        yield Caution(
            "replaced",
            f"{plural(bad, 'sample')} could not be read and {'was' if bad == 1 else 'were'} replaced by others.",
            "hrgan data check names them; build the set again.",
        )
    if times := most("rollbacks"):
        yield Caution(
            "rollback",
            f"Training diverged and went back to a checkpoint {plural(times, 'time')}, on with lower learning rates; "
            "the log shows the last course only.",
            "Start a run with a lower optim.lr, which needs none.",
        )
    yield from _warned(record)


def _warned(record: Record) -> Iterator[Caution]:
    """Each of the training's own warnings, once, where it was first given."""
    met = set()
    for row in record.log:
        names = row.get("warnings")
        for name in names if isinstance(names, list) else ():
            if isinstance(name, str) and name in REMEDIES and name not in met:
                met.add(name)
                says = f"Training warned of {name}, first at {short(row['nimg'] / 1000, 6)} kimg."
                help_ = remedy(name, row, record.config.loss.kind if record.config else "logistic")
                yield Caution(name, says, f"{help_[0].upper()}{help_[1:]}.")


def _waiting(record: Record) -> Iterator[Caution]:
    """By resolution, weighted by time."""
    waited: dict[int, list[float]] = {}
    for before, row in pairwise([{"seconds": 0.0}, *record.log]):
        share, began, ended = number(row.get("data_wait")), number(before.get("seconds")), number(row.get("seconds"))
        if share is not None and began is not None and ended is not None and isinstance(row.get("resolution"), int):
            sums = waited.setdefault(row["resolution"], [0.0, 0.0])
            sums[0], sums[1] = sums[0] + share * (ended - began), sums[1] + ended - began
    total = sum(seconds for _, seconds in waited.values())
    slow = {r: (w / s, s / total) for r, (w, s) in waited.items() if s > 0 and w / s > WAITED}
    if slow:
        parts = (
            f"{share:.0%} of the time at {record.size(r)} (which took {of:.0%} of the run's)"
            for r, (share, of) in slow.items()
        )
        yield Caution(
            "waiting",
            f"Training waited for data: {'; '.join(parts)}.",
            "More data.workers, shards on a local disk or a faster format; hrgan bench data shows where the time goes.",
        )


def _extractor(record: Record) -> Iterator[Caution]:
    names = [name for row in record.metrics if (name := main_metric(row))]
    if names and all(stands_in(name) for name in names):
        yield Caution(
            "stand-in",
            f"{names[-1]} is measured with another extractor than FID's Inception, {record.metrics[-1]['extractor']}: "
            "it is no FID, and may be compared only with numbers of the same extractor.",
            "hrgan eval with Inception's weights (eval.weights) gives FID.",
        )


def _kinds(record: Record) -> Iterator[Caution]:
    """Growing changes the resolution; all else should stay."""
    for metric in metrics_of(record.metrics):
        kinds = by_kind(record.metrics, metric)
        rest: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for kind in kinds:
            rest.setdefault(kind[1:], kind)
        if len(rest) > 1:
            first, *others = rest.values()
            differences = "; ".join(against((first[0], *kind[1:]), first) for kind in others)
            yield Caution(
                "provenance",
                f"Rows of {metric} were not all measured alike ({differences}): each kind has its own curve, and "
                "numbers of two kinds must not be compared.",
                "Measure the checkpoints anew with one setting: hrgan eval RUN --watch.",
            )
            return  # What differs for one metric differs for the others, too.


def _reals(record: Record) -> Iterator[Caution]:
    newest = _newest(record)
    used = newest and newest.get("num_real")
    if newest is None or not isinstance(used, int):
        return
    whole, asked = _set_size(record, newest.get("real_set")), record.config and record.config.eval.num_real
    if (whole is not None and used < whole) or (whole is None and asked == used):
        of = f"{used:,} of the set's {whole:,}" if whole is not None else f"the first {used:,}"
        yield Caution(
            "fewer reals",
            f"The newest evaluation compares with {of} real pictures: fewer give another number, and a larger floor.",
            "Leave out eval.num_real.",
        )


def _set_size(record: Record, real_set: Any) -> int | None:
    """Samples of the set that was measured against; None where it is not at hand."""
    path = record.config.data.path if record.config else ""
    if not isinstance(path, str) or not path or "://" in path or path.startswith("pipe:"):
        return None
    try:
        found = manifests.load(Path(path))
    except (DataError, OSError, ValueError):
        return None
    return found.num_samples if found.real_set == real_set else None


def _nulls(record: Record) -> Iterator[Caution]:
    empty = [
        (name, row["nimg"] / 1000) for row in record.metrics for name, of in values(row).items() if of.value is None
    ]
    if empty:
        places = ", ".join(dict.fromkeys(f"{short(kimg, 6)}" for _, kimg in sorted(empty, key=lambda pair: pair[1])))
        names = ", ".join(dict.fromkeys(name for name, _ in empty))
        yield Caution(
            "not computed",
            f"{names} could not be computed at {places} kimg: generated pictures were not finite, or too few could be "
            "read; what the evaluation printed says which.",
            "Take a checkpoint from before that; where pictures were not finite, train on with a lower optim.lr.",
        )


def _course(record: Record) -> Iterator[Caution]:
    best = best_row(record.metrics)
    if best is None:
        return
    name = str(main_metric(best))
    alike = [row for row in by_kind(record.metrics, name)[provenance(best)] if row[name] is not None]
    last, of, at = values(alike[-1])[name], values(best)[name], best["nimg"] / 1000
    if of.value is None or last.value is None:
        return
    if alike[-1]["nimg"] > best["nimg"] and surely_differs(of.value, of.error, last.value, last.error) is not False:
        doubt = "" if of.error is not None and last.error is not None else " (its error is not known)"
        yield Caution(
            "worse since",
            f"{name} was best at {short(at, 6)} kimg, {short(of.value)}, and is {short(last.value)} at "
            f"{short(alike[-1]['nimg'] / 1000, 6)} kimg{doubt}.",
            "Generate from the best checkpoint, which hrgan generate RUN takes; a longer run brings no more.",
        )
    if of.floor is not None and less_is_better(name) and of.value <= NEAR * of.floor:
        yield Caution(
            "near the floor",
            f"{name} is {short(of.value)} at {short(at, 6)} kimg, near {short(of.floor)}, that of reals against reals: "
            "with so few pictures it tells no more.",
            "Measure with more of them (eval.num_fake, more reals), and look at the nearest neighbours.",
        )


def surely_differs(one: float, error: float | None, two: float, other: float | None) -> bool | None:
    """Whether two numbers lie further apart than twice both standard errors together; None where one is not known."""
    if error is None or other is None:
        return None
    return abs(one - two) > 2 * math.hypot(error, other)


def _memorised(record: Record) -> Iterator[Caution]:
    newest = next(
        (row for row in _by_nimg(record) if any(name.startswith("authenticity") for name in values(row))), None
    )
    for name, of in values(newest).items() if newest else ():
        if name.startswith("authenticity") and of.value is not None and of.value < 0.5:
            error = number(of.error)
            doubt = " (by less than twice its error)" if error is not None and 0.5 - of.value < 2 * error else ""
            yield Caution(
                "memorised",
                f"{name} is {short(of.value)}, below 0.5{doubt}: generated pictures lie nearer to training pictures "
                "than those to each other.",
                "Look at the nearest neighbours; train shorter, on more pictures or with mirroring.",
            )


def _by_nimg(record: Record) -> list[Row]:
    """Newest first, of one nimg the row that was written last."""
    return sorted(record.metrics, key=lambda row: int(row["nimg"]))[::-1]


def _newest(record: Record) -> Row | None:
    return next(iter(_by_nimg(record)), None)

"""Rows of metrics.jsonl by what may be compared (`metrics/rows.py`), and in words what keeps the others apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hrgan.metrics.rows import HIGHER_IS_BETTER, PROVENANCE, Row, main_metric, provenance, values
from hrgan.sizes import size_text

Kind = tuple[Any, ...]
"""What `provenance` gives."""


def by_kind(rows: Iterable[Row], metric: str) -> dict[Kind, list[Row]]:
    """The rows that name a metric, in order of nimg, by what may be compared: the smaller resolutions first, then the
    one measured first. Of one nimg, the row that was written last."""
    found: dict[Kind, dict[int, Row]] = {}
    for row in rows:
        if metric in values(row):
            of_kind = found.setdefault(provenance(row), {})
            of_kind[row["nimg"]] = row
    kinds = sorted(found, key=lambda kind: kind[0])
    return {kind: sorted(found[kind].values(), key=lambda row: int(row["nimg"])) for kind in kinds}


def metrics_of(rows: Iterable[Row]) -> list[str]:
    """Names of all metrics of the rows, in the order of the newest row that has them; those that stand beside the one
    that decides which checkpoint is best come first."""
    names: dict[str, None] = {}
    newest_first = list(rows)[::-1]
    for row in sorted(newest_first, key=lambda row: main_metric(row) is None):
        names.update(dict.fromkeys(values(row)))
    return list(names)


def less_is_better(metric: str) -> bool:
    """Of a name such as kid or precision_random."""
    return metric.split("_")[0] not in HIGHER_IS_BETTER


def floor_word(metric: str) -> str:
    """What to call the number of reals against reals: where more is better it is no floor."""
    return "floor" if less_is_better(metric) else "reals"


def stands_in(metric: str) -> bool:
    """Whether a Frechet distance is no FID, because another extractor than Inception made the features."""
    return "fid" not in metric.split("_")


def differing(kinds: Iterable[Kind]) -> list[str]:
    """The keys of provenance that are not equal in all."""
    kinds = list(kinds)
    return [key for number, key in enumerate(PROVENANCE) if len({kind[number] for kind in kinds}) > 1]


def words(key: str, value: Any, grid: Sequence[int] = (4, 4)) -> str:
    """A value of provenance for people."""
    if key == "resolution":
        return size_text(grid, value)
    if value is None:
        return f"{key} not recorded"
    if key in ("num_fake", "num_real"):
        return f"{value:,} {'generated' if key == 'num_fake' else 'real'}" if isinstance(value, int) else str(value)
    if key in ("extractor_sha256", "real_set"):
        return f"{'extractor' if key == 'extractor_sha256' else 'set'} {str(value)[:8]}"
    if key == "mirror":
        return "mirrored reals" if value else "no mirrored reals"
    return f"{key} {value}" if key in ("truncation", "labels") else str(value)


def describe(kind: Kind, keys: Iterable[str], grid: Sequence[int] = (4, 4)) -> str:
    """The values of some keys in one line."""
    of = dict(zip(PROVENANCE, kind, strict=True))
    return ", ".join(words(key, of[key], grid) for key in keys)


def against(kind: Kind, other: Kind) -> str:
    """What differs, key by key, such as "num_fake 2048 against 10000"."""
    pairs = zip(PROVENANCE, kind, other, strict=True)
    return ", ".join(f"{key} {_bare(one)} against {_bare(two)}" for key, one, two in pairs if one != two)


def _bare(value: Any) -> str:
    if value is None:
        return "not recorded"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)

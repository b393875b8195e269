"""What a row of metrics.jsonl says, and which of its numbers may stand beside those of another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hrgan.sizes import size_text

Row = dict[str, Any]

PROVENANCE = (
    "resolution",
    "extractor",
    "extractor_sha256",
    "resize",
    "num_fake",
    "num_real",
    "real_set",
    "mirror",
    "truncation",
    "labels",
)
"""Everything besides the generator that moves a number; the seed of the latents does not, beyond its error."""
ABOUT = (*PROVENANCE, "nimg", "seed", "seconds", "size", "lost_reals")
"""Keys of a row that are not numbers of a metric."""
HIGHER_IS_BETTER = ("isc", "precision", "recall", "authenticity")
"""Metrics, by the first part of their names; of all others less is better."""


class Value(NamedTuple):
    """A metric's number in a row."""

    value: float | None
    """None: it could not be computed, mostly because generated pictures were not finite."""
    error: float | None
    """Bootstrap standard error."""
    floor: float | None
    """The same of the reals' two halves against each other, where that makes sense."""


def provenance(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Two numbers of a metric may be compared, or stand on one curve, only where this is equal."""
    return tuple(row.get(key) for key in PROVENANCE)


def values(row: Mapping[str, Any]) -> dict[str, Value]:
    """The row's metrics by name. Numbers by class or by count are not among them."""
    found = {}
    for name, value in row.items():
        if name in ABOUT or name.endswith(("_error", "_floor")) or not (value is None or isinstance(value, float)):
            continue
        found[name] = Value(value, row.get(f"{name}_error"), row.get(f"{name}_floor"))
    return found


def main_metric(row: Mapping[str, Any]) -> str | None:
    """The metric that decides which checkpoint is best: the Frechet distance, which stands first."""
    return next((name for name in row if f"{name}_floor" in row), None)


def best_row(rows: Iterable[Row]) -> Row | None:
    """The row of the best checkpoint: of the largest resolution, and there of the provenance that most rows have (of
    several the one measured last), the least main metric."""
    rows = [row for row in rows if (name := main_metric(row)) is not None and row[name] is not None]
    last = max((row["resolution"] for row in rows), default=None)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["resolution"] == last:
            # Taken out and put in again: the one measured last stands last.
            groups[provenance(row)] = [*groups.pop(provenance(row), []), row]
    if not groups:
        return None
    group = max(reversed(groups.values()), key=len)
    return min(group, key=lambda row: float(row[str(main_metric(row))]))


def describe(row: Row, grid: Sequence[int] = (4, 4)) -> str:
    """For people: each number with its error and floor, and what it is of."""
    parts = []
    for name, (value, error, floor) in values(row).items():
        if value is None:
            parts.append(f"{name} none")
            continue
        spread = f" ± {error:.2g}" if error is not None else ""
        parts.append(f"{name} {value:.4f}{spread}" + (f" (floor {floor:.4f})" if floor is not None else ""))
    counts = f"{row['num_fake']} fakes, {row['num_real']} reals"
    return f"{', '.join(parts)}, {row.get('size') or size_text(grid, row['resolution'])}, {counts}"

"""`hrgan compare`: runs beside each other, a table and a plot for each set of numbers that may be compared, and for all
others what keeps them apart."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hrgan.config import leaves
from hrgan.errors import UserError
from hrgan.metrics.rows import PROVENANCE, Row, Value, main_metric, values
from hrgan.monitor import curves
from hrgan.monitor.cautions import surely_differs
from hrgan.monitor.curves import Chart, Curve, Label, Look, draw, short
from hrgan.monitor.groups import Kind, against, by_kind, describe, floor_word, less_is_better, metrics_of, stands_in
from hrgan.monitor.record import Record, number, read_record
from hrgan.monitor.report import metric_points, number_text
from hrgan.page import table, text, whole, write_page

FILE = "compare.html"
HEAD = ("run", "best", "at kimg", "last", "at kimg", "beside the best", "kimg", "hours", "images/s")


@dataclass(frozen=True)
class Entry:
    """A run in a group."""

    place: int
    """In the order the runs were named."""
    name: str
    record: Record
    rows: list[Row]
    """Of one provenance, in order of nimg, with a number in at least one."""
    metric: str

    def _measured(self) -> list[Row]:
        return [row for row in self.rows if values(row)[self.metric].value is not None]

    @property
    def best(self) -> Row:
        """The first where several are equal."""
        sign = 1 if less_is_better(self.metric) else -1
        return min(self._measured(), key=lambda row: sign * float(row[self.metric]))

    @property
    def last(self) -> Row:
        """The newest with a number."""
        return self._measured()[-1]

    @property
    def speed(self) -> float | None:
        """Images per second at this resolution, the median of the log's lines."""
        rows = (row for row in self.record.log if row.get("resolution") == self.rows[0]["resolution"])
        speeds = [speed for row in rows if (speed := number(row.get("img_per_sec"))) is not None]
        return statistics.median(speeds) if speeds else None


@dataclass(frozen=True)
class Group:
    """Runs that may be compared, because their rows have one provenance."""

    kind: Kind
    entries: list[Entry]

    @property
    def leader(self) -> Entry:
        """The run with the best number."""
        metric = self.entries[0].metric
        sign = 1 if less_is_better(metric) else -1
        return min(self.entries, key=lambda entry: sign * float(entry.best[metric]))

    def verdict(self, entry: Entry) -> str:
        """Whether a run's best number differs from the best run's by more than chance."""
        leader, metric = self.leader, entry.metric
        if entry is leader:
            return "best" if len(self.entries) > 1 else ""
        one, two = float(entry.best[metric]), float(leader.best[metric])
        error, other = (number(values(of.best)[metric].error) for of in (entry, leader))
        differs = surely_differs(one, error, two, other)
        if differs is None:
            return f"{one - two:+.4g}, error not known"
        return f"{one - two:+.4g}" if differs else "no difference"


@dataclass(frozen=True)
class Comparison:
    """What there is to say of several runs."""

    metric: str
    names: list[str]
    records: list[Record]
    groups: list[Group]
    """The one with the most runs first."""
    lower: list[Group]
    """Of smaller resolutions that several runs passed through."""
    without: dict[str, str]
    """Runs without a number of this metric, with the reason."""

    def apart(self, group: Group) -> str:
        """What keeps a group from the first."""
        return against(group.kind, self.groups[0].kind)


def compare(runs: Sequence[Path], out: Path | None, metric: str | None, as_json: bool) -> None:
    """Print the comparison and write its page (with as_json only where `out` names it). UserError for fewer than two
    runs, a folder that is none, or where nothing has been measured."""
    found = comparison(runs, metric)
    if as_json:
        print(json.dumps(as_tree(found), indent=1))
    else:
        print(as_text(found))
    if out is not None or not as_json:
        path = write_page(out or Path(FILE), as_page(found))
        if not as_json:
            print(f"\n{path}")


def comparison(runs: Sequence[Path], metric: str | None = None) -> Comparison:
    """Read the runs and put together what may be compared. metric: None takes the main one of most runs."""
    if len(runs) < 2:
        raise UserError(f"compare: only {runs[0]} is named; name two run directories or more")
    twice = [str(run) for run, count in Counter(run.resolve() for run in runs).items() if count > 1]
    if twice:
        raise UserError(f"compare: {twice[0]} is named twice; name different run directories")
    records = [read_record(run) for run in runs]
    short_names = Counter(record.name for record in records)
    names = [record.name if short_names[record.name] == 1 else str(record.folder) for record in records]
    metric = metric or _main(records)
    _refuse_unknown(metric, records)
    kinds = [_measured(record, metric) for record in records]
    without = {n: _why_not(record, metric) for n, record, of in zip(names, records, kinds, strict=True) if not of}

    def group(kind: Kind) -> Group:
        entries = [Entry(n, names[n], records[n], of[kind], metric) for n, of in enumerate(kinds) if kind in of]
        return Group(kind, entries)

    shown = [group(kind) for kind in _shown(kinds)]
    shown.sort(key=lambda of: (-len(of.entries), -int(of.kind[0]), -sum(len(entry.rows) for entry in of.entries)))
    taken = {of.kind for of in shown}
    lower = [group(kind) for kind, count in _counted(kinds).items() if count > 1 and kind not in taken]
    return Comparison(metric, names, records, shown, sorted(lower, key=lambda of: -int(of.kind[0])), without)


def _why_not(record: Record, metric: str) -> str:
    if not record.metrics:
        return "not evaluated yet; hrgan eval RUN --watch measures its checkpoints"
    if by_kind(record.metrics, metric):
        return f"{metric} could not be computed: its pictures were not finite, or too few"
    return f"no {metric}, it has {', '.join(metrics_of(record.metrics))}; hrgan eval measures it with another extractor"


def _measured(record: Record, metric: str) -> dict[Kind, list[Row]]:
    return {
        kind: rows
        for kind, rows in by_kind(record.metrics, metric).items()
        if any(values(row)[metric].value is not None for row in rows)
    }


def _main(records: Sequence[Record]) -> str:
    """The metric that decides in most runs, FID where several do; without one the metric that most runs have."""
    if not any(record.metrics for record in records):
        raise UserError(
            f"compare: none of the {len(records)} runs has been evaluated; hrgan eval RUN --watch measures checkpoints"
        )
    for names_of in (lambda rows: [name for row in rows if (name := main_metric(row))], metrics_of):
        counts = Counter(name for record in records for name in dict.fromkeys(names_of(record.metrics)))
        if counts:
            return max(counts, key=lambda name: (counts[name], not stands_in(name)))
    raise UserError("compare: the rows of metrics.jsonl hold no metric; hrgan eval RUN --watch measures checkpoints")


def _refuse_unknown(metric: str, records: Sequence[Record]) -> None:
    known = dict.fromkeys(name for record in records for name in metrics_of(record.metrics))
    if metric not in known:
        raise UserError(f"--metric: no run has {metric!r}; they have {', '.join(known) or 'none: evaluate them first'}")


def _counted(kinds: Iterable[dict[Kind, list[Row]]]) -> Counter[Kind]:
    return Counter(kind for of in kinds for kind in of)


def _shown(kinds: Sequence[dict[Kind, list[Row]]]) -> list[Kind]:
    """For each run all that it shares with others at its largest resolution. Where that is nothing, most of what it has
    there, and what it shares at the largest of its other resolutions."""
    counts, shown = _counted(kinds), dict[Kind, None]()
    for of in filter(None, kinds):
        largest = max(kind[0] for kind in of)
        there, shared = [kind for kind in of if kind[0] == largest], [kind for kind in of if counts[kind] > 1]
        if both := [kind for kind in there if kind in shared]:
            shown.update(dict.fromkeys(both))
            continue
        shown[max(there, key=lambda kind: (len(of[kind]), of[kind][-1]["nimg"]))] = None
        if shared:
            shown[max(shared, key=lambda kind: (kind[0], counts[kind]))] = None
    return list(shown)


def config_differences(found: Comparison) -> dict[str, list[Any]]:
    """Fields that differ between the runs whose configuration can be read, with each run's value."""
    trees = [dict(leaves(asdict(record.config))) if record.config else None for record in found.records]
    known = [tree for tree in trees if tree is not None]
    return {
        key: ["not readable" if tree is None else tree[key] for tree in trees]
        for key in (known[0] if known else ())
        if any(tree[key] != known[0][key] for tree in known)
    }


# For people, in a terminal


def as_text(found: Comparison) -> str:
    """The tables as aligned text."""
    blocks = []
    for number_of, group in enumerate(found.groups):
        lines = [_title(found, group)]
        if number_of:
            lines.append(f"not comparable with the first group: {found.apart(group)}")
        blocks.append("\n".join([*lines, _aligned([HEAD, *(_cells(group, entry) for entry in group.entries)])]))
    blocks += [f"{name}: {reason}" for name, reason in found.without.items()]
    differing = config_differences(found)
    if differing:
        rows = [[key, *(str(value) for value in row)] for key, row in differing.items()]
        blocks.append("configurations differ in\n" + _aligned([["field", *found.names], *rows]))
    return "\n\n".join(blocks)


def _title(found: Comparison, group: Group) -> str:
    size = group.entries[0].record.size(group.kind[0])
    return f"{found.metric} at {size}: {describe(group.kind, [key for key in PROVENANCE if key in SAID])}"


SAID = ("extractor", "num_fake", "num_real", "real_set")
"""What of the provenance a title says; all of it is in the JSON."""


def _cells(group: Group, entry: Entry) -> list[str]:
    seconds = entry.record.seconds
    return [
        entry.name,
        *(
            cell
            for row in (entry.best, entry.last)
            for cell in (number_text(values(row)[entry.metric]), short(row["nimg"] / 1000, 7))
        ),
        group.verdict(entry),
        short(entry.record.kimg, 7),
        "" if seconds is None else f"{seconds / 3600:.2f}",
        "" if entry.speed is None else short(entry.speed, 3),
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


# For programs


def as_tree(found: Comparison) -> dict[str, Any]:
    """Everything as JSON has it."""
    return {
        "metric": found.metric,
        "runs": [
            {"run": name, "folder": str(of.folder), "state": of.state, "kimg": of.kimg, "seconds": of.seconds}
            for name, of in zip(found.names, found.records, strict=True)
        ],
        "groups": [_group_tree(found, group) for group in found.groups],
        "lower_resolutions": [_group_tree(found, group) for group in found.lower],
        "without": found.without,
        "config": {key: dict(zip(found.names, row, strict=True)) for key, row in config_differences(found).items()},
    }


def _group_tree(found: Comparison, group: Group) -> dict[str, Any]:
    def point(row: Row) -> dict[str, Any]:
        of: Value = values(row)[found.metric]
        return {"value": of.value, "error": of.error, "floor": of.floor, "nimg": row["nimg"]}

    return {
        "provenance": dict(zip(PROVENANCE, group.kind, strict=True)),
        "apart_from_the_first": found.apart(group),
        "runs": [
            {
                "run": entry.name,
                "best": point(entry.best),
                "last": point(entry.last),
                "verdict": group.verdict(entry),
                "img_per_sec": entry.speed,
            }
            for entry in group.entries
        ],
    }


# For people, as a page


def as_page(found: Comparison) -> str:
    """The page, with a plot for each group."""
    title = f"{text(found.metric)} of {len(found.records)} runs"
    note = "<p>It is no FID, which takes the features of Inception.</p>" if stands_in(found.metric) else ""
    better = "Less" if less_is_better(found.metric) else "More"
    about = (
        f"<p>{better} is better. Only numbers measured alike stand in one table and one plot. The number of the best "
        "checkpoint is a little better than it is in truth: it was chosen for it. No difference: less than twice the "
        f"standard errors of both together.</p>{note}"
    )
    parts = [f"<header><h1>{title}</h1>{about}</header>"]
    parts += [_section(found, group, number_of) for number_of, group in enumerate(found.groups)]
    if found.without:
        items = "".join(f"<li>{text(name)}: {text(reason)}</li>" for name, reason in found.without.items())
        parts.append(f"<section><h2>Runs without {text(found.metric)}</h2><ul>{items}</ul></section>")
    parts.append(_configs(found))
    if found.lower:
        first = len(found.groups)
        plots = "".join(_section(found, group, first + place) for place, group in enumerate(found.lower))
        summary = "<summary>At smaller resolutions that several runs passed through</summary>"
        parts.append(f"<section><details>{summary}{plots}</details></section>")
    return whole(title, "\n".join(parts), STYLE + curves.STYLE, curves.SCRIPT)


def _section(found: Comparison, group: Group, place: int) -> str:
    apart = ""
    if place and group in found.groups:
        apart = f"<p>Not comparable with the first group: {text(found.apart(group))}.</p>"
    rows = [[text(cell) for cell in _cells(group, entry)] for entry in group.entries]
    plots = [_plot(found, group, hours) for hours in (False, True)]
    return (
        f"<section><h2>{text(_title(found, group))}</h2>{apart}{table(HEAD, rows)}"
        f'<div class="switch"><input type="radio" name="by{place}" id="kimg{place}" checked><label for="kimg{place}">'
        f'over images</label><input type="radio" name="by{place}" id="hours{place}"><label for="hours{place}">over '
        f'hours trained</label><div class="by">{draw(plots[0])}</div><div class="by">{draw(plots[1])}</div></div>'
        "</section>"
    )


def _plot(found: Comparison, group: Group, hours: bool) -> Chart:
    """A curve for each run, over kimg or over hours trained."""
    shown: list[Curve] = []
    labels: list[Label] = []
    for entry in group.entries:
        points, floor = metric_points(entry.rows, found.metric)
        if hours:
            at = {point.x: entry.record.hours_at(1000 * point.x) for point in points}
            points = [point._replace(x=x) for point in points if (x := at[point.x]) is not None]
            floor = [(x, y) for kimg, y in floor if (x := at[kimg]) is not None]
        look = Look(entry.place, entry.place // curves.COLOURS, entry.place)
        shown.append(Curve(entry.name, points, look, floor, number_text(values(entry.best)[found.metric])))
        if floor and not labels:
            labels.append(Label(*floor[0], f"{floor_word(found.metric)} {short(floor[0][1], 3)}"))
    ends = [point.x for curve in shown for point in curve.points]
    bands = [entry.record.bands() for entry in group.entries]
    same = not hours and all(of == bands[0] for of in bands)
    title = f"{found.metric} over {'hours trained' if hours else 'thousands of images'}"
    unit = "hours" if hours else "kimg"
    first, last = min(ends, default=0.0), max(ends, default=1.0) or 1.0
    # The numbers of a late phase take the whole width.
    start = first - 0.04 * (last - first) if 0.35 * last < first < last else 0.0
    return Chart(title, shown, last, bands[0] if same else (), unit, labels=labels, x_from=start)


def _configs(found: Comparison) -> str:
    differing = config_differences(found)
    if not differing:
        return "<section><h2>Configurations</h2><p>They do not differ.</p></section>"
    rows = [[text(key), *(text(value) for value in row)] for key, row in differing.items()]
    names = [text(name) for name in found.names]
    return f"<section><h2>Configurations differ in</h2>{table(('field', *names), rows)}</section>"


STYLE = """\
h2 { overflow-wrap: anywhere; }
.switch { margin-top: 1rem; }
.switch input { position: absolute; opacity: 0; }
.switch label { display: inline-block; padding: .25rem .8rem; border: 1px solid var(--line); cursor: pointer;
  font-size: .9rem; border-radius: 6px; margin-right: .4rem; color: var(--soft); }
.switch input:checked + label { background: var(--panel); color: var(--fore); border-color: var(--grey); }
.switch input:focus-visible + label { outline: 2px solid var(--plain); }
.switch input:first-of-type:checked ~ .by:last-of-type, .switch input:last-of-type:checked ~ .by:first-of-type {
  display: none; }
.switch .plot { height: 18rem; }
"""

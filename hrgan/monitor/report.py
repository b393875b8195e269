"""`hrgan report`: one page, RUN/report.html, of what a run did and how good its pictures are, for people to look
through."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hrgan.config import Config, leaves
from hrgan.metrics.rows import PROVENANCE, Row, Value, best_row, main_metric, provenance, values
from hrgan.monitor import curves, frames
from hrgan.monitor.cautions import cautions
from hrgan.monitor.curves import Chart, Curve, Label, Look, Point, binned, draw, short
from hrgan.monitor.groups import by_kind, describe, differing, floor_word, less_is_better, metrics_of, stands_in
from hrgan.monitor.log import clock
from hrgan.monitor.record import Record, number, read_record
from hrgan.page import facts, plural, table, text, whole, write_page

FILE = "report.html"
BUDGET = 25_000_000
"""Bytes that a page may have, about."""
FOR_SAMPLES, FOR_NEIGHBOURS = 0.65, 0.25
"""Shares of it that pictures may take."""
NEWEST = 15
"""Rows of the metric table that are open."""
MOST_CLASSES = 200


def write_report(run: Path, out: Path | None = None) -> Path:
    """Make the page of a run directory in any state, by default RUN/report.html, and return its path. It needs nothing
    else: no network, no server. UserError where the folder is no run."""
    record = read_record(run)
    samples = frames.strip_of(run / "samples", FOR_SAMPLES * BUDGET, split=True)
    neighbours = frames.strip_of(run / "neighbours", FOR_NEIGHBOURS * BUDGET, split=False)
    sections = [
        _header(record, run / "log.jsonl"),
        _cautions(record),
        _samples(samples, record, bool(neighbours.frames)),
        _metrics(record),
        _rows(record),
        _neighbours(neighbours, record),
        _training(record),
        _config(record),
        _environment(record.environment),
    ]
    style = STYLE + curves.STYLE + frames.STYLE
    page = whole(f"{text(record.name)}: report", "\n".join(sections), style, curves.SCRIPT + frames.SCRIPT)
    return write_page(out or run / FILE, page)


# What it came to


def _header(record: Record, log: Path) -> str:
    seconds = record.seconds
    total = f" of {short(record.schedule.nimg_total / 1000, 6)}" if record.schedule else ""
    pairs: list[tuple[str, str]] = [("state", record.state), ("kimg", f"{short(record.kimg, 6)}{total}")]
    if seconds is not None:
        pairs.append(("time trained", clock(seconds)))
    if record.log:
        written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(log.stat().st_mtime))
        pairs.append(("last line of the log", written))
    best, note = best_row(record.metrics), ""
    if best is not None:
        name = str(main_metric(best))
        kept = "" if (record.folder / "checkpoints" / str(best["nimg"])).is_dir() else " (no longer kept)"
        pairs.append(
            ("best checkpoint", f"{short(best['nimg'] / 1000, 7)} kimg, {record.size(best['resolution'])}{kept}")
        )
        floor = number(values(best)[name].floor)
        pairs.append((f"its {name}", number_text(values(best)[name])))
        if floor is not None:
            pairs.append(("floor: reals against reals", short(floor)))
        counts = describe(provenance(best), ("num_fake", "num_real"))
        pairs.append(("measured with", f"{best.get('extractor')}; {counts}"))
    if any(stands_in(metric) for row in record.metrics if (metric := main_metric(row))):
        note = (
            "<p>A Fréchet distance from another extractor than Inception is not FID: it may be compared only with "
            "numbers of the same extractor.</p>"
        )
    return f"<header><h1>{text(record.name)}</h1></header>{facts(pairs)}{note}"


def number_text(of: Value) -> str:
    """A metric's number with its standard error."""
    value, error = number(of.value), number(of.error)
    if value is None:
        return "not computed"
    return short(value) + (f" ± {short(error, 2)}" if error is not None else "")


def _cautions(record: Record) -> str:
    found = cautions(record)
    items = "".join(
        f'<li data-about="{text(one.about)}">{text(one.says)} <span class="remedy">{text(one.remedy)}</span></li>'
        for one in found
    )
    kind = ' class="warn"' if found else ""
    return f"<section{kind}><h2>Warnings</h2>{f'<ul>{items}</ul>' if found else '<p>None.</p>'}</section>"


# Pictures


def _samples(strip: frames.Strip, record: Record, neighbours: bool) -> str:
    if not strip.frames:
        return f"<section><h2>Samples</h2><p>No sample grid yet.</p>{frames.left_out(strip)}</section>"
    link = ' <a href="#neighbours">Their nearest real neighbours</a> move along.' if neighbours else ""
    single = all(real is None for _, real in strip.shots)
    shown = frames.show(strip, "samples", "Generated pictures", record.size)
    return (
        f"<section{_alone(single)}><h2>Samples</h2><p>Always of the same latents; drag the slider, or press the arrow "
        f"keys.{link}</p>{shown}</section>"
    )


def _neighbours(strip: frames.Strip, record: Record) -> str:
    if not strip.found:
        return ""
    about = "Generated pictures with their nearest real ones"
    shown = frames.show(strip, "neighbours", about, record.size) if strip.frames else frames.left_out(strip)
    return (
        f"<section{_alone(True)}><h2>Nearest neighbours</h2><p>In each row a generated picture, left, and the real "
        "ones nearest to it. Where they are alike to the detail, the generator has learnt pictures by heart.</p>"
        f"{shown}</section>"
    )


def _alone(single: bool) -> str:
    return ' class="alone"' if single else ""


# Metrics


def _metrics(record: Record) -> str:
    names = metrics_of(record.metrics)
    if not names:
        return "<section><h2>Metrics</h2><p>Nothing has been evaluated yet.</p></section>"
    charts = "".join(draw(metric_chart(record, name)) for name in names)
    return (
        "<section><h2>Metrics</h2><p>Broken lines: what reals against reals give. Bars: one standard error to each "
        "side. Numbers that were not measured alike stand on curves of their own.</p>"
        f'<div class="charts">{charts}</div></section>'
    )


def metric_chart(record: Record, metric: str) -> Chart:
    """A metric over the run: one curve for what may be compared, and no other."""
    kinds = by_kind(record.metrics, metric)
    families = list(dict.fromkeys(kind[1:] for kind in kinds))
    names = [key for key in differing(kinds) if key != "resolution"]
    curves: list[Curve] = []
    labels: list[Label] = []
    for family, rest in enumerate(families):
        alike = [kind for kind in kinds if kind[1:] == rest]
        for place, kind in enumerate(alike):
            sizes = [record.size(kind[0]) for kind in alike]
            legend = f"{sizes[0]} to {sizes[-1]}, a curve each" if len(alike) > 1 else sizes[0]
            # Neighbours in time differ by their filling, families by colour, form and dashes.
            look = Look(family, family, 2 * (family % 2) + place % 2)
            points, floor = metric_points(kinds[kind], metric)
            name = describe(kind, ["resolution", *names], record.grid)
            shown = "" if len(kinds) == 1 else legend if place == 0 else None
            curves.append(Curve(name, points, look, floor, shown, describe(kind, names, record.grid) or metric))
        labels += [label for label in _labels(curves[-1], metric) if label.words not in [of.words for of in labels]]
    better = "less is better" if less_is_better(metric) else "more is better"
    return Chart(f"{metric}, {better}", curves, record.kimg, record.bands(), labels=labels)


def metric_points(rows: Iterable[Row], metric: str) -> tuple[list[Point], list[tuple[float, float]]]:
    """Rows in order of nimg as points over kimg with error bars, and their floors."""
    points, floor = [], []
    for row in rows:
        of, kimg = values(row)[metric], float(row["nimg"]) / 1000
        value, error, least = number(of.value), number(of.error), number(of.floor)
        around = (value - error, value + error) if value is not None and error is not None else (None, None)
        points.append(Point(kimg, value, *around))
        if least is not None:
            floor.append((kimg, least))
    return points, floor


def _labels(curve: Curve, metric: str) -> list[Label]:
    """The best number of the last curve, and its floor."""
    there = [(point.x, point.y) for point in curve.points if point.y is not None]
    less = less_is_better(metric)
    labels = [Label(*curve.floor[0], f"{floor_word(metric)} {short(curve.floor[0][1], 3)}")] if curve.floor else []
    if there:
        x, y = min(there, key=lambda point: point[1] if less else -point[1])
        labels.append(Label(x, y, short(y), above=not less))
    return labels


# The table


STATED = (*PROVENANCE, "seed", "seconds")


def _rows(record: Record) -> str:
    """A table for each extractor, whose metrics have names of their own."""
    if not record.metrics:
        return ""
    parts = []
    for extractor in dict.fromkeys(row.get("extractor") for row in reversed(record.metrics)):
        parts.append(_table(record, [row for row in record.metrics if row.get("extractor") == extractor]))
    return f'<section class="rows"><h2>Evaluations</h2>{"".join(parts)}</section>'


def _table(record: Record, rows: list[Row]) -> str:
    """rows: as they stand in the file."""
    names, best = metrics_of(rows), best_row(rows)
    rows = sorted(rows, key=lambda row: int(row["nimg"]))[::-1]
    known = [key for key in STATED if key in PROVENANCE or any(key in row for row in rows)]
    varying = [key for key in known if len({str(row.get(key)) for row in rows}) > 1]
    same = [(key, _stated(record, key, rows[0].get(key))) for key in known if key not in varying]
    head = ["kimg", *(text(name) for name in names), *varying]
    cells = [
        [
            f"{short(row['nimg'] / 1000, 7)}{' <b>best</b>' if row is best else ''}",
            *(_cell(values(row).get(name), floor_word(name)) for name in names),
            *(text(_stated(record, key, row.get(key))) for key in varying),
        ]
        for row in rows
    ]
    older = cells[NEWEST:]
    more = _folded(plural(len(older), "older row"), table(head, older)) if older else ""
    about = f"<p>Alike in {'all rows' if len(rows) > 1 else 'the one row'}:</p>{facts(same)}" if same else ""
    chosen = [row for row in rows if row is rows[0] or row is best]
    return about + table(head, cells[:NEWEST]) + more + "".join(_details(record, row) for row in chosen)


def _stated(record: Record, key: str, value: Any) -> str:
    if key == "resolution":
        return record.size(value)
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and key == "seconds":
        return f"{value:,.1f}"
    if isinstance(value, str) and len(value) == 64:  # A sha256 says enough with its beginning.
        return f"{value[:12]}…"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(of: Value | None, word: str) -> str:
    if of is None:
        return "–"
    floor = number(of.floor)
    full = f' title="{text(of.value)}"' if of.value is not None else ""
    below = f'<small>{word} {short(floor)}</small>' if floor is not None else ""
    return f"<span{full}>{number_text(of)}</span>{below}"


def _details(record: Record, row: Row) -> str:
    """By count and by class, where the row has that."""
    found = [(key, value) for key, value in row.items() if isinstance(value, Mapping)]
    parts = [draw(_by_count(key.removesuffix("_at"), of)) for key, of in found if key.endswith("_at")]
    parts += [_by_class(key.removesuffix("_by_class"), of) for key, of in found if key.endswith("_by_class")]
    if not parts:
        return ""
    place = f"{short(row['nimg'] / 1000, 7)} kimg, {record.size(row['resolution'])}"
    return _folded(f"By number of pictures and by class, {place}", f'<div class="charts">{"".join(parts)}</div>')


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _by_count(metric: str, found: Mapping[str, Any]) -> Chart:
    """Over 1/N the Frechet distance is close to a line (Chong & Forsyth 2020, arXiv 1911.07023): where that meets 0 is
    the number for pictures without end."""
    pairs = [(1 / int(n), y) for n, v in found.items() if n.isdecimal() and int(n) and (y := number(v)) is not None]
    pairs.sort()
    if len(pairs) < 2:
        return Chart(f"{metric} by number of pictures", [], 1.0)
    points = [Point(x, y) for x, y in pairs]
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in pairs) / sum((x - x_mean) ** 2 for x in xs)
    end = y_mean - slope * x_mean
    line = [Point(0.0, end), Point(xs[-1], end + slope * xs[-1])]
    ticks, last = [(0.0, "∞")], 0.0
    for x in xs:
        if x - last > 0.14 * xs[-1]:
            ticks.append((x, f"{round(1 / x):,}"))
            last = x
    return Chart(
        f"{metric} by number of pictures",
        [
            Curve("measured", points, Look(0, 0, 0), (), " "),
            Curve("line through them", line, Look(4, 1), (), f"{short(end)} at ∞"),
        ],
        1.06 * xs[-1],
        unit="pictures",
        ticks=ticks,
    )


def _by_class(metric: str, found: Mapping[str, Any]) -> str:
    """The worst first."""
    sign = -1 if less_is_better(metric) else 1
    there = sorted(((number(v), name) for name, v in found.items()), key=lambda pair: (sign * (pair[0] or 0), pair[1]))
    cells = [[text(name), short(value) if value is not None else "not computed"] for value, name in there]
    more = f"<p>and {plural(len(cells) - MOST_CLASSES, 'class')} more</p>" if len(cells) > MOST_CLASSES else ""
    shown = table(("class", text(metric)), cells[:MOST_CLASSES])
    return f"<div><h3>{text(metric)}, the worst class first</h3>{shown}{more}</div>"


# Training


LOGGED = (
    ("Losses", {"loss_g": "generator", "loss_d": "discriminator"}),
    ("Logits of the discriminator", {"logit_real": "real", "logit_fake": "generated"}),
    ("Penalty of the discriminator", {"penalty": "penalty"}),
    ("Images per second", {"img_per_sec": "images per second"}),
    ("Time spent waiting for data", {"data_wait": "waiting"}),
    ("Memory in GB, the most so far", {"gpu_mem_gb": "GPU", "cpu_mem_gb": "main process"}),
    ("Learning rates", {"lr_g": "generator", "lr_d": "discriminator"}),
)
"""Charts of log.jsonl: title, and the keys with their names."""


def _training(record: Record) -> str:
    if not record.log:
        return "<section><h2>Training</h2><p>Nothing has been logged yet.</p></section>"
    lines = len(record.log)
    size = -(-lines // curves.MOST_POINTS)
    about = f", means of {size} lines of the log with their least and greatest" if size > 1 else ""
    charts = "".join(draw(_logged(record, title, keys)) for title, keys in LOGGED)
    return (
        f"<section><h2>Training</h2><p>Over thousands of images (kimg){about}; resolutions above, fades shaded.</p>"
        f'<div class="charts">{charts}</div></section>'
    )


def _logged(record: Record, title: str, keys: Mapping[str, str]) -> Chart:
    columns = {key: [number(row.get(key)) for row in record.log] for key in keys}
    if not any(columns.get("gpu_mem_gb", ())):
        columns.pop("gpu_mem_gb", None)
    if columns.get("lr_g") is not None and columns.get("lr_g") == columns.get("lr_d"):
        columns.pop("lr_d")
        keys = {"lr_g": "both networks"}
    xs = [float(row["nimg"]) / 1000 for row in record.log]
    shown = []
    for place, (key, ys) in enumerate(columns.items()):
        last = next((y for y in reversed(ys) if y is not None), None)
        now = "" if last is None else f"{100 * last:.3g} %" if key == "data_wait" else short(last)
        shown.append(Curve(keys[key], binned(xs, ys), Look(place), (), now))
    return Chart(title, shown, record.kimg, record.bands(), percent="data_wait" in keys)


# Where it comes from


def _config(record: Record) -> str:
    if record.config is None:
        return "<section><h2>Configuration</h2><p>config.yaml cannot be read.</p></section>"
    defaults = dict(leaves(asdict(Config())))
    changed, kept = [], []
    for key, value in leaves(asdict(record.config)):
        if value == defaults[key]:
            kept.append([text(key), _yaml(value)])
        else:
            changed.append([f"<b>{text(key)}</b>", f"{_yaml(value)} <small>default: {_yaml(defaults[key])}</small>"])
    first = table(("set here", "value"), changed) if changed else "<p>All as by default.</p>"
    rest = _folded(f"{plural(len(kept), 'field')} as by default", table(("field", "value"), kept)) if kept else ""
    return f'<section class="config"><h2>Configuration</h2>{first}{rest}</section>'


def _yaml(value: Any) -> str:
    if isinstance(value, Mapping):
        return text(", ".join(f"{key}: {of}" for key, of in value.items()))
    return text("none" if value is None else str(value).lower() if isinstance(value, bool) else value)


def _environment(found: Mapping[str, Any]) -> str:
    if not found:
        return "<section><h2>Environment</h2><p>environment.json cannot be read.</p></section>"
    command, packages = found.get("command"), found.get("packages")
    pairs = [(key, _plain(value)) for key, value in found.items() if key not in ("command", "packages")]
    if isinstance(packages, Mapping):
        pairs.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items())))
    line = ""
    if isinstance(command, list):  # By word, because long text is cut.
        line = f"<h3>Command</h3><p><code>{' '.join(text(shlex.quote(str(word))) for word in command)}</code></p>"
    return f"<section><h2>Environment</h2>{facts(pairs)}{line}</section>"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


STYLE = """\
.warn { background: var(--warn); border: 1px solid var(--line); border-radius: 6px; padding: 1rem; }
.remedy { color: var(--soft); }
.rows tbody th, .rows tbody td { vertical-align: top; white-space: nowrap; }
@media (min-width: 40rem) { .rows th:not(:first-child), .rows td { padding-left: 1.4rem; } }
td small { display: block; color: var(--soft); }
td b, th b { font-weight: 600; }
.config td { white-space: normal; text-align: left; }
.config th, .config td { text-align: left; vertical-align: top; }
.rows th:first-child { position: sticky; left: 0; background: var(--back); }
header + dl { margin-top: 1rem; }
header + dl div:last-child dd { font: inherit; }
@media (min-width: 40rem) { .config small { display: inline; margin-left: 1rem; } }
a { color: var(--plain); }
"""

"""Numbers to charts: inline SVG that a page shows at any width, with the text beside it as HTML, so that it keeps its
size. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from hrgan.page import text

MOST_POINTS = 500
"""Of a curve: about as many as the pixels it is drawn on."""
LOG_FROM = 30.0
"""Positive numbers that span more than this factor are drawn on a logarithmic scale."""
COLOURS, MARKS, DASHES = 5, 4, 3
"""Looks of curves that the style below knows."""


class Point(NamedTuple):
    """A number with what lies around it."""

    x: float
    y: float | None
    """None leaves a gap."""
    low: float | None = None
    """Of its error bar, or the least of what it is the mean of."""
    high: float | None = None
    """The other end."""


class Look(NamedTuple):
    """How a curve is told from others of its chart, also by those who see no colours."""

    colour: int = 0
    dash: int = 0
    mark: int | None = None
    """None: a line alone, its ends of `low` and `high` as a band; else marks with error bars."""


PLAIN = Look()


class Label(NamedTuple):
    """Words at a place in a chart."""

    x: float
    y: float
    words: str
    above: bool = False
    """Where there is room; else below."""


@dataclass(frozen=True)
class Curve:
    """One line. Only numbers that may be compared stand on it."""

    name: str
    points: Sequence[Point]
    look: Look = PLAIN
    floor: Sequence[tuple[float, float]] = ()
    """(x, y) of the best that the number could be."""
    legend: str | None = ""
    """What the legend says beside the name; None: another curve's entry stands for this one."""
    family: str | None = None
    """The name in the legend where an entry stands for several curves."""


@dataclass(frozen=True)
class Band:
    """A stretch of training, in thousands of images."""

    start: float
    end: float
    size: str
    """Of its pictures, as people write it."""
    fading: bool


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    title: str
    curves: Sequence[Curve]
    x_to: float
    bands: Sequence[Band] = ()
    unit: str = "kimg"
    ticks: Sequence[tuple[float, str]] = ()
    """(x, words) of the x axis; none: whole numbers of the unit."""
    labels: Sequence[Label] = ()
    percent: bool = False
    note: str = ""
    x_from: float = 0.0

    def across(self, x: float) -> float:
        """Its place on the axis, from 0 to 1 where it is on it."""
        return (x - self.x_from) / (self.x_to - self.x_from)


# Numbers


def binned(xs: Sequence[float], ys: Sequence[float | None], most: int = MOST_POINTS) -> list[Point]:
    """Points of a curve; of more than `most`, means of equally many in a row with their least and greatest. A number
    that is None leaves a gap, where it stands among others in a bin it is left out."""
    size = -(-len(xs) // most) if xs else 1
    if size == 1:
        return [Point(x, y) for x, y in zip(xs, ys, strict=True)]
    points = []
    for at in range(0, len(xs), size):
        there = [y for y in ys[at : at + size] if y is not None]
        x = math.fsum(xs[at : at + size]) / len(xs[at : at + size])
        points.append(Point(x, math.fsum(there) / len(there), min(there), max(there)) if there else Point(x, None))
    return points


def short(value: float, digits: int = 4) -> str:
    """A number with so many digits that count."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:,.{digits}g}"


@dataclass(frozen=True)
class Scale:
    """Numbers from low to high, as heights from 1000 to 0."""

    low: float
    high: float
    log: bool

    def at(self, value: float) -> float:
        """The height of a number; of one outside, that of the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return 1000 - 1000 * math.log(value / self.low) / math.log(self.high / self.low)
        return 1000 - 1000 * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Two to six round numbers."""
        if not self.log:
            return round_numbers(self.low, self.high, 4)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for of in ((1, 2, 5), (1, 3), (1,)):
            found = [n * 10.0**ten for ten in decades for n in of if self.low <= n * 10.0**ten <= self.high]
            if len(found) <= 5:
                break
        return found[:: -(-len(found) // 5)]


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 multiples of 1, 2, 2.5 or 5 times a power of ten."""
    ten = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(n * ten for n in (1, 2, 2.5, 5, 10) if n * ten * most >= 0.99 * (high - low))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def scale_of(curves: Iterable[Curve]) -> Scale:
    """The scale that shows every number of the curves."""
    curves = list(curves)
    ys = [p.y for curve in curves for p in curve.points if p.y is not None]
    ends = [end for curve in curves for p in curve.points for end in (p.low, p.high) if end is not None]
    # A floor far away is drawn at the edge, so that it does not press the curves together.
    near = max(map(abs, ys))
    floors = [y for curve in curves for _, y in curve.floor]
    ends += [y for y in floors if near == 0 or near / LOG_FROM**2 < abs(y) < near * LOG_FROM]
    low, high = min([*ys, *ends]), max([*ys, *ends])
    # An error bar that reaches below 0 is cut: it must not hide all the rest.
    above = min((value for value in [*ys, *ends] if value > 0), default=0.0)
    if min(ys) > 0 and above > 0 and high / above > LOG_FROM:
        return Scale(above / 1.2, high * 1.2, True)
    if 0 <= low < 0.4 * high:
        return Scale(0.0, high * 1.06, False)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return Scale(low - margin, high + margin, False)


# Charts


def draw(chart: Chart) -> str:
    """A figure of HTML and SVG; everything in it is escaped."""
    curves = [curve for curve in chart.curves if any(point.y is not None for point in curve.points)]
    head = f"<h3>{text(chart.title)}</h3>"
    if not curves:
        return f'<figure class="chart">{head}<p>No numbers.</p></figure>'
    scale = scale_of(curves)
    note = f"<figcaption>{text(chart.note)}</figcaption>" if chart.note else ""
    ticks = chart.ticks or [(x, short(x, 6)) for x in round_numbers(chart.x_from, chart.x_to, 3)]
    lines = "".join(f'<path class="grid" d="M0 {scale.at(y):.1f}H1000"/>' for y in scale.ticks())
    shapes = "".join(_curve(curve, scale, chart) for curve in curves)
    about = text(f"{chart.title}: {', '.join(curve.name for curve in curves)}")
    return (
        f'<figure class="chart">{head}{_legend(curves)}<div class="plot" tabindex="0" '
        f'data-from="{chart.x_from:.6g}" data-to="{chart.x_to:.6g}" data-unit="{text(chart.unit)}"'
        f"{' data-percent' if chart.percent else ''}>"
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{about}">'
        f"{_bands(chart)}{lines}{shapes}</svg>{_sizes(chart)}{_heights(scale, chart.percent)}{_places(chart, ticks)}"
        f"{_labels(chart, scale)}</div>{note}</figure>"
    )


def _bands(chart: Chart) -> str:
    """Fades shaded, and a line where a resolution begins."""
    parts = []
    for band in chart.bands:
        start, end = (1000 * min(1.0, max(0.0, chart.across(kimg))) for kimg in (band.start, band.end))
        if band.fading and end > start:
            parts.append(
                f'<rect class="fade" x="{start:.2f}" y="0" width="{end - start:.2f}" height="1000">'
                f"<title>{text(band.size)} fades in</title></rect>"
            )
    for before, after in pairwise(chart.bands):
        if before.size != after.size and chart.x_from < after.start < chart.x_to:
            parts.append(f'<path class="border" d="M{1000 * chart.across(after.start):.2f} 0V1000"/>')
    return "".join(parts)


def _sizes(chart: Chart) -> str:
    """The resolutions above the plot, those left out that would run into another: the larger ones stay."""
    spans: dict[str, list[float]] = {}
    for band in chart.bands:
        if band.start < chart.x_to and band.end > chart.x_from:
            span = spans.setdefault(band.size, [max(band.start, chart.x_from), 0.0])
            span[1] = min(band.end, chart.x_to)
    parts = []
    last_wide, last_narrow = math.inf, math.inf
    for size, (start, end) in reversed(spans.items()):
        at = 100 * chart.across((start + end) / 2)
        # In per cent of the plot, which is about 300 pixels wide on a phone and 500 elsewhere.
        room = 1.5 + 1.45 * len(size)
        if last_wide - at < room:
            continue
        last_wide = at
        narrow = last_narrow - at >= 1.7 * room
        last_narrow = at if narrow else last_narrow
        parts.append(f'<span class="size{"" if narrow else " spare"}" style="left:{at:.2f}%">{text(size)}</span>')
    return "".join(reversed(parts))


def _heights(scale: Scale, percent: bool) -> str:
    def words(y: float) -> str:
        return f"{100 * y:.4g} %" if percent else f"{y / 1000:g}k" if abs(y) >= 10_000 else f"{y:,.6g}"

    return "".join(
        f'<span class="y" style="top:{scale.at(y) / 10:.2f}%">{words(y)}</span>' for y in scale.ticks()
    )


def _places(chart: Chart, ticks: Sequence[tuple[float, str]]) -> str:
    parts = []
    for number, (x, words) in enumerate(ticks):
        at = 100 * chart.across(x)
        unit = f" {chart.unit}" if number == len(ticks) - 1 else ""
        kind = "x last" if at > 88 else "x"
        parts.append(f'<span class="{kind}" style="left:{at:.2f}%">{text(words)}{text(unit)}</span>')
    return "".join(parts)


def _labels(chart: Chart, scale: Scale) -> str:
    """Those left out that would run into an earlier one on a phone."""
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for label in chart.labels:
        at = 100 * chart.across(label.x)
        height = scale.at(label.y) / 10
        if any(abs(at - x) < 22 and abs(height - y) < 9 for x, y in taken):
            continue
        taken.append((at, height))
        above = height > 12 if label.above else height > 88
        kind = f"label{' end' if at > 60 else ''}{' above' if above else ''}"
        place = f"left:{at:.2f}%;top:{height:.2f}%"
        parts.append(f'<span class="{kind}" style="{place}">{text(label.words)}</span>')
    return "".join(parts)


def _classes(look: Look) -> str:
    mark = "" if look.mark is None else f" m{look.mark % MARKS}"
    return f"c{look.colour % COLOURS} d{look.dash % DASHES}{mark}"


def _legend(curves: Sequence[Curve]) -> str:
    """The curves' names with how they look. Of one without more to say, the title is enough."""
    shown = [curve for curve in curves if curve.legend is not None]
    if len(shown) == 1 and not shown[0].legend:
        return ""
    items = []
    for curve in shown:
        marks = "" if curve.look.mark is None else '<path class="dots" d="M15 6h0"/><path class="holes" d="M15 6h0"/>'
        items.append(
            f'<li><svg class="key {_classes(curve.look)}" viewBox="0 0 30 12" aria-hidden="true"><path class="line" '
            f'd="M1 6H29"/>{marks}</svg>{text(curve.family or curve.name)} <b>{text(curve.legend)}</b></li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _curve(curve: Curve, scale: Scale, chart: Chart) -> str:
    """One <g> with its own paths, and its numbers for the script."""

    def place(x: float, y: float) -> str:
        return f"{1000 * chart.across(x):.1f} {scale.at(y):.1f}"

    there, runs = [point for point in curve.points if point.y is not None], _runs(curve.points)
    parts = []
    if curve.floor:
        d = "L".join(place(x, y) for x, y in _widened(curve.floor, chart))
        parts.append(f'<path class="floor" d="M{d}"/>')
    around = [p for p in there if p.low is not None and p.high is not None]
    if curve.look.mark is None:
        parts += [f'<path class="range" d="{_outline(run, place)}"/>' for run in runs if run[0].low is not None]
    elif around:
        bars = "".join(f"M{place(p.x, p.low or 0)}L{place(p.x, p.high or 0)}" for p in around)
        parts.append(f'<path class="bars" d="{bars}"/>')
    # A point between two gaps would be no line at all.
    lines = ("L".join(place(p.x, p.y or 0) for p in run) + ("h0" if len(run) == 1 else "") for run in runs)
    parts.append(f'<path class="line" d="{"".join(f"M{line}" for line in lines)}"/>')
    if curve.look.mark is not None:
        d = "".join(f"M{place(p.x, p.y or 0)}h0" for p in there)
        parts.append(f'<path class="dots" d="{d}"/><path class="holes" d="{d}"/>')
    return (
        f'<g class="curve {_classes(curve.look)}" data-name="{text(curve.name)}" '
        f'data-points="{_numbers(curve.points)}">{"".join(parts)}</g>'
    )


def _numbers(points: Sequence[Point]) -> str:
    """JSON of [x, y] or [x, y, low, high]."""
    listed: list[list[Any]] = []
    for p in points:
        values = p if p.low is not None and p.high is not None else p[:2]
        listed.append([None if value is None else float(f"{value:.6g}") for value in values])
    return json.dumps(listed, separators=(",", ":"), allow_nan=False)


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """The points without those that are gaps, which part them."""
    runs: list[list[Point]] = [[]]
    for point in points:
        if point.y is not None:
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _outline(run: Sequence[Point], place: Any) -> str:
    """Along the greatest and back along the least."""
    top = [place(p.x, p.high) for p in run]
    return f"M{'L'.join([*top, *(place(p.x, p.low) for p in reversed(run))])}Z"


def _widened(floor: Sequence[tuple[float, float]], chart: Chart) -> list[tuple[float, float]]:
    """So that the floor of a single point is seen, too."""
    (first, y), (last, end) = floor[0], floor[-1]
    more = 0.03 * (chart.x_to - chart.x_from)
    return [(max(chart.x_from, first - more), y), *floor, (min(chart.x_to, last + more), end)]


STYLE = """\
figcaption { font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: .6rem 2.5rem; }
.chart h3 { margin: .6rem 0 .1rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; margin: 0; padding: 0;
  font-size: .85rem; color: var(--soft); }
.legend li { margin: 0; }
.legend b { color: var(--fore); font-weight: normal; font-variant-numeric: tabular-nums; }
.key { width: 30px; height: 12px; margin-right: .35rem; }
.plot { position: relative; height: 13rem; margin: 1.5rem .3rem 1.6rem 3rem; touch-action: pan-y; outline-offset: 4px; }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible; border-bottom: 1px solid var(--grey); }
.plot span { position: absolute; font-size: .75rem; line-height: 1; color: var(--soft); white-space: nowrap;
  font-variant-numeric: tabular-nums; pointer-events: none; }
.plot .y { right: calc(100% + .45rem); transform: translateY(-50%); }
.plot .x { top: calc(100% + .45rem); transform: translateX(-50%); }
.plot .x.last { transform: translateX(-100%); }
.plot .x[style^="left:0.00"] { transform: none; }
.plot .size { bottom: calc(100% + .3rem); transform: translateX(-50%); }
.plot .label { transform: translate(.2rem, .45rem); color: var(--fore);
  text-shadow: 0 0 3px var(--back), 0 0 3px var(--back), 0 0 3px var(--back); }
.plot .label.end { transform: translate(calc(-100% + .2rem), .45rem); }
.plot .label.above { transform: translate(.2rem, calc(-100% - .7rem)); }
.plot .label.end.above { transform: translate(calc(-100% + .2rem), calc(-100% - .7rem)); }
@media (max-width: 40rem) { .plot .spare { display: none; } .plot { margin-left: 2.7rem; } }
.fade { fill: var(--grey); opacity: .13; }
.chart path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1.6px; stroke-linejoin: round; }
.chart .grid, .chart .border { stroke: var(--line); stroke-width: 1px; }
.chart .border { stroke-dasharray: 1 3; stroke: var(--grey); }
.chart .line, .chart .dots, .chart .bars, .chart .floor { stroke: var(--of); }
.chart .line { stroke-linecap: round; }
.chart .range { fill: var(--of); opacity: .18; }
.chart .bars { stroke-width: 1.2px; opacity: .75; }
.chart .floor { stroke-width: 1.2px; stroke-dasharray: 5 4; opacity: .8; }
.chart .dots { stroke-width: 7px; }
.chart .holes { stroke-width: 0; stroke: var(--back); }
.m0 .dots, .m1 .dots, .m1 .holes { stroke-linecap: round; }
.m2 .dots, .m3 .dots, .m3 .holes { stroke-linecap: square; }
.chart .m1 .holes, .chart .m3 .holes { stroke-width: 3.4px; }
.chart .d1 .line { stroke-dasharray: 7 4; } .chart .d2 .line { stroke-dasharray: 2 4; }
.c0 { --of: var(--blue); } .c1 { --of: var(--red); } .c2 { --of: var(--green); } .c3 { --of: var(--alpha); }
.c4 { --of: var(--grey); }
.chart .key.m1 .holes, .chart .key.m3 .holes { stroke-width: 3.4px; }
.key.d1 .line { stroke-dasharray: 7 4; } .key.d2 .line { stroke-dasharray: 2 4; }
.rule { position: absolute; top: 0; bottom: 0; border-left: 1px solid var(--fore); opacity: .5; pointer-events: none; }
.tip { position: absolute; top: .2rem; z-index: 1; background: var(--back); border: 1px solid var(--line);
  border-radius: 4px; padding: .2rem .5rem; font-size: .8rem; pointer-events: none; max-width: 17rem;
  font-variant-numeric: tabular-nums; }
"""
"""Look of charts, after that of every page."""

SCRIPT = """\
"use strict";
for (const plot of document.querySelectorAll(".plot")) {
  const from = +plot.dataset.from, to = +plot.dataset.to, percent = "percent" in plot.dataset;
  let curves = null, xs = [], at = -1, rule, tip;
  const words = value => value === null ? "none" : percent ? (100 * value).toFixed(1) + " %" :
    Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(5));
  const read = () => {
    curves = [...plot.querySelectorAll("g.curve")].map(curve => ({name: curve.dataset.name,
      marks: !!curve.querySelector(".dots"), points: JSON.parse(curve.dataset.points)}));
    xs = [...new Set(curves.flatMap(curve => curve.points.map(point => point[0])))].sort((a, b) => a - b);
    rule = plot.appendChild(document.createElement("div"));
    tip = plot.appendChild(document.createElement("div"));
    rule.className = "rule"; tip.className = "tip";
  };
  const line = (name, point) => {
    const [, y, low, high] = point;
    const around = low === undefined || y === null ? "" : " (" + words(low) + " to " + words(high) + ")";
    return name + ": " + words(y) + around;
  };
  const show = number => {
    at = Math.min(Math.max(number, 0), xs.length - 1);
    const x = xs[at], left = 100 * (x - from) / (to - from);
    const lines = [+x.toPrecision(6) + " " + plot.dataset.unit];
    if (plot.dataset.unit === "pictures") lines[0] = (x ? Math.round(1 / x) : "∞") + " pictures";
    for (const curve of curves)
      for (const point of curve.points) if (point[0] === x) lines.push(line(curve.name, point));
    tip.replaceChildren(...lines.map(words => { const row = document.createElement("div");
      row.textContent = words; return row; }));
    rule.style.left = left + "%";
    tip.style.left = left > 50 ? "auto" : "calc(" + left + "% + .5rem)";
    tip.style.right = left > 50 ? "calc(" + (100 - left) + "% + .5rem)" : "auto";
    rule.hidden = tip.hidden = false;
  };
  const hide = () => { if (curves) rule.hidden = tip.hidden = true; };
  const move = event => {
    if (!curves) read();
    const box = plot.getBoundingClientRect(), x = from + (to - from) * (event.clientX - box.left) / box.width;
    let best = 0;
    xs.forEach((value, number) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = number; });
    show(best);
  };
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerdown", move);
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by) return;
    if (!curves) read();
    show(at < 0 ? xs.length - 1 : at + by);
    event.preventDefault();
  });
}
"""
"""The numbers at a place, for a pointer, a finger or the arrow keys. The charts are whole without it."""

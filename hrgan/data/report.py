"""`hrgan data report`: one page, OUT/report.html, of what a finished set holds, for people to look through."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hrgan.data import manifest as manifests
from hrgan.data.folder import REPORT, SKIPPED
from hrgan.data.manifest import Manifest
from hrgan.data.survey import EXAMPLES, PICTURE_SIDE, Counts, Survey, largest, survey_of
from hrgan.page import data_url, facts, plural, table, text, whole, write_page

CHANNELS = {1: ("grey",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}
CLASS_BARS, VALUE_BARS = 100, 30
GAP = 2


def write_report(out: Path, skipped: bool = True) -> Path:
    """Make OUT/report.html for the finished set in the folder OUT, and return its path. The page needs nothing else: no
    network, no scripts.

    skipped: whether the page names files that were left out (the first of each reason); their counts are there anyway.
    Damaged samples are left out, counted and said. Raises DataError where OUT is no finished set.
    """
    out = Path(out)
    manifest = manifests.load(out)
    survey = survey_of(out, manifest)
    name = text(manifest.name)
    body = Template(MARKUP).substitute(
        name=name,
        summary=_summary(manifest),
        damage=_damage(survey),
        facts=_facts(manifest),
        tiers=_tiers(manifest),
        skipped=_skipped(out / SKIPPED, skipped),
        sizes=_source_sizes(survey),
        channels=_channels(survey),
        classes=_classes(manifest),
        attributes=_attributes(manifest),
        sheets=_sheets(survey),
    )
    return write_page(out / REPORT, whole(f"{name}: report", body, LOOK))


# The set


def _of_size(size: Sequence[int]) -> str:
    return f"{size[0]:,} × {size[1]:,}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _summary(manifest: Manifest) -> str:
    kind = {1: "grey", 3: "RGB", 4: "RGBA"}[manifest.channels]
    size = _of_size(manifest.form.size(manifest.resolution))
    classes = f" in {plural(len(manifest.classes), 'class')}" if manifest.classes else ""
    return f"{plural(manifest.num_samples, 'sample')}{classes}, {size} pixels, {kind}, {manifest.bits} bits"


def _facts(manifest: Manifest) -> str:
    form = manifest.form
    quality = f", quality {form.quality}" if form.format == "jpeg" else " (lossless)"
    found = {
        "samples": f"{manifest.num_samples:,}",
        "height × width": f"{_of_size(form.size(manifest.resolution))} pixels",
        "channels": f"{manifest.channels} ({', '.join(CHANNELS[manifest.channels])})",
        "bits": manifest.bits,
        "format": form.format + quality,
        "fit": form.fit,
        "filter": form.filter,
        "alpha": form.alpha,
        "window": form.window,
        "values": f"{manifest.values[0]} and {manifest.values[1]} are −1 and 1 in training",
        "seed": manifest.seed,
        "label": manifest.label or "none",
        "real_set": manifest.real_set,
    }
    return facts(found.items())


def _tiers(manifest: Manifest) -> str:
    rows = []
    for tier, shards in sorted(manifest.tiers.items()):
        total = sum(shard.bytes for shard in shards)
        each = _bytes(total / max(1, manifest.num_samples))
        rows.append([str(tier), _of_size(manifest.form.size(tier)), f"{len(shards):,}", _bytes(total), each])
    return table(("tier", "height × width", "shards", "size", "a sample"), rows)


def _damage(survey: Survey) -> str:
    if not survey.problems:
        return ""
    lines = "".join(f"<li>{text(problem)}</li>" for problem in survey.problems)
    return (
        '<section class="damage"><h2>Damage</h2><p>Missing from the numbers and pictures below, because they cannot be '
        f"read: {survey.damaged:,} of {plural(survey.manifest.num_samples, 'sample')}. The first problems of the "
        f"tiers looked at here (<code>hrgan data check</code> finds all):</p><ul>{lines}</ul></section>"
    )


def _skipped(path: Path, shown: bool) -> str:
    """Counts by reason of skipped.csv, with the first lines of each."""
    counts: Counter[str] = Counter()
    lines: dict[str, list[str]] = {}
    note = ""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            rows = csv.reader(file)
            next(rows, None)
            for row in rows:
                name, reason, detail = (*row, "", "", "")[:3]
                counts[reason] += 1
                first = lines.setdefault(reason, [])
                if len(first) < EXAMPLES:
                    first.append(f"<li><code>{text(name)}</code> {text(detail)}</li>")
    except FileNotFoundError:
        return f"<p>Not known: there is no {SKIPPED}.</p>"
    except (OSError, csv.Error) as error:
        note = f"<p>{SKIPPED} cannot be read to its end: {text(error)}</p>"
    if not counts:
        return note or "<p>Nothing.</p>"
    parts = []
    for reason, count in counts.most_common():
        head = f"<b>{count:,}</b> {text(reason) or 'no reason'}"
        more = f"<p>and {count - EXAMPLES:,} more in {SKIPPED}</p>" if count > EXAMPLES else ""
        listed = f"<ul>{''.join(lines[reason])}</ul>{more}" if shown else ""
        parts.append(f"<details open><summary>{head}</summary>{listed}</details>" if shown else f"<p>{head}</p>")
    return note + "".join(parts)


# Numbers


def _median(counts: Counts) -> float:
    """counts: of each whole number from 0."""
    running, total = np.cumsum(counts), int(counts.sum())
    middle = np.searchsorted(running, [(total - 1) // 2, total // 2], side="right")
    return float(middle.mean())


def _histogram(counts: Counts, edges: Sequence[int], unit: str, about: str, colour: str) -> str:
    """Inline SVG with one bar for each pair of edges, of the numbers from the first to before the second. counts: of
    each whole number from 0."""
    sums = [int(counts[low:high].sum()) for low, high in pairwise(edges)]
    top, bars = max(1, *sums), []
    for x, ((low, high), count) in enumerate(zip(pairwise(edges), sums, strict=True)):
        if count:
            height = 100 * (count / top) ** 0.5
            span = f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}"
            bars.append(
                f'<rect x="{x}.05" y="{100 - height:.1f}" width=".9" height="{height:.1f}">'
                f"<title>{span}{unit}: {count:,}</title></rect>"
            )
    return (
        f'<figure><svg class="{colour}" viewBox="0 0 {len(sums)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(about)}">{"".join(bars)}</svg>'
        f'<div class="axis"><span>{edges[0]:,}{unit}</span><span>{edges[-1] - 1:,}{unit}</span></div>'
        f"<figcaption>{text(about)}</figcaption></figure>"
    )


def _source_sizes(survey: Survey) -> str:
    if not survey.read:
        return "<p>No sample can be read.</p>"
    rows = []
    for name, counts in zip(("width", "height", "shorter side"), survey.sizes, strict=True):
        there = np.flatnonzero(counts)
        rows.append([name, f"{there[0]:,}", f"{_median(counts):,.10g}", f"{there[-1]:,}"])
    least, most = int(there[0]), int(there[-1])  # Of the shorter side, the last.
    edges = np.unique(np.geomspace(max(1, least), most + 1, 33).round().astype(int)).tolist()
    histogram = _histogram(survey.sizes[2], edges, " px", "Sources by their shorter side", "plain")
    size = _of_size(survey.manifest.form.size(survey.manifest.resolution))
    both = "both sides" if survey.manifest.form.fit == "pad" else "a side"
    return (
        f"<p>{survey.enlarged:,} of {survey.read:,} ({survey.enlarged / survey.read:.1%}) were smaller than the set's "
        f"{size} in {both} and are enlarged.</p>"
        + table(("pixels", "min", "median", "max"), rows)
        + (histogram if least < most else "")
    )


def _channels(survey: Survey) -> str:
    if not survey.read:
        return "<p>No sample can be read.</p>"
    manifest = survey.manifest
    low, high = manifest.values
    step = -((low - high - 1) // 64)  # Whole numbers, so that no bar stands for more of them than another.
    edges = [*range(low, high + 1, step), high + 1]
    rows, figures = [], []
    stored = np.arange(2**manifest.bits, dtype=np.float64)
    for name, counts in zip(CHANNELS[manifest.channels], survey.values, strict=True):
        total, there = counts.sum(), np.flatnonzero(counts)
        mean = (counts * stored).sum() / total
        deviation = (counts * (stored - mean) ** 2).sum() / total
        rows.append([name, f"{mean:,.2f}", f"{deviation**0.5:,.2f}", f"{there[0]:,}", f"{there[-1]:,}"])
        figures.append(_histogram(counts, edges, "", f"Pixels by their {name}", name))
    note = ""
    if manifest.channels == 4:
        clear = survey.values[3, 0] / survey.values[3].sum()
        note = f"<p>{clear:.2%} of the pixels are fully transparent; their colours count, too.</p>"
    size = _of_size(manifest.form.size(survey.tier))
    return (
        f"<p>Of all pixels of the {plural(survey.read, 'sample')} at {size}, in stored numbers.</p>{note}"
        + table(("channel", "mean", "standard deviation", "min", "max"), rows)
        + f'<div class="figures">{"".join(figures)}</div>'
    )


def _bars(counts: dict[str, int], most: int, noun: str) -> str:
    """The largest of the counts."""
    names, numbers = list(counts), list(counts.values())
    kept = largest(numbers, most)
    top = max(1, *numbers)
    items = "".join(
        f'<li><span class="name">{text(names[at]) or "(empty)"}</span><span class="track">'
        f'<i style="width:{100 * numbers[at] / top:.2f}%"></i></span><span class="count">{numbers[at]:,}</span></li>'
        for at in kept
    )
    rest = sum(numbers) - sum(numbers[at] for at in kept)
    left = len(names) - len(kept)
    more = f"<p>and {left:,} more {noun}, together {plural(rest, 'sample')}</p>" if left else ""
    return f'<ol class="bars">{items}</ol>{more}'


def _classes(manifest: Manifest) -> str:
    if not manifest.classes:
        return "<p>None: the set is unlabelled.</p>"
    return _bars(dict(zip(manifest.classes, manifest.class_counts, strict=True)), CLASS_BARS, "classes")


def _attributes(manifest: Manifest) -> str:
    parts = []
    for name, counts in manifest.attributes.items():
        values = _bars(counts, VALUE_BARS, "values") if counts else "<p>of too many values to count</p>"
        parts.append(f"<h3>{text(name)}</h3>{values}")
    return f"<section><h2>Attributes</h2>{''.join(parts)}</section>" if parts else ""


# Pictures


def _sheets(survey: Survey) -> str:
    manifest = survey.manifest
    height, width = manifest.form.size(survey.picture_tier)
    figures = []
    for label, pictures in survey.sheets.items():
        if pictures:
            name = text(manifest.classes[label]) if manifest.classes else ""
            count = manifest.class_counts[label] if manifest.classes else manifest.num_samples
            image = _image(pictures, f"{plural(len(pictures), 'picture')} of {f'class {name}' if name else 'the set'}")
            caption = f"{f'{name}: ' if name else ''}{len(pictures)} of {count:,}"
            figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    left = len(manifest.classes) - len(figures)
    more = f"<p>{plural(left, 'class')} more without a sheet here.</p>" if manifest.classes and left else ""
    note = "transparency shown over a checkerboard, " if manifest.channels == 4 else ""
    if manifest.bits == 16:
        note = f"{manifest.values[0]:,} shown as black and {manifest.values[1]:,} as white, "
    # One sheet takes the whole width, more stand beside each other.
    kind = "sheets" if len(figures) > 1 else "sheet"
    about = f"<p>The first in the set's order, which is random, of the tier of {_of_size((height, width))}, {note}"
    return f'{about}compressed for this page.</p><div class="{kind}">{"".join(figures)}</div>{more}'


def _image(pictures: list[NDArray[np.uint8]], about: str) -> str:
    """Pictures (h, w, 3) tiled, small ones enlarged to about 64 pixels. about: escaped."""
    factor = max(1, PICTURE_SIDE // min(pictures[0].shape[:2]))
    height, width = (factor * side for side in pictures[0].shape[:2])
    # Whole rows of 24 and 64 where they can be; on a phone, too, pictures are to be seen.
    columns = min(len(pictures), next((n for n in (8, 6, 4, 3, 2) if n * (width + GAP) <= 800), 1))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 128, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + GAP), number % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "JPEG", quality=90, subsampling=0)
    size = f'width="{sheet.shape[1]}" height="{sheet.shape[0]}"'
    return f'<img src="{data_url(buffer.getvalue(), "jpeg")}" {size} alt="{about}">'


MARKUP = """\
<header><h1>$name</h1><p>$summary</p></header>
$damage
<section><h2>Facts</h2>$facts$tiers</section>
<section><h2>Left out</h2>$skipped</section>
<section><h2>Sizes of the sources</h2>$sizes</section>
<section><h2>Channels</h2>$channels</section>
<section><h2>Classes</h2>$classes</section>
$attributes
<section><h2>Pictures</h2>$sheets</section>
<footer><p>The histograms' bars are as high as the square roots of their counts: rare values are seen, too.</p></footer>
"""

LOOK = """\
.damage { background: var(--warn); border: 1px solid var(--line); border-radius: 6px; padding: 1rem; }
figcaption, .axis { font-size: .85rem; }
figcaption { text-align: center; }
.axis { display: flex; justify-content: space-between; }
svg { display: block; width: 100%; height: 7rem; background: var(--panel); border-bottom: 1px solid var(--line); }
rect { fill: var(--plain); }
.red rect { fill: var(--red); } .green rect { fill: var(--green); } .blue rect { fill: var(--blue); }
.grey rect { fill: var(--grey); } .alpha rect { fill: var(--alpha); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0 1.5rem; }
.bars { list-style: none; margin: .5rem 0; padding: 0; columns: 26rem; column-gap: 2.5rem; }
.bars li { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr) minmax(3.5rem, auto); gap: .7rem;
  align-items: center; margin: 0; padding: .12rem 0; break-inside: avoid; }
.name { unicode-bidi: isolate; }
.track { height: .8rem; background: var(--panel); }
.track i { display: block; height: 100%; background: var(--plain); }
.count { text-align: right; font-variant-numeric: tabular-nums; }
.sheets { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr)); gap: .5rem 1.5rem; }
"""

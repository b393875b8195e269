"""Sources to a set: pictures from anywhere (see sources.py) to tiered shards with a manifest.

The same source, options and seed give byte-identical shards, whatever the listing order, the number of workers, or how
often the build was interrupted: samples are sorted by a keyed hash of their names, and results are written in that
order. Memory does not grow with the number of images: the list of files and the contents seen live in a database in
OUT, with how far the build has come: one that was stopped or killed goes on after its last whole shard.
"""

import contextlib
import csv
import io
import json
import os
import re
import sqlite3
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from hrgan.data import manifest as manifests
from hrgan.data import sources
from hrgan.data.folder import INDEX, LOCK, RELIST, SKIPPED, SPOOL, check_folder, clean, disk_errors_named, locked
from hrgan.data.index import Entry, Index
from hrgan.data.making import OTHER_SHARE, Made, Options, Result, made, shown
from hrgan.data.manifest import Form, Manifest
from hrgan.data.shards import EXTENSIONS, SetWriter, Shard
from hrgan.data.sources import Wanted
from hrgan.errors import DataError, UserError
from hrgan.sizes import levels, target
from hrgan.watch import stopped_by_signals


@dataclass(frozen=True)
class Plan:
    """Everything that decides a set besides the source's files."""

    source: str
    options: Options
    wanted: Wanted
    name: str
    drawn: int | None
    """Pictures of the drawn set, or None."""
    near: int | None
    """Bits in which the perceptual hashes of two pictures may differ to count as one; None: all are kept."""
    per_shard: int
    max_skipped: float


def identity(plan: Plan) -> dict[str, Any]:
    """What must be the same for a build to go on, and for parts to be joined. The libraries that make the pictures are
    part of it: another version may make other bytes."""
    fields = asdict(plan)
    del fields["max_skipped"]
    versions = {name: metadata.version(name) for name in ("pillow", "numpy", "pydicom")}
    same: dict[str, Any] = json.loads(json.dumps({"version": manifests.VERSION, **fields, **versions}))
    return same


def plan_of(tree: dict[str, Any], max_skipped: float) -> Plan:
    """The plan of an `identity`."""
    fields = {name: tree[name] for name in ("source", "name", "drawn", "near", "per_shard")}
    given = tree["options"]
    form = Form(**given["form"] | {name: tuple(given["form"][name]) for name in ("tiers", "grid")})
    options = Options(**given | {"form": form, "share": tuple(given["share"])})
    wanted = Wanted(tree["wanted"]["labels"], *(tuple(tree["wanted"][name]) for name in ("attributes", "crop")))
    return Plan(**fields, options=options, wanted=wanted, max_skipped=max_skipped)


def build(
    source: str,
    out: Path,
    resolution: int | str,
    *,
    name: str | None = None,
    labels: str = "none",
    attributes: tuple[str, ...] = (),
    crop: tuple[str, ...] = (),
    image_format: Literal["webp", "png", "jpeg"] | None = None,
    quality: int = 95,
    channels: int | None = None,
    bits: int = 8,
    fit: Literal["crop", "pad", "stretch"] = "crop",
    image_filter: Literal["lanczos", "box", "bicubic"] = "lanczos",
    alpha: Literal["white", "black", "keep"] = "white",
    window: str = "auto",
    min_size: int = 0,
    near: int | None = None,
    share: str = "0:1",
    max_skipped: float = 0.01,
    workers: int,
    seed: int = 0,
    shard_samples: int | None = None,
    overwrite: bool = False,
    part: str | None = None,
) -> Manifest | None:
    """Build the set `out` from `source` and return its manifest, which is written last: without it `out` is no set.

    source: see sources.py. resolution: a side, a power of two of 16 or more, or "HEIGHTxWIDTH"; a tier is stored for
    each doubling from 16 (of a base of 4) to it. labels: "none", "folder" (the first sub-folder; of the drawn set the
    shape), or the name of a field. attributes: names of fields kept with each sample. crop: names of the four fields
    that hold x, y, width and height of the part to take.
    image_format: "webp" (of 8 bits the default), "png" (of 16 bits the only one) or "jpeg". channels: 3; 1 for grey; 4
    with alpha "keep". bits: 8, or 16 with channels 1. fit, image_filter, alpha, window: see manifest.Form. min_size:
    skip images with a shorter side in pixels (0: no limit; smaller ones are enlarged). near: skip pictures whose
    perceptual hash differs from an earlier one's in at most so many of 64 bits. share: "LOW:HIGH" takes the files whose
    sha256, as a share of 2^256, lies in [LOW, HIGH), so that "0:0.9" and "0.9:1" share no file and are all together.
    max_skipped: the largest share of these images that may be skipped. workers: processes (0 or 1: this one).
    shard_samples: samples in a shard (None: 128 to 4096, by resolution). overwrite: replace a finished set in `out`;
    the old one is deleted first. part: "i/n" makes only part i of n, in `out/parts`, for parts.merge to join, and
    returns None.

    Raises UserError for wrong arguments, a missing source, an `out` that is busy or holds other files, or a full disk;
    DataError for no usable images or too many skipped (`out/skipped.csv` lists them). No error leaves a manifest
    behind.
    """
    out = Path(out)
    drawn = _drawn_count(source)
    problems = _argument_problems(
        None if drawn is not None else source, image_format, quality, bits, fit, image_filter, alpha, max_skipped
    )
    problems += _kind_problems(channels, bits, image_format, alpha)
    problems += _number_problems(workers, seed, min_size, near or 0, shard_samples)
    taken = _share(share)
    if taken is None:
        problems.append(f"share is {share!r}, expected LOW:HIGH with 0 <= LOW < HIGH <= 1, for example 0:0.9")
    if crop and len(crop) != 4:
        problems.append(f"crop is {','.join(crop)}, expected the names of four columns such as x,y,w,h")
    name = name if name is not None else _plain_name("drawn" if drawn is not None else _stem(source))
    if name != _plain_name(name):
        problems.append(f"name is {name!r}, expected letters, digits, - and _; nearest: {_plain_name(name)!r}")
    if problems or taken is None:
        raise UserError("; ".join(problems))
    grid, level = target(str(resolution))
    form = Form(
        tiers=levels(level),
        grid=grid,
        channels=channels or (1 if bits == 16 else 4 if alpha == "keep" else 3),
        bits=bits,
        format=image_format or ("png" if bits == 16 else "webp"),
        quality=quality,
        fit=fit,
        filter=image_filter,
        alpha=alpha,
        window=checked_window(window),
    )
    height, width = form.size(level)
    plan = Plan(
        source=source if drawn is not None else os.path.abspath(source),
        options=Options(form, min_size, seed, near is not None, taken),
        wanted=Wanted(labels, tuple(attributes), tuple(crop)),
        name=name,
        drawn=drawn,
        near=near,
        per_shard=shard_samples or max(128, min(4096, 2**27 // (height * width))),
        max_skipped=max_skipped,
    )
    with disk_errors_named(out), stopped_by_signals(f"{out}: building was stopped; the same command goes on"):
        out.mkdir(parents=True, exist_ok=True)
        if part is not None:
            from hrgan.data.parts import build_part

            build_part(plan, out, part, workers, overwrite)
            return None
        with locked(out / LOCK):
            return _build_whole(plan, out, workers, overwrite)


def _build_whole(plan: Plan, out: Path, workers: int, overwrite: bool) -> Manifest:
    check_folder(out, overwrite)
    index, progress = _interrupted(plan, out)
    if index is None:
        clean(out)
        index = Index(out / INDEX, plan.options.seed)
    try:
        with contextlib.closing(index):
            listed = list_source(plan, index, out)
            if index.recall("plan") is None:
                index.remember(plan=identity(plan), listing=index.listing(), progress=progress.tree())
            spool(index, progress.done, listed.pictures, out / SPOOL)
            results = made(plan.options, index.entries(progress.done), workers)
            return write_set(plan, out, index, listed, results, progress)
    except DataError:  # To be built again with other options or pictures.
        clean(out, keep=SKIPPED)
        raise


def spool(index: Index, first: int, last: int, path: Path) -> None:
    """Copy what can only be read in one go to where it can be read in any order; once, however often the build is
    interrupted after it."""
    if not index.recall("spooled"):
        path.unlink(missing_ok=True)
        sources.spool(index, first, last, path)
        index.remember(spooled=True)


class Listed(NamedTuple):
    """What a source holds: pictures, those that cannot be had besides, the classes, and each attribute's values."""

    pictures: int
    dropped: int
    classes: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]]

    @property
    def found(self) -> int:
        return self.pictures + self.dropped


def list_source(plan: Plan, index: Index, out: Path) -> Listed:
    """Put the source's pictures into the index, if it is not there from an interrupted build."""
    if index.recall("listing") is None:
        if plan.drawn is None:
            sources.list_source(index, plan.source, plan.wanted, out)
        else:
            sources.list_drawn(index, plan.drawn, plan.options.seed, plan.wanted.labels == "folder")
    pictures, dropped = index.count()
    return Listed(pictures, dropped, index.classes() if plan.wanted.labels != "none" else (), index.attributes())


# Going on


@dataclass
class Progress:
    """How far a build has come."""

    done: int = 0
    """Pictures of the source, in sample order."""
    skipped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    classes: Counter[str] = field(default_factory=Counter)
    """Samples written, by class."""
    attributes: dict[str, Counter[str]] = field(default_factory=dict)
    """The same for each attribute."""
    values: tuple[int, int] | None = None
    """Least and greatest of all samples."""
    written: int = 0
    csv_bytes: int = 0
    """Length of skipped.csv."""
    left_out: int = 0
    """Of another share."""

    def tree(self) -> dict[str, Any]:
        """To be remembered as JSON."""
        counters = {"skipped": dict(self.skipped), "classes": dict(self.classes)}
        return vars(self) | counters | {"attributes": {name: dict(counts) for name, counts in self.attributes.items()}}

    @staticmethod
    def of(tree: dict[str, Any]) -> "Progress":
        """From what was remembered."""
        counters = {name: Counter(tree[name]) for name in ("skipped", "classes")}
        attributes = {name: Counter(counts) for name, counts in tree["attributes"].items()}
        values = tuple(tree["values"]) if tree["values"] else None
        return Progress(**tree | counters | {"attributes": attributes, "values": values})


def _interrupted(plan: Plan, out: Path) -> tuple[Index | None, Progress]:
    """The index and the state of a build of the same plan and source that was interrupted in OUT; None where there is
    nothing to go on from, which is said where something is lost by that."""
    path, index, problem = out / INDEX, None, ""
    if path.exists() and not (out / manifests.FILE).exists():
        try:
            index = Index(path, plan.options.seed, resume=True)
            tree = index.recall("progress")
            if tree is not None and index.recall("plan") != identity(plan):
                problem = "it holds part of a build with other options"
            elif tree is not None and index.recall("listing") != _listing_now(plan, out):
                problem = "the source has changed since it was stopped"
            elif tree is not None:
                progress = Progress.of(tree)
                _remove_unfinished(out, index.shards(plan.options.form.tiers))
                print(f"{out}: going on after {progress.done:,} pictures", file=sys.stderr)
                return index, progress
        except (sqlite3.Error, ValueError, KeyError, TypeError):
            problem = f"{INDEX} is damaged"
    if index is not None:
        index.close()
    if problem:
        print(f"{out}: building from the start, because {problem}", file=sys.stderr)
    return None, Progress()


def _listing_now(plan: Plan, out: Path) -> str:
    path = out / RELIST
    with contextlib.closing(Index(path, plan.options.seed)) as index:
        list_source(plan, index, out)
        digest = index.listing()
    path.unlink()
    return digest


def _remove_unfinished(out: Path, finished: dict[int, tuple[Shard, ...]]) -> None:
    """Shards that were being written, and their folders' other tars."""
    for tier, shards in finished.items():
        known = {out / shard.file for shard in shards}
        for path in (out / str(tier)).glob("*.tar"):
            if path not in known:
                path.unlink()


# Writing


def write_set(
    plan: Plan, out: Path, index: Index, listed: Listed, results: Generator[Result, None, None], progress: Progress
) -> Manifest:
    """Write the pictures in their order, drop duplicates, count, and write the manifest last. The index, which notes
    the contents seen, is removed."""
    form = plan.options.form
    with disk_errors_named(out), contextlib.closing(results):
        _write_samples(plan, out, index, listed, results, progress)
    shards = index.shards(form.tiers)
    _report(out, listed.found, progress, plan.max_skipped)
    low, high = progress.values if keeps_values(form) and progress.values else (0, 2**form.bits - 1)
    labels = plan.wanted.labels
    result = Manifest(
        version=manifests.VERSION,
        name=plan.name,
        form=form,
        values=(low, max(high, low + 1) if low < 2**form.bits - 1 else high),
        seed=plan.options.seed,
        label="" if labels == "none" else labels,
        classes=listed.classes,
        class_counts=tuple(progress.classes[name] for name in listed.classes),
        attributes={
            name: {value: progress.attributes[name][value] for value in values}
            for name, values in listed.attributes.items()
        },
        num_samples=progress.written,
        real_set="",
        tiers=shards,
    )
    result = manifests.with_set_hash(result)
    manifests.save(result, out)
    index.close()
    for name in (INDEX, INDEX + "-journal", SPOOL):
        (out / name).unlink(missing_ok=True)
    return result


def keeps_values(form: Form) -> bool:
    """Whether the stored numbers are the files' own, so that their range is known only once all are made."""
    return form.bits == 16 and form.window in ("auto", "raw")


def _write_samples(
    plan: Plan, out: Path, index: Index, listed: Listed, results: Iterator[Result], progress: Progress
) -> None:
    """Write the usable pictures, and count in `progress`, which goes to the disk with each number of shards."""
    numbers = {name: label for label, name in enumerate(listed.classes)}
    form, fresh = plan.options.form, progress.csv_bytes == 0
    with open(out / SKIPPED, "wb" if fresh else "r+b") as raw:
        raw.seek(progress.csv_bytes)
        raw.truncate()
        skipped = SkippedFile(raw)
        if fresh:
            skipped.write("file", "reason", "detail")
            for path, reason, detail in index.dropped():
                progress.skipped[reason] += 1
                skipped.write(path, reason, detail)

        def finished(shards: dict[int, Shard]) -> None:
            index.add_shards((writer.number - 1) // plan.per_shard, shards)
            progress.written = writer.number

        def remember() -> None:
            progress.csv_bytes = skipped.to_disk()
            index.remember(progress=progress.tree())

        writer = SetWriter(out, plan.name, form.tiers, form.format, plan.per_shard, finished, progress.written)
        remember()
        with contextlib.closing(writer):
            for entry, made in shown(results, listed.pictures, progress.done):
                progress.done += 1
                if made.reason == OTHER_SHARE:
                    progress.left_out += 1
                    continue
                reason, detail = _why_not(plan, index, entry, made)
                if reason:
                    progress.skipped[reason] += 1
                    skipped.write(entry.path, reason, detail)
                    continue
                _count(progress, entry, made)
                about: dict[str, Any] = {"label": numbers.get(entry.group, 0), "origin": made.origin, "size": made.size}
                if entry.attributes:
                    about["attributes"] = dict(entry.attributes)
                if writer.write(made.tiers, about):
                    remember()
            writer.finish()
            remember()


def _why_not(plan: Plan, index: Index, entry: Entry, made: Made) -> tuple[str, str]:
    """(reason, detail) why a picture is left out, or two empty texts."""
    if made.reason:
        return made.reason, made.detail
    if (earlier := index.earlier(made.content, entry.path)) is not None:
        return "duplicate", f"same bytes as {earlier}"
    if plan.near is not None and (earlier := index.near(made.near, plan.near, entry.path)) is not None:
        return "near_duplicate", f"looks like {earlier}"
    return "", ""


def _count(progress: Progress, entry: Entry, made: Made) -> None:
    progress.classes[entry.group] += 1
    for name, value in entry.attributes.items():
        progress.attributes.setdefault(name, Counter())[value] += 1
    low, high = progress.values or made.values
    progress.values = min(low, made.values[0]), max(high, made.values[1])


class SkippedFile:
    """skipped.csv while it is written: file, reason, detail."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, *row: str) -> None:
        text = io.StringIO()
        csv.writer(text).writerow(row)
        self._file.write(text.getvalue().encode(errors="surrogateescape"))

    def to_disk(self) -> int:
        """Its length in bytes, which are on the disk now."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()


def _report(out: Path, found: int, progress: Progress, max_skipped: float) -> None:
    """Say what was stored and skipped; DataError when that is too little or too much."""
    skipped, stored, taken = progress.skipped, progress.written, found - progress.left_out
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    hint = "; `decoder` names packages to install" if skipped["decoder"] else ""
    wanted = skipped["near_duplicate"]  # Asked for, so not a loss.
    lost = sum(skipped.values()) - wanted
    if lost > max_skipped * taken:
        raise DataError(
            f"{lost} of {taken} images cannot be used ({reasons}), more than the share {max_skipped} allowed; "
            f"see {out / SKIPPED}{hint}, then mend or remove them or raise --max-skipped"
        )
    if not taken:
        raise DataError(f"none of {found} images lies in this share; choose a wider one")
    if not stored:
        raise DataError(f"none of {taken} images can be used ({reasons}); see {out / SKIPPED}{hint}")
    other = f", {progress.left_out} of another share" if progress.left_out else ""
    print(
        f"{found} images found{other}, {stored} stored, {taken - stored} skipped",
        reasons and f"({reasons})",
        file=sys.stderr,
    )


# Arguments


def _drawn_count(source: str) -> int | None:
    """COUNT of "drawn:COUNT", None for anything else."""
    if not str(source).startswith("drawn:"):
        return None
    count = str(source).removeprefix("drawn:")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"source is {source!r}, expected drawn:COUNT with a COUNT of 1 or more, for example drawn:2000")
    return int(count)


def _stem(source: str) -> str:
    """A folder's name, or a file's without its ending."""
    name = Path(source).resolve().name
    return name if os.path.isdir(source) else name.split(".")[0]


def _plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "set"


def _share(text: str) -> tuple[float, float] | None:
    """The two numbers of LOW:HIGH; None where it is none."""
    low, _, high = text.partition(":")
    try:
        borders = float(low), float(high)
    except ValueError:
        return None
    return borders if 0 <= borders[0] < borders[1] <= 1 else None


def checked_window(text: str) -> str:
    """The text, if it says what a window is; UserError otherwise."""
    if text in ("auto", "raw", "file"):
        return text
    from hrgan.data.images import parse_window  # with numpy, which a build of drawn pictures needs late

    parse_window(text)
    return text


def _argument_problems(
    source: str | None,
    image_format: str | None,
    quality: int,
    bits: int,
    fit: str,
    image_filter: str,
    alpha: str,
    max_skipped: float,
) -> list[str]:
    found = []
    endings = (*sources.ARCHIVES, *sources.TABLES)
    if source is not None and not os.path.isdir(source):
        if not os.path.isfile(source):
            found.append(f"source {source} is no folder and no file, expected images or drawn:COUNT")
        elif not source.lower().endswith(endings):
            found.append(f"source {source} is of no known kind, expected a folder, {', '.join(endings)}")
    for name, value, choices in (
        ("image_format", image_format or "webp", tuple(EXTENSIONS)),
        ("fit", fit, manifests.FITS),
        ("filter", image_filter, manifests.FILTERS),
        ("alpha", alpha, manifests.ALPHAS),
        ("bits", bits, (8, 16)),
    ):
        if value not in choices:
            found.append(f"{name} is {value!r}, expected {', '.join(map(str, choices))}")
    if not 1 <= quality <= 100:
        found.append(f"quality is {quality}, expected 1 to 100")
    if not 0 <= max_skipped <= 1:
        found.append(f"max_skipped is {max_skipped}, expected a share from 0 to 1")
    return found


def _number_problems(workers: int, seed: int, min_size: int, near: int, shard_samples: int | None) -> list[str]:
    found = []
    for name, value in (("workers", workers), ("seed", seed), ("min_size", min_size), ("near", near)):
        if value < 0:
            found.append(f"{name} is {value}, expected 0 or more")
    if near > 16:
        found.append(f"near is {near}, expected at most 16 of 64 bits")
    if shard_samples is not None and shard_samples < 1:
        found.append(f"shard_samples is {shard_samples}, expected 1 or more")
    return found


def _kind_problems(channels: int | None, bits: int, image_format: str | None, alpha: str) -> list[str]:
    """What channels, bits, format and alpha say against each other."""
    found = []
    if channels not in (None, 1, 3, 4):
        found.append(f"channels is {channels}, expected 1, 3 or 4")
    if bits == 16 and channels not in (None, 1):
        found.append(f"channels is {channels}, expected 1 with bits 16: only grey is kept in 16 bits")
    if bits == 16 and image_format not in (None, "png"):
        found.append(f"image_format is {image_format}, expected png with bits 16")
    if bits == 16 and alpha == "keep":
        found.append("alpha is keep, expected white or black with bits 16")
    if (channels == 4) != (alpha == "keep") and (channels is not None or bits == 8) and channels in (1, 3, 4):
        found.append(f"channels is {channels} with alpha {alpha}; 4 channels and alpha keep go together")
    if image_format == "jpeg" and (alpha == "keep" or channels == 4):
        found.append("image_format is jpeg, expected webp or png with alpha keep: JPEG has no transparency")
    return found

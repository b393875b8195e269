"""What a built set is: `manifest.json`, which describes the pictures and names the shards of each tier."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hrgan.data.shards import BLOCK, EXTENSIONS, Shard
from hrgan.errors import DataError, UserError, one_line
from hrgan.sizes import LONGEST, size_at

VERSION = 2
FILE = "manifest.json"
PARTS = "parts"
"""Folder of the parts of a set that is not joined yet."""
REBUILD = "build the set again with --overwrite"


FITS, FILTERS, ALPHAS = ("crop", "pad", "stretch"), ("lanczos", "box", "bicubic"), ("white", "black", "keep")


@dataclass(frozen=True)
class Form:
    """How the pictures of a set are made and stored.

    grid: (height, width) of the base that doubles; tiers: levels, powers of two from 16. Level r has
    grid * r / 4 pixels, so on the usual 4 x 4 grid a level is the side in pixels.
    channels: 1 grey, 3 RGB, 4 RGBA. bits: 8, or 16 for grey.
    format: "webp" or "png" (lossless), or "jpeg" with `quality` 1 to 100.
    fit: how a picture of another shape becomes this one: "crop" (the central part), "pad", "stretch".
    filter: "lanczos", "box" or "bicubic", antialiased. alpha: what transparency is laid over, "white" or "black", or
    "keep" for 4 channels. window: which grey values become black and white, see images.Window.
    """

    tiers: tuple[int, ...]
    grid: tuple[int, int]
    channels: int
    bits: int
    format: str
    quality: int
    fit: str
    filter: str
    alpha: str
    window: str

    def size(self, level: int) -> tuple[int, int]:
        """(height, width) in pixels of a level."""
        return size_at(self.grid, level)


@dataclass(frozen=True)
class Manifest:
    """The description of a built set.

    values: the stored numbers that become -1 and 1 in training: [0, 255], [0, 65535], or of 16-bit pictures that keep
    their own values the least and greatest of the set.
    label: what the classes are: "" (unlabelled), "folder", or the name of a column. classes: its values, sorted.
    attributes: name -> {value: samples} of what else is stored with each sample; {} for one of too many values.
    tiers: level -> its shards, the same samples in each. real_set: sha256 (hex) of everything that defines the
    pictures.
    """

    version: int
    name: str
    form: Form
    values: tuple[int, int]
    seed: int
    label: str
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    attributes: dict[str, dict[str, int]]
    num_samples: int
    real_set: str
    tiers: dict[int, tuple[Shard, ...]]

    @property
    def channels(self) -> int:
        return self.form.channels

    @property
    def bits(self) -> int:
        return self.form.bits

    @property
    def resolution(self) -> int:
        """The largest level."""
        return max(self.tiers)

    @property
    def extension(self) -> str:
        """The ending of the image members, e.g. "webp"."""
        return EXTENSIONS[self.form.format]

    @cached_property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples of each shard, the same in every tier."""
        return tuple(shard.samples for shard in self.tiers[self.resolution])

    def tier_for(self, resolution: int) -> int:
        """The smallest stored tier of at least `resolution` (4 and 8 read 16); DataError when the set has none."""
        fitting = [tier for tier in self.tiers if tier >= resolution]
        if not fitting:
            raise DataError(
                f"the set {self.name} goes up to {self.resolution}, asked for {resolution}; "
                f"train to {self.resolution} or build with --resolution {resolution}"
            )
        return min(fitting)

    def label_classes(self, label: str | None) -> tuple[str, ...]:
        """The class names of an attribute, or of the set's own label for None. UserError for what the set has not."""
        if label is None or label == self.label:
            return self.classes
        if not self.attributes.get(label):
            known = [self.label, *(name for name, counts in self.attributes.items() if counts)]
            raise UserError(
                f"data.label: the set {self.name} has no classes {label!r}; it has "
                f"{', '.join(name for name in known if name) or 'none: build it with --labels or --attributes'}"
            )
        return tuple(self.attributes[label])


def set_hash(manifest: Manifest) -> str:
    """`real_set`: sha256 over the ordered shard hashes and the fields that define the pictures."""
    form = dataclasses.asdict(manifest.form)
    fields = [manifest.version, form, manifest.values, manifest.label, manifest.classes]
    hashes = [(tier, [shard.sha256 for shard in manifest.tiers[tier]]) for tier in sorted(manifest.tiers)]
    return hashlib.sha256(json.dumps([fields, hashes], sort_keys=True).encode()).hexdigest()


def with_set_hash(manifest: Manifest) -> Manifest:
    """The manifest with its `real_set` filled in."""
    return dataclasses.replace(manifest, real_set=set_hash(manifest))


def save(manifest: Manifest, root: Path) -> None:
    """Write `root/manifest.json` so that a reader sees the whole file or none."""
    temporary = root / (FILE + ".tmp")
    with open(temporary, "w") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / FILE)
    folder = os.open(root, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(root: Path) -> Manifest:
    """Read and validate `root/manifest.json`; a one-line DataError names the file, what was found and what to do."""
    path = Path(root) / FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        remedy = f"run: hrgan data build SRC {root}, or name the folder where the set is now"
        if (Path(root) / PARTS).is_dir():
            remedy = f"its parts are not joined yet: run hrgan data merge {root}"
        raise DataError(f"{path} is missing, so {root} is no finished set; {remedy}") from None
    except NotADirectoryError:
        raise DataError(f"{root} is a file, expected the folder of a set; run: hrgan data build SRC OUT") from None
    except OSError as error:
        raise DataError(f"{path} is unreadable ({error}); {REBUILD}") from None
    return parse(content, str(path))


def parse(content: bytes, path: str) -> Manifest:
    """A manifest from the bytes of its file. path: for messages."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is unreadable ({one_line(error)}); {REBUILD}") from None
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != VERSION:
        found = one_line(version, 20)
        raise DataError(f"{path}: version is {found}, expected {VERSION}; build the set again with this hrgan")
    names = {field.name for field in dataclasses.fields(Manifest)}
    missing = sorted(names - set(fields))
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} missing, expected every field; {REBUILD}")
    try:
        manifest = Manifest(**{name: _typed(name, fields[name]) for name in names})
        wrong = _contradiction(manifest)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise DataError(f"{path}: a field has the wrong shape ({one_line(repr(error))}); {REBUILD}") from None
    if wrong:
        raise DataError(f"{path}: its {wrong} contradict each other or are out of range; {REBUILD}")
    return manifest


def _typed(name: str, value: Any) -> Any:
    """A field as the dataclass has it, from JSON. Raises what `parse` catches."""
    if name == "tiers":
        return {int(tier): tuple(_shard(**shard) for shard in shards) for tier, shards in value.items()}
    if name == "form":
        form = value | {"tiers": tuple(map(int, value["tiers"])), "grid": tuple(map(int, value["grid"]))}
        form |= {key: int(value[key]) for key in ("channels", "bits", "quality")}
        return Form(**form | {key: str(value[key]) for key in ("format", "fit", "filter", "alpha", "window")})
    if name in ("classes", "values", "class_counts"):
        kind = str if name == "classes" else int
        return tuple(kind(item) for item in value)
    if name == "attributes":
        return {
            str(key): {str(item): int(count) for item, count in counts.items()} for key, counts in value.items()
        }
    return {"version": int, "seed": int, "num_samples": int}.get(name, str)(value)


def _shard(file: str, samples: int, bytes: int, sha256: str) -> Shard:
    """Checked, because it names a file to open: nothing outside of the set's folder."""
    if not isinstance(file, str) or file.startswith("/") or ".." in file.split("/") or "\0" in file:
        raise ValueError(f"shard file {file!r}")
    file.encode()  # Half a surrogate pair is no name.
    if not 1 <= int(samples) <= int(bytes) // BLOCK or len(sha256) != 64 or not isinstance(sha256, str):
        raise ValueError(f"shard {file!r} of {samples} samples in {bytes} bytes")
    return Shard(file, int(samples), int(bytes), sha256)


def _contradiction(manifest: Manifest) -> str | None:
    """What cannot be right about the fields together, or None."""
    form = manifest.form
    counts = {tuple(shard.samples for shard in shards) for shards in manifest.tiers.values()}
    if counts != {manifest.shard_samples} or sum(manifest.shard_samples) != manifest.num_samples:
        return "tiers and samples"
    if form.tiers != tuple(sorted(manifest.tiers)) or form.format not in EXTENSIONS or len(form.grid) != 2:
        return "tiers, grid or format"
    if any(tier < 16 or tier & (tier - 1) for tier in form.tiers) or not all(1 <= x <= LONGEST for x in form.grid):
        return "tiers or grid"
    if (form.channels, form.bits) not in ((1, 8), (3, 8), (4, 8), (1, 16)):
        return "channels and bits"
    known = form.fit in FITS and form.filter in FILTERS and form.alpha in ALPHAS
    if not known or (form.channels == 4) != (form.alpha == "keep"):
        return "fit, filter, alpha and channels"
    if len(manifest.values) != 2 or not 0 <= manifest.values[0] < manifest.values[1] < 2**form.bits:
        return "values and bits"
    if len(manifest.classes) != len(manifest.class_counts) or len(set(manifest.classes)) != len(manifest.classes):
        return "classes and class_counts"
    return None


def info(manifest: Manifest) -> dict[str, Any]:
    """What `hrgan data info` prints: classes as {name: count}, tiers as {level: {"shards": n, "bytes": b}}."""
    tiers = {
        tier: {"shards": len(shards), "bytes": sum(shard.bytes for shard in shards)}
        for tier, shards in sorted(manifest.tiers.items())
    }
    form = dataclasses.asdict(manifest.form)
    del form["tiers"]
    height, width = manifest.form.size(manifest.resolution)
    return {
        "name": manifest.name,
        "num_samples": manifest.num_samples,
        "resolution": manifest.resolution,
        "height": height,
        "width": width,
        **form,
        "grid": list(manifest.form.grid),
        "values": list(manifest.values),
        "seed": manifest.seed,
        "real_set": manifest.real_set,
        "label": manifest.label,
        "classes": dict(zip(manifest.classes, manifest.class_counts, strict=True)),
        "attributes": manifest.attributes,
        "tiers": tiers,
    }

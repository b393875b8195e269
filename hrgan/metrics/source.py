"""Where the pictures of a comparison come from: a generator, a set of shards, or a folder of files. All are 8-bit
pictures by place, so that a comparison does not depend on the number of processes.

What they become on the way: a generator's numbers are rounded to 0..255 from [-1, 1]; stored numbers (of 16 bits, too)
are taken to [-1, 1] by the set's own `values` first; grey goes to three equal channels and transparency is laid over
white, in pictures.to_rgb.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from hrgan.config import Config
from hrgan.data.dataset import Dataset
from hrgan.data.images import Unusable, make_tiers, read_picture
from hrgan.data.manifest import Form
from hrgan.data.sources import ENDINGS
from hrgan.data.stream import read_range, stored_numbers
from hrgan.errors import DataError, UserError
from hrgan.noise import draw, latents
from hrgan.pictures import to_float, to_uint8
from hrgan.sizes import size_at


class Part(NamedTuple):
    """Some pictures of a source, in the order of their places."""

    images: Tensor
    """(n, C, H, W) uint8."""
    places: Tensor
    """(n,) int64, from 0."""
    labels: Tensor | None
    """(n,) int64; None without classes."""
    bad: tuple[str, ...] = ()
    """A line for each picture that was left out."""
    taint: Tensor | None = None
    """() 0, or NaN where the pictures hold numbers that are none."""


@dataclass(frozen=True)
class Source:
    """One side of a comparison."""

    where: str
    """For people."""
    count: int
    """Pictures."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    level: int
    """That size as a level of its grid (sizes.py); of a folder's pictures as they are, their height."""
    read: Callable[[int, int], Iterator[Part]]
    """The pictures of the places [start, stop), with those that can be read."""
    identity: str
    """sha256 of everything that the pictures are; "" where no statistics of them are kept."""
    classes: tuple[str, ...] = ()
    """What the labels mean."""
    labels: str = "none"
    """Where they are from, for people."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of the classes, where a generator draws its labels from them."""
    mirror: bool = False
    """Whether each picture is there a second time, flipped: places 2i and 2i + 1."""
    max_bad: float = 0.01
    """Largest share of pictures that may be left out."""

    def sample(self, places: Tensor) -> Tensor:
        """The pictures that places show: with `mirror` two places show one."""
        return places // 2 if self.mirror else places

    def picture(self, place: int) -> Tensor:
        """(C, H, W) uint8."""
        return next(self.read(place, place + 1)).images[0]


def from_generator(
    config: Config,
    generator: nn.Module,
    alpha: float,
    level: int,
    where: str,
    shares: Mapping[str, float] | None = None,
    role: str = "eval",
    identity: str = "",
) -> Source:
    """`eval.num_fake` pictures of the latents that (seed, role, place) decides, without truncation. shares: of the
    reals' classes, from which labels are drawn; None for a generator without classes. identity: as of a Source."""
    device = next(generator.parameters()).device

    def read(start: int, stop: int) -> Iterator[Part]:
        for first in range(start, stop, config.eval.batch):
            last = min(first + config.eval.batch, stop)
            z = latents(first, last, config.network.latent, config.seed, role).to(device)
            labels = draw_labels(list(shares.values()), first, last, config.seed) if shares else None
            with torch.no_grad():
                images = generator(z, None if labels is None else labels.to(device), alpha)
            yield Part(to_uint8(images), torch.arange(first, last), labels, taint=0 * images.double().sum())

    labelled = "drawn as often as in the reals" if shares else "none"
    size = size_at(config.network.grid, level)
    return Source(where, config.eval.num_fake, size, level, read, identity, tuple(shares or ()), labelled)


def draw_labels(shares: Sequence[float], start: int, stop: int, seed: int) -> Tensor:
    """(stop - start,) int64: labels of generated pictures, each decided by (seed, place), as often as in the reals."""
    borders = torch.tensor(shares, dtype=torch.float64).cumsum(0) / sum(shares)
    chance = torch.stack([draw(torch.rand, (), seed, "eval labels", place) for place in range(start, stop)])
    return torch.searchsorted(borders, chance.double(), right=True).clamp(max=len(shares) - 1)


def from_dataset(config: Config, dataset: Dataset, resolution: int, count: int | None = None) -> Source:
    """The first `count` samples in stored order; None: all of them."""

    def read(start: int, stop: int) -> Iterator[Part]:
        # The samples of a mix follow each other in another order than their numbers do.
        numbers, order = torch.sort(stored_numbers(dataset, start, stop))
        workers = config.data.workers if stop - start > config.eval.batch else 0
        for batch in read_range(dataset, resolution, start, stop, batch=config.eval.batch, workers=workers):
            images = to_uint8(to_float(batch.images, dataset.values))
            places = start + order[torch.searchsorted(numbers, batch.samples)]
            yield Part(images, places, batch.labels if dataset.classes else None, batch.bad)

    return Source(
        dataset.where,
        min(count or dataset.num_samples, dataset.num_samples),
        dataset.form.size(resolution),
        resolution,
        read,
        dataset.real_set,
        dataset.classes,
        (f"{dataset.label} of the set" if dataset.label else "the set") if dataset.classes else "none",
        max_bad=config.data.max_bad,
        shares=dataset.class_shares,
    )


def reference(config: Config, dataset: Dataset, resolution: int) -> Source:
    """The reals of a set as eval.num_real and eval.mirror have them."""
    source = from_dataset(config, dataset, resolution, config.eval.num_real)
    return mirrored(source) if config.eval.mirror else source


def mirrored(source: Source) -> Source:
    """Each picture twice: as it is, and flipped left to right."""

    def read(start: int, stop: int) -> Iterator[Part]:
        for part in source.read(start // 2, -(-stop // 2)):
            images = torch.stack([part.images, part.images.flip(3)], 1).flatten(0, 1)
            places = (2 * part.places.unsqueeze(1) + torch.arange(2)).flatten()
            labels = part.labels.repeat_interleave(2) if part.labels is not None else None
            kept = (places >= start) & (places < stop)
            yield Part(images[kept], places[kept], None if labels is None else labels[kept], part.bad)

    return replace(source, count=2 * source.count, read=read, mirror=True)


# Folders


def pictures_in(folder: Path) -> list[Path]:
    """Files of pictures, in folders below too, by name; without the grid that `hrgan generate` makes of them."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.name != "grid.png")


PLAIN = Form((16,), (4, 4), 3, 8, "png", 0, "crop", "lanczos", "white", "auto")
"""How files are read where no set says: 8-bit RGB, transparency over white."""


def from_folder(
    config: Config,
    folder: Path,
    form: Form | None,
    values: tuple[int, int] = (0, 255),
    count: int | None = None,
    hashed: bool = True,
) -> Source:
    """Files of pictures: made as `form` makes those of a set (its only tier), or without one as they are, all of one
    size. The first sub-folder's name is the class, where all lie in one. hashed: whether its identity is needed."""
    files = pictures_in(folder)[:count]
    if len(files) < 2:
        raise DataError(f"{folder}: {len(files)} picture{'s' * (len(files) != 1)}, expected at least 2")
    size = form.size(form.tiers[0]) if form else _size_of(files[0])
    names = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in files]
    classes = tuple(sorted(set(names))) if all(names) else ()
    labels = torch.tensor([classes.index(name) for name in names]) if classes else None

    def read(start: int, stop: int) -> Iterator[Part]:
        loader = DataLoader(
            _Files(files, start, stop, form, values),
            batch_size=config.eval.batch,
            num_workers=max(0, min(config.data.workers, stop - start - 1)),
            collate_fn=list,
        )
        for batch in loader:
            good = [(place, pixels) for place, pixels in batch if not isinstance(pixels, str)]
            bad = tuple(pixels for _, pixels in batch if isinstance(pixels, str))
            for place, pixels in good:
                if pixels.shape[1:] != size:
                    found, expected = ("x".join(map(str, reversed(shape))) for shape in (pixels.shape[1:], size))
                    raise UserError(
                        f"{files[place]}: {found} pixels, but {files[0]} has {expected}; make them one size with "
                        "--resolution, or build a set of them with hrgan data build"
                    )
            if good:
                places = torch.tensor([place for place, _ in good])
                kept = labels[places] if labels is not None else None
                yield Part(torch.stack([pixels for _, pixels in good]), places, kept, bad)
            elif bad:
                yield Part(torch.empty(0, 3, *size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), None, bad)

    made = _hash(files, repr((form, values, names if classes else ()))) if hashed else ""
    level = form.tiers[0] if form else size[0]
    return Source(str(folder), len(files), size, level, read, made, classes, "the folders" if classes else "none")


def _size_of(file: Path) -> tuple[int, int]:
    picture = _read_file(file, None, (0, 255))
    if isinstance(picture, str):
        raise DataError(f"{picture}; the first picture of the folder must be readable")
    return picture.shape[1], picture.shape[2]


class _Files(TorchDataset[tuple[int, "Tensor | str"]]):
    """Decoded pictures by place, or why one cannot be."""

    def __init__(self, files: list[Path], start: int, stop: int, form: Form | None, values: tuple[int, int]) -> None:
        self.files, self.start, self.stop, self.form, self.values = files, start, stop, form, values

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        place = self.start + index
        return place, _read_file(self.files[place], self.form, self.values)


def _read_file(file: Path, form: Form | None, values: tuple[int, int]) -> Tensor | str:
    """(C, H, W) uint8, or a line."""
    try:
        picture = read_picture(file.read_bytes(), form or PLAIN)
        if form is None:
            pixels = np.asarray(picture.image)
        else:
            (pixels,) = make_tiers(picture, form).images
    except Unusable as error:
        return f"{file}: {': '.join(map(str, error.args))}"
    return to_uint8(to_float(torch.from_numpy(pixels.copy()).permute(2, 0, 1), values))


def _hash(files: list[Path], form: str) -> str:
    """Of the files' contents and how they are made."""
    digest = hashlib.sha256(form.encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def say_bad(lines: tuple[str, ...]) -> None:
    """Name the pictures that were left out."""
    for line in lines:
        print(f"left out: {line}", file=sys.stderr)

"""What a finished set holds, from one pass over its samples.

What is kept of them does not grow with their number: exact counts of the stored values (all the statistics follow from
those), counts of the sources' sizes, and the first pictures of some classes. The order of a set is that of a hash, so
the first are as good as drawn at random.
"""

import contextlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hrgan.data.images import Pixels, decode
from hrgan.data.manifest import Manifest
from hrgan.data.shards import BadSample, ShardReader, parse_meta
from hrgan.errors import DataError

EXAMPLES = 5
"""Lines kept of the damage found."""
SHEETS, SHEET, UNLABELLED_SHEET = 40, 24, 64
"""Contact sheets at most, pictures on one of them, and on the only one of a set without classes."""
STATISTICS_SIDE, PICTURE_SIDE = 32, 64
"""Pixels that the shorter side of the tier has at least from which statistics and contact sheets are made."""
LONGEST = 2**18 - 1
"""Pixels; longer sides of sources are counted as this one."""

Counts = NDArray[np.int64]


@dataclass
class Survey:
    """What is known of the samples that have passed."""

    manifest: Manifest
    tier: int
    """Of the statistics."""
    picture_tier: int
    """Of the contact sheets."""
    values: Counts
    """(channels, 2**bits): pixels of each stored value."""
    sizes: Counts
    """(3, LONGEST + 1): sources of each width, height and shorter side."""
    sheets: dict[int, list[NDArray[np.uint8]]]
    """Label -> pictures (h, w, 3)."""
    sheet: int
    """Pictures wanted on a sheet."""
    read: int = 0
    enlarged: int = 0
    damaged: int = 0
    problems: list[str] = field(default_factory=list)
    """The first few."""

    def wants(self, label: int) -> bool:
        """Whether a picture of this class is still to be shown."""
        return label in self.sheets and len(self.sheets[label]) < self.sheet

    def add(self, pixels: Pixels, source: tuple[int, int]) -> None:
        """pixels: (h, w, C); source: width and height."""
        self.read += 1
        for channel, counts in enumerate(self.values):
            counts += np.bincount(pixels[..., channel].ravel(), minlength=len(counts))
        sides = (*source, min(source))
        self.sizes[range(3), [max(0, min(side, LONGEST)) for side in sides]] += 1
        height, width = self.manifest.form.size(self.manifest.resolution)
        narrower, lower = source[0] < width, source[1] < height
        # Padding ends where the first side fits, cropping and stretching where both are filled.
        self.enlarged += (narrower and lower) if self.manifest.form.fit == "pad" else (narrower or lower)

    def lost(self, samples: int, problem: str) -> None:
        self.damaged += samples
        if len(self.problems) < EXAMPLES:
            self.problems.append(problem)


def survey_of(out: Path, manifest: Manifest) -> Survey:
    """Read the samples of the finished set in the folder OUT. What is damaged is left out and counted."""
    labels = largest(manifest.class_counts, SHEETS) if manifest.classes else [0]
    survey = Survey(
        manifest=manifest,
        tier=_tier_of(manifest, STATISTICS_SIDE),
        picture_tier=_tier_of(manifest, PICTURE_SIDE),
        values=np.zeros((manifest.channels, 2**manifest.bits), np.int64),
        sizes=np.zeros((3, LONGEST + 1), np.int64),
        sheets={label: [] for label in sorted(labels)},
        sheet=SHEET if manifest.classes else UNLABELLED_SHEET,
    )
    for shard, samples in enumerate(manifest.shard_samples):
        before = survey.read + survey.damaged
        try:
            _read_shard(out, survey, shard)
        except (DataError, OSError) as error:  # What follows in the shard cannot be found.
            survey.lost(before + samples - survey.read - survey.damaged, str(error).replace(f"{out}{os.sep}", ""))
    return survey


def _tier_of(manifest: Manifest, side: int) -> int:
    """The smallest tier whose shorter side has so many pixels, else the largest there is."""
    return min((tier for tier in manifest.tiers if min(manifest.form.size(tier)) >= side), default=manifest.resolution)


def _read_shard(out: Path, survey: Survey, shard: int) -> None:
    """Raises DataError or OSError where the shard cannot be read on."""
    manifest, form = survey.manifest, survey.manifest.form
    with contextlib.ExitStack() as stack:

        def opened(tier: int) -> ShardReader:
            file, samples = manifest.tiers[tier][shard].file, manifest.shard_samples[shard]
            stream = stack.enter_context(open(out / file, "rb"))
            return ShardReader(stream, file, sum(manifest.shard_samples[:shard]), samples, manifest.extension)

        reader, pictures = opened(survey.tier), opened(survey.picture_tier)
        offsets = array("q", [0])
        while reader.index < manifest.shard_samples[shard]:
            index, sample = reader.index, reader.read()
            try:
                meta = parse_meta(sample, len(manifest.classes))
                pixels = decode(sample.image, form, survey.tier)
                if survey.wants(meta.label):
                    pictures.go_to(index, offsets)
                    larger = pictures.read()
                    parse_meta(larger, len(manifest.classes))
                    shown = decode(larger.image, form, survey.picture_tier)
                    survey.sheets[meta.label].append(_to_rgb(shown, manifest.values))
            except BadSample as error:
                survey.lost(1, f"{manifest.tiers[survey.tier][shard].file}: sample {sample.key}: {error}")
                continue
            survey.add(pixels, meta.size)
        reader.finish()


def _to_rgb(pixels: Pixels, values: tuple[int, int]) -> NDArray[np.uint8]:
    """A stored picture (h, w, C) as people see it (h, w, 3): transparency over a light checkerboard, 16 bits with the
    set's least and greatest value as black and white."""
    levels: NDArray[np.floating] = pixels.astype(np.float32)
    if pixels.dtype == np.uint16:
        levels = (levels - values[0]) * (255 / (values[1] - values[0]))
    if pixels.shape[2] == 4:
        rows, columns = np.indices(pixels.shape[:2]) // 8
        board = np.where((rows + columns) % 2, 222, 250)[..., None]
        share = levels[..., 3:] / 255
        levels = levels[..., :3] * share + board * (1 - share)
    rgb = np.broadcast_to(levels, (*levels.shape[:2], 3))
    rounded: NDArray[np.uint8] = np.floor(np.clip(rgb, 0, 255) + 0.5).astype(np.uint8)
    return rounded


def largest(counts: Sequence[int], most: int) -> list[int]:
    """Positions of the largest counts, the largest first."""
    return sorted(range(len(counts)), key=lambda position: (-counts[position], position))[:most]

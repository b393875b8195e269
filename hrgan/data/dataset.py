"""What `data.path` names: a set of shards, or several that are read as one."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from hrgan.config import CHUNK, DataConfig
from hrgan.data import manifest as manifests
from hrgan.data.index import in_order
from hrgan.data.manifest import Form, Manifest
from hrgan.data.order import Mix
from hrgan.data.store import Access, Missing, Store
from hrgan.errors import DataError, UserError


class Member(NamedTuple):
    """One set: where its files are, and what they are."""

    store: Store
    manifest: Manifest


@dataclass(frozen=True)
class Dataset:
    """Sets that are read as one: of the same form, but for their sizes and how they came to be.

    weights: the share of each, in any unit. label: the attribute that the labels are, None for each set's own.
    """

    members: tuple[Member, ...]
    weights: tuple[float, ...]
    label: str | None = None

    @property
    def where(self) -> str:
        """For people."""
        return " + ".join(member.store.where for member in self.members)

    @property
    def form(self) -> Form:
        return self.members[0].manifest.form

    @property
    def values(self) -> tuple[int, int]:
        """The stored numbers that are -1 and 1 in training."""
        return self.members[0].manifest.values

    @cached_property
    def resolution(self) -> int:
        """The largest level that all sets have."""
        return min(member.manifest.resolution for member in self.members)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Of all sets, by name; none where a set has none."""
        first, *rest = (member.manifest.label_classes(self.label) for member in self.members)
        if not all((first, *rest)):
            return ()
        return first if all(names == first for names in rest) else in_order(set(first).union(*rest))

    @cached_property
    def class_shares(self) -> dict[str, float]:
        """How often each class is met; {} without classes."""
        found = dict.fromkeys(self.classes, 0.0)
        for member, weight in zip(self.members, self.weights, strict=True):
            manifest = member.manifest
            own = self.label is None or self.label == manifest.label
            counts = (
                dict(zip(manifest.classes, manifest.class_counts, strict=True))
                if own
                else manifest.attributes[str(self.label)]
            )
            for name in found:
                found[name] += weight / sum(self.weights) * counts.get(name, 0) / max(1, sum(counts.values()))
        return found

    @cached_property
    def num_samples(self) -> int:
        """Of one set all; of a mix as many as can be had in its shares without showing one twice."""
        if len(self.members) == 1:
            return self.members[0].manifest.num_samples
        return CHUNK * self.mix(0).chunks(tuple(member.manifest.num_samples // CHUNK for member in self.members))

    @cached_property
    def real_set(self) -> str:
        """sha256 (hex) of everything that defines the pictures."""
        sets = [member.manifest.real_set for member in self.members]
        if len(sets) == 1:
            return sets[0]
        return hashlib.sha256(repr((sets, self.mix(0).shares)).encode()).hexdigest()

    def mix(self, seed: int) -> Mix:
        """Which set each chunk is from."""
        return Mix(self.weights, seed)

    def stats_folder(self) -> Path:
        """Where statistics of the pictures are cached, if it can be written."""
        return self.members[0].store.stats_folder()

    def check_tier(self, resolution: int) -> None:
        """DataError where a shard that this resolution reads is not there whole (of remote sets only what the manifest
        says is known)."""
        for store, manifest in self.members:
            for shard in manifest.tiers[manifest.tier_for(resolution)]:
                problem = store.size_problem(shard.file, shard.bytes)
                if problem:
                    raise DataError(f"{problem}; copy the set again or rebuild it")


def open_set(path: str, access: Access = Access()) -> Member:  # noqa: B008, it is frozen
    """A set in a folder or at a URL. DataError where there is none."""
    store = Store(path, access)
    if store.local_root is not None:
        return Member(store, manifests.load(store.local_root))
    name = store.describe(manifests.FILE)
    try:
        content = store.read(manifests.FILE)
    except Missing:
        raise DataError(f"{name} is missing, so no finished set is there; name where one is now") from None
    return Member(store, manifests.parse(content, name))


def open_dataset(config: DataConfig) -> Dataset:
    """The sets of a configuration. UserError for sets that do not go together."""
    given = config.path
    paths: Mapping[str, float] = given if isinstance(given, dict) else {given: 1.0}
    access = Access(config.cache, config.cache_gb, config.timeout_seconds, config.retries, config.allow_pipe)
    members = tuple(open_set(path, access) for path in paths)
    dataset = Dataset(members, tuple(float(weight) for weight in paths.values()), config.label)
    _check_alike(dataset)
    if len(members) > 1:
        dataset.mix(0)
    if isinstance(config.label, str):
        for member in members:
            member.manifest.label_classes(config.label)
    return dataset


def _check_alike(dataset: Dataset) -> None:
    first = dataset.members[0]
    for member in dataset.members[1:]:
        for name, found, expected in (
            ("channels", member.manifest.channels, first.manifest.channels),
            ("bits", member.manifest.bits, first.manifest.bits),
            ("grid", list(member.manifest.form.grid), list(first.manifest.form.grid)),
            ("values", list(member.manifest.values), list(first.manifest.values)),
        ):
            if found != expected:
                raise UserError(
                    f"data.path: {member.store.where} has {name} {found}, but {first.store.where} has {expected}; only "
                    f"sets of the same {name} can be mixed"
                )

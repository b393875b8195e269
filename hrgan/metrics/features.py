"""Features of a source, by all processes: as moments, and where a metric needs them one by one. Those of reals are kept
beside the shards under everything that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from hrgan.errors import DataError, HrganError
from hrgan.metrics.extractor import Extractor
from hrgan.metrics.frechet import Moments, Reference, summed
from hrgan.metrics.source import Part, Source, say_bad


def go_on(share: float) -> None:
    """The `pause` of a measurement that nothing interrupts. Others may raise: all processes call theirs equally often,
    once a round, with the share of the pictures that is done."""


@dataclass(frozen=True)
class Ranks:
    """The processes that measure together."""

    rank: int = 0
    world: int = 1


@dataclass
class Features:
    """What a source's pictures look like to an extractor. Right on the main process; rows, scores, labels and places
    are there alone."""

    groups: list[Moments]
    """Sample i is in group i mod their number."""
    rows: Tensor | None = None
    """(N, D) float32 in the order of places."""
    scores: Tensor | None = None
    """(N, K) float32: the extractor's class scores."""
    labels: Tensor | None = None
    """(N,) int64."""
    places: Tensor | None = None
    """(N,) int64."""
    lost: int = 0
    """Pictures that could not be read."""
    floors: dict[str, float] = field(default_factory=dict)
    """Of reals: metrics of one half against the other, kept with them."""

    @property
    def all(self) -> Moments:
        """Of all the pictures."""
        return summed(self.groups)

    @cached_property
    def reference(self) -> Reference:
        """Of all the pictures, for many distances to them."""
        return Reference(self.all)

    @property
    def count(self) -> int:
        """Pictures that were read."""
        return int(sum(group.count for group in self.groups))

    def half(self, number: int, source: Source) -> Features:
        """The even or the odd samples, of features in two groups, as a set of its own."""
        if self.rows is None or self.places is None:
            return Features([self.groups[number]])
        return Features([self.groups[number]], self.rows[source.sample(self.places) % 2 == number])


NAMED = 10
"""Pictures that cannot be read that a process names."""


def extract(
    source: Source,
    extractor: Extractor,
    ranks: Ranks,
    groups: int,
    *,
    rows: bool = False,
    scores: bool = False,
    pause: Callable[[float], None] = go_on,
    batch: int = 64,
) -> Features:
    """The features of a source, each process doing its share of the places. `rows` and `scores`: also one by one.

    HrganError on all processes where one of them cannot go on, or more than source.max_bad pictures cannot be read.
    """
    found = Features([Moments.zero(extractor.size, extractor.device) for _ in range(groups)])
    kept: list[dict[str, Tensor]] = []
    lost = torch.zeros(2, dtype=torch.float64, device=extractor.device)  # pictures; processes that could not go on
    failure: HrganError | None = None
    parts = source.read(source.count * ranks.rank // ranks.world, source.count * (ranks.rank + 1) // ranks.world)
    most = -(-source.count // ranks.world)  # of any process
    rounds = -(-most // batch)
    for number in range(rounds):
        pause(number / rounds)
        try:
            for part in islice(parts, 1 if number < rounds - 1 else None):  # A source may give smaller parts.
                if part.bad:  # Counting them reads from the device.
                    say_bad(part.bad[: max(0, NAMED - int(lost[0]))])
                    lost[0] += len(part.bad)
                kept.append(_add(found, extractor, source, part, rows, scores))
        except HrganError as error:  # Raised below, on all processes: none may wait for one that has left.
            failure, lost[1], parts = error, 1, iter(())
    for group in found.groups:
        group.reduce()
    if dist.is_initialized():
        dist.all_reduce(lost)
    bad, failed = lost.tolist()
    if failed:
        raise failure or DataError("another process cannot read its pictures; its line names what is wrong")
    found.lost = int(bad)
    _check_lost(source, found)
    if rows or scores:
        _gather(found, kept, ranks)
    return found


def _add(
    found: Features, extractor: Extractor, source: Source, part: Part, rows: bool, scores: bool
) -> dict[str, Tensor]:
    """Add a part to the moments; what of it is kept one by one, on the CPU."""
    if not len(part.images):
        return {}
    features, classes = extractor.both(part.images)
    if part.taint is not None:  # A picture with NaN would turn into a black one: this makes the numbers say so.
        features = features + part.taint.to(features)
    group = source.sample(part.places) % len(found.groups)
    for number, moments in enumerate(found.groups):
        moments.add(features[torch.nonzero(group == number).flatten().to(features.device)])
    kept = {"places": part.places}
    if rows:
        kept["rows"] = features.cpu()
    if scores:
        kept["scores"] = classes.cpu()
    if part.labels is not None:
        kept["labels"] = part.labels
    return kept


def _check_lost(source: Source, found: Features) -> None:
    if found.lost > source.max_bad * max(source.count, 100):
        raise DataError(
            f"{source.where}: {found.lost} of {source.count} pictures cannot be read, more than "
            f"{source.max_bad:g} of them (data.max_bad); the lines above name the first of them"
        )
    if found.count < 2:
        raise DataError(f"{source.where}: {found.count} pictures that can be read, expected at least 2")


def _gather(found: Features, kept: list[dict[str, Tensor]], ranks: Ranks) -> None:
    """What all processes kept, in the order of places, on the main one."""
    names = sorted({name for part in kept for name in part})
    own = {name: torch.cat([part[name] for part in kept if part]) for name in names}
    everyone: list[Any] = [own]
    if ranks.world > 1:
        everyone = [None] * ranks.world
        dist.gather_object(own, everyone if ranks.rank == 0 else None)
    if ranks.rank > 0:
        return
    for name in sorted({name for part in everyone for name in part}):
        setattr(found, name, torch.cat([part[name] for part in everyone if part]))


# Of reals, kept


def of_reals(
    source: Source,
    extractor: Extractor,
    ranks: Ranks,
    folders: list[Path],
    *,
    rows: bool = False,
    pause: Callable[[float], None] = go_on,
    batch: int = 64,
) -> Features:
    """Features of a reference in two halves (even and odd samples), from the cache of the first folder that has or
    takes them, else computed by all processes."""
    identity = identity_of(source, extractor)
    # Only the first process looks, so that all agree; the others hold zeros and no one but the first uses the sums.
    cached = _load(folders, identity, rows) if ranks.rank == 0 and source.identity else None
    if _agree(cached is not None, ranks.rank):
        if cached is not None:
            cached.groups = [group.to(extractor.device) for group in cached.groups]
            return cached
        return Features([Moments.zero(extractor.size, extractor.device) for _ in range(2)])
    found = extract(source, extractor, ranks, 2, rows=rows, pause=pause, batch=batch)
    if ranks.rank == 0 and source.identity and not found.lost:
        # What lacks a picture must not pass for the whole set once that is mended.
        _store(folders, identity, found)
    return found


def identity_of(source: Source, extractor: Extractor) -> str:
    """sha256 of everything that the features of a reference depend on."""
    key = ("features-1", source.identity, source.size, source.count, source.mirror, source.labels, source.classes)
    return hashlib.sha256(repr((*key, extractor.name, extractor.sha256, extractor.resize)).encode()).hexdigest()


def keep_floors(source: Source, extractor: Extractor, folders: list[Path], found: Features) -> None:
    """Write the floors beside the features that they are of. On the main process."""
    if source.identity and not found.lost:
        _write(folders, f"{identity_of(source, extractor)[:32]}.json", json.dumps(found.floors).encode())


def _agree(value: bool, rank: int) -> bool:
    if not dist.is_initialized():
        return value
    flag = [value if rank == 0 else None]
    dist.broadcast_object_list(flag)
    return bool(flag[0])


def _load(folders: list[Path], identity: str, rows: bool) -> Features | None:
    """From the first folder that has all that is asked for."""
    for folder in folders:
        path = folder / f"{identity[:32]}.safetensors"
        each = folder / f"{identity[:32]}-rows.safetensors"
        if not path.exists() or (rows and not each.exists()):
            continue
        try:
            t = safetensors.torch.load_file(path)
            halves = [Moments(t[f"{half}.count"], t[f"{half}.total"], t[f"{half}.outer"]) for half in ("even", "odd")]
            single = safetensors.torch.load_file(each) if rows else {}
            floors = folder / f"{identity[:32]}.json"
            known = json.loads(floors.read_text()) if floors.exists() else {}
            return Features(
                halves, single.get("rows"), labels=single.get("labels"), places=single.get("places"), floors=known
            )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            print(f"{path} is damaged ({error}): computing the real statistics anew", file=sys.stderr)
    return None


def _store(folders: list[Path], identity: str, found: Features) -> None:
    """Into the first folder that can be written, atomically; the moments last, as they are looked for first."""
    single = {name: getattr(found, name) for name in ("rows", "labels", "places")}
    single = {name: value.contiguous() for name, value in single.items() if value is not None}
    if "rows" in single:
        _write(folders, f"{identity[:32]}-rows.safetensors", safetensors.torch.save(single))
    halves = zip(("even", "odd"), found.groups, strict=True)
    tensors = {f"{half}.{key}": value.cpu() for half, group in halves for key, value in vars(group).items()}
    _write(folders, f"{identity[:32]}.safetensors", safetensors.torch.save(tensors))


def _write(folders: list[Path], name: str, content: bytes) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f".{name}.{os.uname().nodename}-{os.getpid()}"
            try:
                partial.write_bytes(content)
                partial.replace(folder / name)
            finally:
                partial.unlink(missing_ok=True)
            return
        except OSError:  # Shards are often read-only: the next folder (the run's own) takes it, else it is made again.
            continue

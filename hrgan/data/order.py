"""Which sample is shown when: a pure function of (shard sizes, seed, number of images shown).

A *chunk* is 4 consecutive samples of the order. An epoch permutes the shards by (seed, epoch), lays them end to end,
drops a random offset at the start, cuts the rest into S equal *slots*, and permutes bounded *windows* inside each slot
by (seed, epoch, slot, window). Chunk c of the epoch comes from slot `c % S`. Nothing here depends on ranks or workers,
so neither does the order.
"""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hrgan.config import CHUNK
from hrgan.errors import DataError, UserError


class Segment(NamedTuple):
    """Consecutive samples of one shard, from index `first`."""

    shard: int
    first: int
    samples: int


class Window(NamedTuple):
    """One window of one slot.

    segments: where its samples are stored, in stored order.
    permutation: (n,) int64; place i of the order shows the window's stored sample `permutation[i]`.
    """

    segments: tuple[Segment, ...]
    permutation: NDArray[np.int64]


class Place(NamedTuple):
    """Where a chunk is: its epoch, slot, window in the slot, and chunk in the window."""

    epoch: int
    slot: int
    window: int
    chunk: int


class _Epoch(NamedTuple):
    shards: NDArray[np.int64]  # (shards,) the permuted shard numbers
    starts: NDArray[np.int64]  # (shards + 1,) where each begins when they are laid end to end
    offset: int  # samples dropped at the start


def _random(count: int, *key: int) -> NDArray[np.uint64]:
    """(count,) uint64, a function of the key alone. Raw Philox words, because numpy keeps only those stable between
    releases.
    """
    digest = blake2b(",".join(map(str, key)).encode(), digest_size=16).digest()
    words: NDArray[np.uint64] = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return words


def _permutation(count: int, *key: int) -> NDArray[np.int64]:
    return np.argsort(_random(count, *key), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The order of one stored set.

    shard_samples: samples of each shard, in stored order.
    seed: any integer.
    slots: places of the set read side by side; min(slots, samples // 4) are used.
    window: samples shuffled together, a multiple of 4. A reader holds `slots * window` encoded samples in memory.

    Raises UserError for slots < 1 or a window that is no positive multiple of 4, DataError for fewer than 4 samples.
    """

    shard_samples: tuple[int, ...]
    seed: int
    slots: int
    window: int
    _epochs: dict[int, _Epoch] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UserError(f"data.slots is {self.slots}, expected 1 or more")
        if self.window < CHUNK or self.window % CHUNK:
            nearest = max(CHUNK, round(self.window / CHUNK) * CHUNK)
            raise UserError(f"data.window is {self.window}, expected a multiple of {CHUNK}; nearest: {nearest}")
        if self.num_samples < CHUNK:
            raise DataError(f"the set has {self.num_samples} samples, expected {CHUNK} or more; add images")

    @cached_property
    def num_samples(self) -> int:
        return sum(self.shard_samples)

    @cached_property
    def num_slots(self) -> int:
        """S, the slots in use."""
        return min(self.slots, self.num_samples // CHUNK)

    @cached_property
    def slot_samples(self) -> int:
        """L, the samples of one slot: a multiple of 4."""
        return self.num_samples // self.num_slots // CHUNK * CHUNK

    @cached_property
    def chunks_per_epoch(self) -> int:
        return self.num_slots * self.slot_samples // CHUNK

    def place(self, g: int) -> Place:
        """The place of global chunk g = nimg // 4."""
        epoch, c = divmod(g, self.chunks_per_epoch)
        position, slot = divmod(c, self.num_slots)
        window = (position * CHUNK + self._shift(slot)) // self.window
        begin, _ = self._span(slot, window)
        return Place(epoch, slot, window, position - begin // CHUNK)

    def window_of(self, epoch: int, slot: int, window: int) -> Window:
        """What a reader needs for one window: its places in the shards and its permutation."""
        layout = self._layout(epoch)
        begin, end = (layout.offset + slot * self.slot_samples + x for x in self._span(slot, window))
        segments = []
        i = int(np.searchsorted(layout.starts, begin, side="right")) - 1
        at = begin
        while at < end:
            stop = min(end, int(layout.starts[i + 1]))
            if stop > at:
                segments.append(Segment(int(layout.shards[i]), at - int(layout.starts[i]), stop - at))
            at, i = stop, i + 1
        return Window(tuple(segments), _permutation(end - begin, self.seed, epoch, slot, window))

    def following(self, place: Place) -> Place:
        """The first place of the next window of the same slot."""
        _, end = self._span(place.slot, place.window)
        if end < self.slot_samples:
            return Place(place.epoch, place.slot, place.window + 1, 0)
        return Place(place.epoch + 1, place.slot, 0, 0)

    def chunk(self, g: int) -> tuple[tuple[int, int], ...]:
        """The 4 samples of global chunk g as (shard, index in the shard). The reference that readers are tested
        against.
        """
        place = self.place(g)
        segments, permutation = self.window_of(place.epoch, place.slot, place.window)
        stored = [(s.shard, s.first + i) for s in segments for i in range(s.samples)]
        return tuple(stored[i] for i in permutation[place.chunk * CHUNK : (place.chunk + 1) * CHUNK])

    def _shift(self, slot: int) -> int:
        # Slots change windows at different times, so reading is spread evenly instead of all slots' windows at once.
        return slot * self.window // self.num_slots // CHUNK * CHUNK

    def _span(self, slot: int, window: int) -> tuple[int, int]:
        """First sample and end of a window within its slot; the first and the last may be shorter."""
        begin = window * self.window - self._shift(slot)
        return max(0, begin), min(self.slot_samples, begin + self.window)

    def _layout(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            sizes = np.asarray(self.shard_samples, dtype=np.int64)
            shards = _permutation(len(sizes), self.seed, epoch)
            starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[shards])])
            # The dropped rest moves from epoch to epoch, so that no sample is left out for ever.
            spare = self.num_samples - self.num_slots * self.slot_samples
            offset = int(_random(1, self.seed, epoch, -1)[0] % (spare + 1))
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = _Epoch(shards, starts, offset)
        return self._epochs[epoch]


PERIOD = 1024
"""Chunks after which each set of a mix has had its share exactly."""


@dataclass(frozen=True)
class Mix:
    """Which of several sets each chunk comes from: pure, too. In each PERIOD of chunks every set has its share, in an
    order decided by (seed, number of the period).

    weights: above 0, in any unit. UserError for one whose share is less than half a chunk of a period.
    """

    weights: tuple[float, ...]
    seed: int
    _periods: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) <= 0 or not np.isfinite(self.weights).all():
            raise UserError(f"data.path: weights are {list(self.weights)}, expected numbers above 0")
        if min(self.shares) < 1:
            raise UserError(
                f"data.path: weights {list(self.weights)} give a set less than 1/{PERIOD} of the images; leave it out"
            )

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Chunks of each set in a period: the weights' shares rounded so that they add up (largest remainder)."""
        exact = np.asarray(self.weights, np.float64) / sum(self.weights) * PERIOD
        shares = np.floor(exact).astype(np.int64)
        for i in np.argsort(shares - exact, kind="stable")[: PERIOD - int(shares.sum())]:
            shares[i] += 1
        return tuple(int(share) for share in shares)

    def deal(self, g: int) -> tuple[int, int]:
        """(set, number of the chunk within that set's own order) of global chunk g."""
        if len(self.weights) == 1:
            return 0, g
        period, place = divmod(g, PERIOD)
        members = self._members(period)
        member = int(members[place])
        return member, period * self.shares[member] + int((members[:place] == member).sum())

    def chunks(self, available: tuple[int, ...]) -> int:
        """How many chunks are dealt before a set of so many runs out."""
        if len(self.weights) == 1:
            return available[0]
        periods = min(count // share for count, share in zip(available, self.shares, strict=True))
        members = self._members(periods)
        places = [PERIOD]
        for member, (count, share) in enumerate(zip(available, self.shares, strict=True)):
            mine = np.flatnonzero(members == member)
            left = count - periods * share
            if left < share:
                places.append(int(mine[left]))
        return periods * PERIOD + min(places)

    def _members(self, period: int) -> NDArray[np.int64]:
        """(PERIOD,) the set of each chunk of a period."""
        if period not in self._periods:
            while len(self._periods) > 3:
                self._periods.pop(next(iter(self._periods)))
            sets = np.repeat(np.arange(len(self.weights)), self.shares)
            # -2: unlike any epoch's own key.
            self._periods[period] = sets[_permutation(PERIOD, self.seed, -2, period)]
        return self._periods[period]

"""The order of samples: pure, the same for any ranks, workers and start, and fair to every sample."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hrgan.config import CHUNK
from hrgan.data import manifest as manifests
from hrgan.data.build import build
from hrgan.data.dataset import Dataset, open_set
from hrgan.data.manifest import Manifest
from hrgan.data.order import Mix, Order
from hrgan.data.stream import batches
from hrgan.errors import DataError, UserError

SHARDS = [(10, 7, 3), (4,), (64, 64, 64, 11), (1, 1, 1, 1, 1, 1, 2, 30)]
GOLDEN = [
    ((0, 2), (1, 0), (0, 5), (0, 1)),
    ((1, 2), (1, 4), (2, 0), (1, 3)),
    ((2, 3), (2, 2), (2, 1), (2, 0)),
]
WARNED = "ignore:This DataLoader will create"


def epoch(order: Order, number: int) -> list[tuple[int, int]]:
    chunks = order.chunks_per_epoch
    return [sample for g in range(number * chunks, (number + 1) * chunks) for sample in order.chunk(g)]


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize(("slots", "window"), [(1, 4), (3, 8), (8, 256), (5, 12)])
def test_an_epoch_shows_each_sample_at_most_once_and_leaves_out_fewer_than_4_per_slot(
    shards: tuple[int, ...], slots: int, window: int
) -> None:
    order = Order(shards, 7, slots, window)
    stored = {(shard, i) for shard, samples in enumerate(shards) for i in range(samples)}
    for number in range(4):
        shown = epoch(order, number)
        assert len(set(shown)) == len(shown)
        assert set(shown) <= stored
        assert len(stored) - len(shown) < CHUNK * order.num_slots


@pytest.mark.parametrize("shards", [(23, 17, 30, 1), (71,)])
def test_over_several_epochs_every_sample_appears_about_equally_often(shards: tuple[int, ...]) -> None:
    order = Order(shards, 3, 4, 8)
    counts = Counter(sample for number in range(40) for sample in epoch(order, number))
    assert len(counts) == 71
    assert min(counts.values()) >= 3  # 64 of 71 an epoch, so 36 on average; the ends of shards less often
    assert max(counts.values()) == 40


def test_a_window_shows_exactly_its_samples_in_another_order() -> None:
    order = Order((40, 40, 40), 1, 2, 16)
    shown = []
    for window in range(order.place(order.chunks_per_epoch - 1).window + 1):
        segments, permutation = order.window_of(0, 1, window)
        samples = [(s.shard, s.first + i) for s in segments for i in range(s.samples)]
        assert len(samples) <= 16
        assert sorted(permutation) == list(range(len(samples)))
        shown += [samples[i] for i in permutation]
    assert shown == [s for g in range(1, order.chunks_per_epoch, 2) for s in order.chunk(g)]
    assert sum(a != b for a, b in itertools.pairwise(sorted(shown))) == 59  # 60 different samples
    assert shown != sorted(shown)


def test_slots_change_windows_at_different_times() -> None:
    order = Order((1024,), 0, 4, 64)
    starts = [next(g // 4 for g in range(slot, 10_000, 4) if order.place(g).window == 1) for slot in range(4)]
    assert starts == [16, 12, 8, 4]


def test_seeds_and_epochs_differ_and_repeat() -> None:
    a, b = Order((50, 50), 1, 4, 16), Order((50, 50), 2, 4, 16)
    assert epoch(a, 0) == epoch(Order((50, 50), 1, 4, 16), 0)
    assert epoch(a, 0) != epoch(b, 0)
    assert epoch(a, 0) != epoch(a, 1)


def test_the_order_is_the_published_one_on_every_machine_and_numpy() -> None:
    order = Order((6, 5, 9), 42, 2, 8)
    assert [order.chunk(g) for g in (0, 1, 9)] == GOLDEN


def test_impossible_orders_are_named() -> None:
    with pytest.raises(DataError, match="has 3 samples, expected 4 or more"):
        Order((2, 1), 0, 1, 4)
    with pytest.raises(UserError, match=r"data.window is 250, expected a multiple of 4; nearest: 248"):
        Order((100,), 0, 1, 250)
    with pytest.raises(UserError, match=r"data.slots is 0"):
        Order((100,), 0, 0, 4)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    root = tmp_path_factory.mktemp("order") / "set"
    build("drawn:150", root, 16, workers=0, shard_samples=37)
    return root, manifests.load(root)


def read(
    stored: tuple[Path, Manifest], nimg: int, batch: int, rank: int, world: int, workers: int, count: int
) -> np.ndarray:
    """(count, batch / world) numbers of the samples shown."""
    root, _ = stored
    dataset = Dataset((open_set(str(root)),), (1.0,))
    reader = batches(dataset, 16, seed=9, slots=6, window=16, nimg=nimg, batch=batch, rank=rank, world=world,
                     workers=workers)  # fmt: skip
    return np.stack([next(reader).samples.numpy() for _ in range(count)])


def expected(manifest: Manifest, nimg: int, count: int) -> np.ndarray:
    """(count,) numbers of the samples from `nimg` on, by the reference `chunk`."""
    order = Order(manifest.shard_samples, 9, 6, 16)
    firsts = np.cumsum((0, *manifest.shard_samples))
    chunks = range(nimg // CHUNK, (nimg + count) // CHUNK)
    return np.array([firsts[shard] + i for g in chunks for shard, i in order.chunk(g)])


@pytest.mark.filterwarnings(WARNED)
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "nimg"), [(1, 0), (2, 140), (3, 4)])
def test_global_batches_depend_on_neither_ranks_nor_workers_nor_start(
    stored: tuple[Path, Manifest], workers: int, world: int, nimg: int
) -> None:
    batch, count = 24, 15  # 360 samples: over two epochs of 144
    reference = expected(stored[1], nimg, batch * count).reshape(-1, CHUNK)
    numbers = np.arange(nimg // CHUNK, (nimg + batch * count) // CHUNK)
    for rank in range(world):
        found = read(stored, nimg, batch, rank, world, workers, count).reshape(-1, CHUNK)
        assert (found == reference[numbers % world == rank]).all()


def test_starting_in_the_middle_continues_the_sequence(stored: tuple[Path, Manifest]) -> None:
    whole = read(stored, 0, 20, 0, 1, 0, 40).reshape(-1)
    for nimg in (4, 60, 144, 296, 500):
        assert (read(stored, nimg, 20, 0, 1, 0, 5).reshape(-1) == whole[nimg : nimg + 100]).all()


@pytest.mark.filterwarnings(WARNED)
def test_pictures_and_labels_travel_with_their_numbers_through_workers(stored: tuple[Path, Manifest]) -> None:
    dataset = Dataset((open_set(str(stored[0])),), (1.0,))
    settings = {"seed": 9, "slots": 6, "window": 16, "nimg": 44, "batch": 28, "rank": 0, "world": 1}
    alone, shared = (batches(dataset, 16, workers=workers, **settings) for workers in (0, 3))
    for _ in range(12):
        a, b = next(alone), next(shared)
        assert a.images.shape == (28, 3, 16, 16)
        assert (a.images == b.images).all()
        assert (a.samples == b.samples).all()
        assert (a.labels == b.labels).all()


def test_wrong_shares_are_named(stored: tuple[Path, Manifest]) -> None:
    with pytest.raises(UserError, match="batch is 20, expected a multiple of 4 x 2 processes; nearest: 16"):
        read(stored, 0, 20, 0, 2, 0, 1)
    with pytest.raises(UserError, match="nimg is 6, expected a multiple of 4"):
        read(stored, 6, 20, 0, 1, 0, 1)
    with pytest.raises(UserError, match="rank is 2, expected 0 to 1"):
        read(stored, 0, 16, 2, 2, 0, 1)


def test_a_mix_deals_each_set_s_chunks_in_turn_and_in_its_share() -> None:
    mix = Mix((5.0, 3.0, 2.0), 4)
    assert mix.shares == (512, 307, 205)
    dealt = [mix.deal(g) for g in range(3 * 1024 + 100)]
    for member, share in enumerate(mix.shares):
        mine = [chunk for found, chunk in dealt if found == member]
        assert mine == list(range(len(mine)))
        assert [sum(found == member for found, _ in dealt[i : i + 1024]) for i in (0, 1024, 2048)] == [share] * 3
    assert mix.deal(2500) == Mix((5.0, 3.0, 2.0), 4).deal(2500)
    assert [found for found, _ in dealt[:100]] != [found for found, _ in dealt[1024:1124]]
    for available in ((600, 400, 300), (10, 400, 300), (5120, 3070, 2050), (1, 1, 1)):
        total = mix.chunks(available)
        counts = Counter(mix.deal(g)[0] for g in range(total))
        assert all(counts[member] <= limit for member, limit in enumerate(available))
        assert counts[mix.deal(total)[0]] == available[mix.deal(total)[0]]  # The next would be one too many.

"""The order: every sample once an epoch, well mixed, the same for ever, and cheap anywhere."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.order import Order, shuffle_within, splitmix64

sizes_strategy = st.lists(st.integers(0, 150), min_size=1, max_size=10).filter(lambda sizes: sum(sizes) > 0)


def whole_epoch(order: Order, size: int) -> np.ndarray:
    return np.concatenate([order.global_batch(step, size) for step in range(order.num_batches(size))])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    sizes_strategy,
    st.integers(0, 2**63),
    st.integers(0, 5),
    st.integers(1, 800),
    st.integers(1, 500),
    st.integers(50, 999),
)
@example([1], 0, 0, 720, 65536, 7)
@example([64 * 3 + 1], 0, 0, 3, 65, 64)
@example([0, 0, 130, 0], 9, 1, 2, 7, 13)
def test_every_sample_once_an_epoch(
    sizes: list[int], seed: int, epoch: int, streams: int, block: int, size: int
) -> None:
    order = Order(sizes, seed, epoch, streams, block)
    epoch_ids = whole_epoch(order, size)
    assert epoch_ids.dtype == np.int64
    assert sorted(epoch_ids.tolist()) == list(range(sum(sizes)))
    assert order.num_batches(size) == -(-sum(sizes) // size)
    assert order.num_streams == max(1, min(streams, sum(sizes) // 64))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes_strategy, st.integers(0, 100), st.integers(40, 90), st.integers(91, 500), st.randoms())
def test_any_cut_into_batches_gives_the_same_sequence(sizes, seed, one, other, random) -> None:  # type: ignore[no-untyped-def]
    order = Order(sizes, seed, 0)
    sequence = whole_epoch(order, one)
    np.testing.assert_array_equal(sequence, whole_epoch(Order(sizes, seed, 0), other))
    positions = [random.randrange(len(sequence)) for _ in range(20)]
    np.testing.assert_array_equal(order.at(positions), sequence[positions])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@example(1, 0)
@example(2, 1)
@example(4097, 5)
def test_shuffle_within_is_a_bijection(length: int, key: int) -> None:
    index = np.arange(length, dtype=np.int64)
    shuffled = shuffle_within(index, np.full(length, length), np.full(length, key, dtype=np.uint64))
    assert sorted(shuffled.tolist()) == index.tolist()


def test_small_blocks_are_shuffled_uniformly() -> None:
    """Where elements of 8 land, over many keys: chi-square of 7 degrees of freedom, below its 1e-6 quantile."""
    keys = splitmix64(np.arange(20_000, dtype=np.uint64))
    for element in (0, 3, 7):
        landed = shuffle_within(np.full(20_000, element), np.full(20_000, 8), keys)
        counts = np.bincount(landed, minlength=8)
        assert ((counts - 2500) ** 2 / 2500).sum() < 41


GOLDEN = {
    ((1000,) * 5, 0, 0): "1ca6c99be3101cff",
    ((1000,) * 5, 0, 1): "110f80363d8396b0",
    ((1000,) * 5, 1, 0): "f8eb307a806005d9",
    ((10, 2000, 3, 0, 500), 7, 3): "904ab7b7d07dd286",
    ((12288,), 0, 0): "293cd8caf70ab7d6",
}


@pytest.mark.parametrize(("sizes", "seed", "epoch"), GOLDEN)
def test_golden_orders(sizes: tuple[int, ...], seed: int, epoch: int) -> None:
    """A changed hash is a changed order: every run resumed across the change would read other samples."""
    ids = whole_epoch(Order(sizes, seed, epoch), 64)
    assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] == GOLDEN[sizes, seed, epoch]


FIRST_POSITIONS = {
    (1, 1, 0, 0): "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc",
    (1, 100, 0, 0): "9113804b764efb0285cf5da06b9422a4c6f4ec2ede8ec66de0627560514dee59",
    (8, 1000, 42, 2): "8aa104d4df9e2f2d1f2258efac8753e8bbe3e33e171cf97382039fe596da7e98",
    (2_000, 5_000, 0, 0): "170cc1ad244a329543c5370bc4d6527cfa2496d09b9bb39bb0bc4614dcc899fa",
    (200_000, 5_000, 0, 0): "d092a5aa93740da48e0a94b48140f4a8c684e5b321f865ad1a619f366c09a00f",
    (200_000, 5_000, 17, 3): "75299cf36b6a3c29d718ff907d998c5032798284cef0b7254e4a4bffabcabbb3",
}


@pytest.mark.parametrize(("shards", "each", "seed", "epoch"), FIRST_POSITIONS)
def test_golden_first_positions(shards: int, each: int, seed: int, epoch: int) -> None:
    """The first 4,096 samples with the default settings, up to 1e9 samples in 2e5 shards."""
    order = Order(np.full(shards, each), seed, epoch)
    ids = order.at(np.arange(min(4096, order.num_samples)))
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    assert digest == FIRST_POSITIONS[shards, each, seed, epoch]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes_strategy, st.integers(0, 9), st.integers(1, 8), st.integers(1, 200), st.randoms(use_true_random=False))
def test_any_position_is_the_same_alone_and_among_others(sizes, seed, streams, block, random) -> None:  # type: ignore[no-untyped-def]
    order = Order(sizes, seed, 1, streams, block)
    positions = np.array([random.randrange(order.num_samples) for _ in range(8)])
    alone = [int(order.at([position])[0]) for position in positions]
    assert order.at(positions).tolist() == alone
    assert order.at(positions.reshape(2, 4)).shape == (2, 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes_strategy, st.integers(0, 9), st.integers(1, 5), st.integers(1, 120))
@example([0, 130, 0, 70, 0], 0, 2, 40)
def test_what_is_read_next_lies_in_the_open_shards(sizes: list[int], seed: int, streams: int, block: int) -> None:
    order = Order(sizes, seed, 0, streams, block)
    ends = np.cumsum(sizes)
    for position in np.linspace(0, order.num_samples - 1, 12).astype(int).tolist():
        shard = int(np.searchsorted(ends, order.at([position])[0], side="right"))
        opened = order.open_shards(position)
        assert shard in opened and all(sizes[one] for one in opened)
        assert opened.tolist() == sorted(set(opened.tolist()))


def test_a_stream_has_about_two_shards_open() -> None:
    """What a cache has to hold at 1e9 samples in 2e5 shards, by default and with blocks of 65,536."""
    sizes = np.full(200_000, 5000)
    by_default, wide = (len(Order(sizes, 0, 0, 720, block).open_shards(10**8)) for block in (4096, 65_536))
    assert 720 < by_default < 720 * 2 and wide > 720 * 13


def test_seeds_and_epochs_differ() -> None:
    orders = [whole_epoch(Order([5000], seed, epoch), 100) for seed in (0, 1, -1, 2**70 + 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            agreement = (one == other).mean()
            assert agreement < 0.01 or np.array_equal(one, other)
    assert sum(np.array_equal(orders[0], other) for other in orders) == 1


@pytest.mark.parametrize("num_samples", [300, 1000, 3000, 12_288, 50_000])
@pytest.mark.parametrize("num_shards", [1, 7])
def test_batches_spread_over_data_sorted_by_class(num_samples: int, num_shards: int) -> None:
    """Ten classes one after the other, batches of 32: chi-square against equal counts; random ones have mean 9."""
    sizes = np.diff(np.linspace(0, num_samples, num_shards + 1).astype(int))
    labels = np.arange(num_samples) * 10 // num_samples
    for epoch in range(2):
        sequence = labels[Order(sizes, 0, epoch).at(np.arange(num_samples // 32 * 32))]
        batches = sequence.reshape(-1, 32)
        chi_square = [((np.bincount(batch, minlength=10) - 3.2) ** 2 / 3.2).sum() for batch in batches]
        # 27.9 is the 0.1 % quantile of a random batch.
        assert np.mean(chi_square) < 9 and max(chi_square) < 27.9


def test_batch_mates_change_from_epoch_to_epoch() -> None:
    """Two samples that share a batch in one epoch share one in the next about as often as chance says."""
    num_samples, size = 4096, 32
    together = []
    for epoch in range(2):
        batch_of = np.empty(num_samples, dtype=np.int64)
        batch_of[Order([num_samples], 0, epoch).at(np.arange(num_samples))] = np.arange(num_samples) // size
        together.append(batch_of)
    joint = np.bincount(together[0] * 128 + together[1], minlength=128 * 128)
    again = (joint * (joint - 1)).sum() / (num_samples * (size - 1))
    assert 0.5 < again / (size / num_samples) < 1.6


def test_shards_are_read_in_another_order_each_epoch() -> None:
    """With one stream the first block tells which shard comes first; over epochs all do."""
    firsts = {int(Order([100] * 8, 0, epoch, 1, 100).global_batch(0, 1)[0]) // 100 for epoch in range(60)}
    assert firsts == set(range(8))


def planning(sizes: np.ndarray) -> tuple[float, int, Order]:
    """CPU-seconds and most bytes of making an order and seeking to its last batch."""
    tracemalloc.start()
    try:
        order = Order(sizes, 0, 3)
        order.global_batch(order.num_batches(4096) - 1, 4096)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    started = time.process_time()
    order = Order(sizes, 0, 3)
    order.global_batch(order.num_batches(4096) - 1, 4096)
    return time.process_time() - started, peak, order


def test_a_billion_samples_cost_no_memory_and_no_time() -> None:
    """Under 64 MB; the time is 30 to 60 ms (benchmarks/order.py), here with room for a machine under load."""
    seconds, peak, order = planning(np.full(200_000, 5000))
    assert peak < 64e6 and seconds < 1
    last = order.num_batches(4096) - 1
    batches = [order.global_batch(step, 4096) for step in (0, last // 2, last)]
    assert len(np.unique(np.concatenate(batches))) == 2 * 4096 + len(batches[-1])


def test_planning_costs_the_same_for_any_number_of_samples() -> None:
    peaks = [planning(np.full(1000, each))[1] for each in (10**3, 10**5, 10**7)]
    assert max(peaks) < 1_000_000


def test_what_is_refused() -> None:
    for bad in ({"shard_sizes": [-1]}, {"num_streams": 0}, {"shuffle_block": 0}, {"epoch": -1}):
        with pytest.raises(ValueError):
            Order(**{"shard_sizes": [10], "seed": 0, "epoch": 0} | bad)  # type: ignore[arg-type]
    # Nearly the most that fits, and more: numbers beyond 64 bits would come back as wrong samples.
    largest = Order([3_000_000_000], 0, 0, num_streams=1, shuffle_block=1)
    assert largest.at([0, 5, (3_000_000_000) - 1]).tolist() == [0, 5, (3_000_000_000) - 1]
    with pytest.raises(ValueError, match="shuffle_block 1 is too small for streams of"):
        Order([4_000_000_000], 0, 0, num_streams=1, shuffle_block=1)
    order = Order([10], 0, 0)
    for step in (-1, 3):
        with pytest.raises(IndexError):
            order.global_batch(step, 4)
    with pytest.raises(IndexError):
        order.at([10])
    for position in (-1, 10):
        with pytest.raises(IndexError):
            order.open_shards(position)
    with pytest.raises(ValueError):
        order.num_batches(0)
    assert Order([], 0, 0).num_batches(4) == 0 and Order([0], 0, 0).at([]).tolist() == []


def test_pure_modules_import_numpy_alone() -> None:
    code = (
        "import sys, data_pipelines.order, data_pipelines.mixture, data_pipelines.balance;"
        "print(sorted({'torch', 'PIL', 'pyarrow', 'pydantic', 'soundfile'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"

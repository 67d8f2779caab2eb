"""The mixture: exact shares in every block, each source in its own order, anywhere at once."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.mixture import Mixture, MixtureHistory, block_counts, source_weights

weights_strategy = st.lists(st.floats(0.001, 1000), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(weights_strategy, st.integers(8, 300))
@example([1.0], 8)
@example([1.0, 1000.0], 8)
def test_counts_are_the_shares_rounded(weights: list[float], block: int) -> None:
    counts = block_counts(weights, block)
    exact = np.array(weights) / sum(weights) * block
    assert counts.sum() == block and counts.min() >= 1
    if exact.min() >= 1:
        assert np.abs(counts - exact).max() < 1


def test_largest_remainder_by_hand() -> None:
    assert block_counts([3, 3, 2], 10).tolist() == [4, 4, 2]
    assert block_counts([41, 29, 17, 13], 10).tolist() == [4, 3, 2, 1]
    assert block_counts([1, 1, 1], 8).tolist() == [3, 3, 2]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weights_strategy, st.integers(8, 100))
def test_each_source_counts_its_own_positions_without_gaps(weights: list[float], block: int) -> None:
    mixture = Mixture(weights, block)
    source, nth = mixture.at(np.arange(3 * mixture.block))
    for number in range(len(weights)):
        np.testing.assert_array_equal(nth[source == number], np.arange(3 * mixture.counts[number]))
    for position in (0, 1, mixture.block - 1, mixture.block, 2 * mixture.block + mixture.block // 2):
        seen = np.bincount(source[:position], minlength=len(weights))
        np.testing.assert_array_equal(mixture.consumed(position), seen)


def test_small_batches_have_nearly_the_right_mixture() -> None:
    mixture = Mixture([0.5, 0.3, 0.2])
    source, _ = mixture.at(np.arange(mixture.block * 2))
    for start in range(0, len(source) - 50, 50):
        counts = np.bincount(source[start : start + 50], minlength=3)
        assert np.abs(counts - [25, 15, 10]).max() <= 2


def test_one_source_is_the_identity_and_far_away_is_as_cheap_as_near() -> None:
    source, nth = Mixture([3.0]).at([0, 5, 10**15])
    assert source.tolist() == [0, 0, 0] and nth.tolist() == [0, 5, 10**15]
    source, nth = Mixture([1, 1]).at([10**15])
    assert abs(int(nth[0]) - 5 * 10**14) <= 1


def test_golden_mixture() -> None:
    source, nth = Mixture([5, 2, 1.5]).at(np.arange(10_000))
    digest = hashlib.sha256(source.astype("<i8").tobytes() + nth.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "6429a780681f6063"


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0, 1.0], [float("nan")], [float("inf"), 1.0], [1e308, 1e308]])
def test_weights_that_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError):
        Mixture(weights)
    with pytest.raises(ValueError):
        block_counts([1] * 9, 8)


def test_weights_by_share_by_epochs_and_by_temperature() -> None:
    sizes, none = [8000, 1000, 125], [None] * 3
    assert source_weights(sizes, none, none) == [1, 1, 1]
    assert source_weights(sizes, [3, None, 0.5], none) == [3, 1, 0.5]
    assert source_weights(sizes, none, [1, 2, 4]) == [8000, 2000, 500]
    assert source_weights(sizes, none, none, 1.0) == [1, 0.125, 0.015625]
    assert source_weights(sizes, none, none, 3.0) == [1, 0.5, 0.25]
    assert source_weights(sizes, none, none, float("inf")) == [1, 1, 1]
    for bad in ([1, 1, 1], [1, 1, 1], None), (none, [1, None, 1], None), ([1, 1, 1], none, 2.0), (none, none, 0.0):
        with pytest.raises(ValueError):
            source_weights(sizes, *bad)  # type: ignore[arg-type]


def test_epochs_are_the_epochs_that_sources_go_through() -> None:
    sizes = [400, 1000, 50]
    mixture = Mixture(source_weights(sizes, [None] * 3, [1, 0.5, 4]))
    given = mixture.consumed(11 * mixture.block)
    turns = given / sizes
    np.testing.assert_allclose(turns / turns[0], [1, 0.5, 4], rtol=0.01)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(weights_strategy, st.integers(0, 3)), min_size=1, max_size=4),
    st.integers(8, 40),
    st.integers(0, 10**6),
)
def test_a_history_counts_each_source_without_gaps(
    stages: list[tuple[list[float], int]], block: int, seed: int
) -> None:
    """Mixtures that gain sources, each changed somewhere in a block: old up to the block's end, new from there."""
    stages = sorted(stages, key=lambda stage: len(stage[0]))
    history, now = MixtureHistory(Mixture(stages[0][0], block)), 0
    for weights, blocks in stages[1:]:
        now += blocks * block + seed % block
        before = history
        history = before.changed(Mixture(weights, block), now)
        end = history.changes[-1][0] if history.changes else 0
        assert now <= end < now + block or (end == 0 and now == 0) or end % block == 0
        for old, new in zip(before.at(np.arange(now)), history.at(np.arange(now)), strict=True):
            np.testing.assert_array_equal(old, new)
    length = now + 3 * block
    source, within = history.at(np.arange(length))
    for number in range(len(stages[-1][0])):
        np.testing.assert_array_equal(within[source == number], np.arange(np.count_nonzero(source == number)))
    for position in {0, now // 2, now, length}:
        seen = np.bincount(source[:position], minlength=len(stages[-1][0]))
        np.testing.assert_array_equal(history.consumed(position), seen)
    again = MixtureHistory(history.mixture, history.changes)
    np.testing.assert_array_equal(again.at(np.arange(length))[0], source)


def test_histories_that_do_not_fit_together() -> None:
    for changes in ([(8, [4, 5])], [(0, [4, 4])], [(8, [3, 3, 2])], [(8, [4, 4]), (8, [4, 4])], [(8, [8, 0])]):
        with pytest.raises(ValueError):
            MixtureHistory(Mixture([1, 1], 8), changes)


@pytest.mark.parametrize("counts", [[], [0], [-1, 5], [10**12], [1 << 62, 1 << 62, 1 << 62]])
def test_counts_of_no_block_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="counts must be|a block of more"):
        Mixture.of_counts(counts)

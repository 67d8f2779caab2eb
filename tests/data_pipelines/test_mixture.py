"""The mixture: exact shares in every block, each source in its own order, anywhere at once."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.mixture import Mixture, block_counts

weights_strategy = st.lists(st.floats(0.001, 1000), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
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


@settings(max_examples=60, deadline=None)
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


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0, 1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError):
        Mixture(weights)
    with pytest.raises(ValueError):
        block_counts([1] * 9, 8)

"""Dealing and packing: nothing lost, nothing twice, even loads, full rows."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.balance import deal, pack


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(0, 12), st.data())
def test_every_sample_is_dealt_once_in_equal_counts(world_size: int, share: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.floats(0, 1e6), min_size=world_size * share, max_size=world_size * share))
    hands = deal(costs, world_size)
    assert [len(hand) for hand in hands] == [share] * world_size
    assert sorted(itertools.chain.from_iterable(hand.tolist() for hand in hands)) == list(range(len(costs)))
    if share:
        loads = [sum(costs[place] for place in hand) for hand in hands]
        # Two loads differ by less than the dearest sample would explain.
        assert max(loads) - min(loads) <= 2 * max(costs) + 1e-6


def test_skewed_costs_come_out_even() -> None:
    costs = np.random.default_rng(0).lognormal(0, 1, 512)
    loads = np.array([costs[hand].sum() for hand in deal(costs, 8)])
    in_order = costs.reshape(8, 64).sum(1)
    assert loads.max() / loads.mean() < 1.01 < in_order.max() / in_order.mean()


def test_equal_costs_and_one_rank() -> None:
    assert [hand.tolist() for hand in deal([1, 1, 1, 1], 2)] == [[0, 2], [1, 3]]
    assert deal([3, 1, 2], 1)[0].tolist() == [0, 1, 2]
    for costs, world_size in (([1, 2, 3], 2), ([1], 0)):
        with pytest.raises(ValueError):
            deal(costs, world_size)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 64), max_size=60), st.integers(64, 200))
def test_rows_hold_every_segment_once_and_never_overflow(lengths: list[int], row_tokens: int) -> None:
    rows = pack(lengths, row_tokens)
    assert sorted(itertools.chain.from_iterable(row.tolist() for row in rows)) == list(range(len(lengths)))
    totals = [sum(lengths[place] for place in row) for row in rows]
    assert all(0 <= total <= row_tokens for total in totals)
    # First fit leaves no two rows half empty, and these rows are no more tokens than its.
    assert len(rows) * max(totals, default=0) <= 2 * sum(lengths) + row_tokens


def test_packing_is_close_to_the_least_number_of_rows() -> None:
    lengths = np.random.default_rng(1).integers(5, 200, 1000)
    rows = pack(lengths, 512)
    assert len(rows) <= np.ceil(lengths.sum() / 512) * 1.02


def test_segments_that_fit_no_row() -> None:
    for lengths in ([65], [-1]):
        with pytest.raises(ValueError, match="rows of 64"):
            pack(lengths, 64)
    assert pack([], 64) == []
    assert [row.tolist() for row in pack([64, 0, 64], 64)] == [[0, 1], [2]]


def test_golden_dealing_and_packing() -> None:
    # Not numpy's integers, whose stream may change from version to version.
    costs = np.arange(256) ** 2 * 7919 % 499 + 1
    digests = [
        hashlib.sha256(b"|".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()[:16]
        for parts in (deal(costs, 4), pack(costs, 512))
    ]
    assert digests == ["3c465b6c68bcaf52", "48cc8ca9c9dc94a3"]

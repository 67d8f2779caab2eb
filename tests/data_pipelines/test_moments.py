"""Moments of parts, merged, are the moments of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.moments import Moments


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 1000))
def test_merging_is_like_measuring_at_once(sizes: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).normal(5, 3, (sum(sizes), 2))
    merged = Moments.none(2)
    for part in np.split(values, np.cumsum(sizes)[:-1]):
        merged = merged.merged(Moments.of(part))
    assert merged.count == len(values)
    if len(values):
        np.testing.assert_allclose(merged.mean, values.mean(axis=0))
        np.testing.assert_allclose(merged.std, values.std(axis=0), atol=1e-12)
        pooled = merged.pooled()
        assert pooled.count == values.size
        assert (pooled.mean[0], pooled.std[0]) == pytest.approx((values.mean(), values.std()))


def test_a_large_mean_costs_no_digits() -> None:
    values = np.random.default_rng(0).normal(1e8, 1.0, (10_000, 1))
    merged = Moments.none(1)
    for part in np.array_split(values, 100):
        merged = merged.merged(Moments.of(part))
    assert merged.std[0] == pytest.approx(values.std(), rel=1e-9)

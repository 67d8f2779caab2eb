"""Ranks of different make: another version is refused, another clock is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_pipelines.errors import BadInput
from pretrain.environment import RankEnvironment, difference

NODE = RankEnvironment("node1", {"torch": "2.13.0", "python": "3.11.7"}, 1000.0)


def test_equal_ranks_are_fine() -> None:
    assert difference([NODE, replace(NODE, host="node2", clock=1004.0)]) is None
    assert difference([NODE]) is None


def test_another_version_is_refused_with_both_named() -> None:
    other = replace(NODE, host="node2", versions={"torch": "2.12.0", "python": "3.11.7"})
    with pytest.raises(BadInput, match=r"torch is 2.13.0 on rank 0 \(node1\) and 2.12.0 on rank 2 \(node2\)"):
        difference([NODE, NODE, other])
    with pytest.raises(BadInput, match="python"):
        difference([NODE, replace(NODE, versions={"torch": "2.13.0"})])


def test_a_clock_that_is_off_is_a_warning() -> None:
    said = difference([NODE, replace(NODE, host="node2", clock=1060.0), replace(NODE, host="node3", clock=940.0)])
    assert said is not None and "the clock of node2 is 120 s ahead of node3's" in said

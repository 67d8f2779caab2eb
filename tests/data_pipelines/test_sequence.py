"""The endless sequence: epochs follow each other, sources keep their own, and a foreign state is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from data_pipelines.errors import BadInput
from data_pipelines.order import Order
from data_pipelines.sequence import SampleSequence, check_state, sample_seeds


@dataclass(frozen=True)
class Sizes:
    """A dataset's outline, which is all that the sequence looks at."""

    shard_sizes: np.ndarray
    fingerprint: str = "f" * 64


def sequence(*sizes: list[int], weights: list[float] | None = None, **options: Any) -> SampleSequence:
    sources = [Sizes(np.array(one, dtype=np.int64), f"{number:064x}") for number, one in enumerate(sizes)]
    settings = {"seed": 3, "global_batch": 16, "num_streams": 720, "shuffle_block": 65_536, "tail": "wrap"} | options
    return SampleSequence(sources, weights or [1.0] * len(sizes), **settings)


def test_one_source_is_the_order_epoch_after_epoch() -> None:
    made = sequence([70, 30])
    expected = np.concatenate([Order([70, 30], 3, epoch).at(np.arange(100)) for epoch in range(3)])
    picked = [made.batch(step) for step in range(18)]
    np.testing.assert_array_equal(np.concatenate([one.sample for one in picked]), expected[: 18 * 16])
    np.testing.assert_array_equal(np.concatenate([one.epoch for one in picked]), np.arange(18 * 16) // 100)
    assert made.samples_an_epoch == 100


def test_the_shards_of_samples_are_those_they_lie_in_in_reading_order() -> None:
    sizes = ([5, 0, 9, 3], [4, 4])
    made = sequence(*sizes, weights=[2.0, 1.0], global_batch=6)
    for step in range(12):
        picked = made.batch(step)
        owners = [np.repeat(np.arange(len(each)), each) for each in sizes]
        pairs = zip(picked.source.tolist(), picked.sample.tolist(), strict=True)
        assert made.shards(picked) == sorted({(source, int(owners[source][sample])) for source, sample in pairs})
    assert made.shards(picked[np.array([], dtype=np.int64)]) == []


def test_a_batch_larger_than_the_data_goes_round_it() -> None:
    ids = sequence([5], global_batch=16).batch(0)
    assert np.bincount(ids.sample, minlength=5).tolist() == [4, 3, 3, 3, 3] or ids.sample.size == 16
    assert all(sorted(ids.sample[5 * turn : 5 * turn + 5]) == list(range(5)) for turn in range(3))


def test_drop_begins_every_epoch_with_a_batch() -> None:
    made = sequence([70, 30], tail="drop")
    assert made.samples_an_epoch == 96
    for step in (0, 5, 6, 13):
        epoch, within = divmod(step, 6)
        picked = made.batch(step)
        np.testing.assert_array_equal(picked.sample, Order([70, 30], 3, epoch).global_batch(within, 16))
        assert set(picked.epoch.tolist()) == {epoch}
    with pytest.raises(BadInput, match="data.tail"):
        sequence([10], tail="drop")
    with pytest.raises(BadInput, match="single training dataset"):
        sequence([100], [100], tail="drop")


def test_weights_that_make_no_mixture_are_named() -> None:
    for weights in ([1.0, float("inf")], [1e308, 1e308], [1e-320, 0.0]):
        with pytest.raises(BadInput, match=r"^data\.train: weights must be positive"):
            sequence([10], [10], weights=weights)


def test_each_source_has_its_own_epochs_and_ids() -> None:
    made = sequence([40], [400], weights=[1, 3])
    picked = [made.batch(step) for step in range(100)]
    source, index = (np.concatenate([getattr(one, name) for one in picked]) for name in ("source", "index"))
    epoch = np.concatenate([one.epoch for one in picked])
    assert abs((source == 0).mean() - 0.25) < 0.01
    assert set(index[source == 0].tolist()) == set(range(40)) and set(index[source == 1].tolist()) == set(
        range(40, 440)
    )
    assert epoch[source == 0].max() == 9 and epoch[source == 1].max() == 2
    first = index[source == 0][:40]
    assert sorted(first.tolist()) == list(range(40)), "a source's epoch holds each of its samples once"
    assert made.state(100)["cursors"] == [int((source == 0).sum()), int((source == 1).sum())]


def test_the_same_data_twice_does_not_go_in_step() -> None:
    made = sequence([1000], [1000])
    picked = [made.batch(step) for step in range(20)]
    sample, source = (np.concatenate([getattr(one, name) for one in picked]) for name in ("sample", "source"))
    assert (sample[source == 0] == sample[source == 1]).mean() < 0.1


def test_seeds_are_of_the_sample_and_the_epoch() -> None:
    index = np.arange(1000)
    one, other = (sample_seeds(7, np.full(1000, epoch), index) for epoch in (0, 1))
    assert len(np.unique(np.concatenate([one, other, sample_seeds(8, np.zeros(1000, np.int64), index)]))) == 3000
    assert one.dtype == np.int64 and one.min() >= 0
    np.testing.assert_array_equal(sample_seeds(7, np.zeros(1, np.int64), index[5:6]), one[5:6])
    # Golden: other seeds are other augmentation and other masks in every run that is resumed.
    assert one[:3].tolist() == [5620672417314516668, 8885351339813208944, 2699158312959822386]


def test_state_is_small_and_says_where_the_run_is() -> None:
    state = sequence([70, 30]).state(10)
    assert len(json.dumps(state)) < 320
    assert (state["samples"], state["epoch"], state["cursors"], state["num_streams"]) == (160, 1, [160], [1])
    check_state(json.loads(json.dumps(state)), sequence([70, 30]).state(0))


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (sequence([70, 30], seed=4), "seed"),
        (sequence([70, 30], global_batch=8), "global_batch"),
        (sequence([70, 30], tail="drop"), "tail"),
        (sequence([70, 30], shuffle_block=8), "shuffle_block"),
        (sequence([700, 30]), "num_streams"),
        (sequence([70, 30], [10]), "fingerprint"),
        (sequence([70, 30], [10], weights=[2, 1]), "fingerprint"),
    ],
)
def test_a_foreign_state_is_refused_by_name(other: SampleSequence, field: str) -> None:
    with pytest.raises(BadInput, match=f"{field} was"):
        other.resume(sequence([70, 30]).state(10))


def test_another_mixture_or_version_is_refused() -> None:
    two = sequence([70], [30], weights=[2, 1])
    with pytest.raises(BadInput, match="mixture was"):
        two.resume(sequence([70], [30], weights=[1, 1]).state(0))
    with pytest.raises(BadInput, match="version was None"):
        two.resume({})
    with pytest.raises(BadInput, match="version was None"):
        two.resume({}, allow_change=True)


def indices(made: SampleSequence, steps: Iterable[int]) -> np.ndarray:
    return np.concatenate([made.batch(step).index for step in steps])


BLOCK = 4096
CHANGES = {
    "weights": ({"sizes": [[3000], [1000]], "weights": [1, 1]}, {"sizes": [[3000], [1000]], "weights": [1, 3]}),
    "source": (
        {"sizes": [[3000], [1000]], "weights": [1, 1]},
        {"sizes": [[3000], [1000], [900]], "weights": [2, 2, 1]},
    ),
    "second source": ({"sizes": [[3000, 60]], "weights": [1]}, {"sizes": [[3000, 60], [900]], "weights": [2, 1]}),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_takes_effect_at_a_blocks_end_and_nowhere_else(kind: str) -> None:
    old, new = (sequence(*one["sizes"], weights=one["weights"], global_batch=256) for one in CHANGES[kind])
    state = json.loads(json.dumps(old.state(3)))
    with pytest.raises(BadInput, match="--allow-change"):
        new.resume(state)
    new.resume(state, allow_change=True)
    # A single source has blocks of one sample.
    changed = 3 if kind == "second source" else BLOCK // 256
    np.testing.assert_array_equal(indices(new, range(changed)), indices(old, range(changed)))
    picked = [new.batch(step) for step in range(changed + 2 * BLOCK // 256)]
    source, sample = (np.concatenate([getattr(one, name) for one in picked]) for name in ("source", "sample"))
    weights, sizes = np.array(CHANGES[kind][1]["weights"]), CHANGES[kind][1]["sizes"]
    assert np.abs(np.bincount(source[changed * 256 :]) - weights / weights.sum() * 2 * BLOCK).max() <= 2
    for number, size in enumerate(map(sum, sizes)):
        mine = sample[source == number]
        turns = np.sort(mine[: len(mine) // size * size].reshape(-1, size), axis=1)
        assert (turns == np.arange(size)).all(), "an epoch of the source holds each sample once"


def test_a_changed_run_goes_on_as_itself_and_may_change_again() -> None:
    first, second, third, back = (
        sequence([3000], [1000], weights=weights, global_batch=256) for weights in ([1, 1], [1, 3], [5, 1], [1, 3])
    )
    second.resume(first.state(3), allow_change=True)
    again = sequence([3000], [1000], weights=[1, 3], global_batch=256)
    again.resume(json.loads(json.dumps(second.state(5))))
    assert again.state(50) == second.state(50)
    np.testing.assert_array_equal(indices(again, (4, 15, 16, 31, 32)), indices(second, (4, 15, 16, 31, 32)))
    # Changed again after the first change took effect, and back before the second did.
    third.resume(second.state(20), allow_change=True)
    assert third.state(0)["changes"] == [[BLOCK, [2048, 2048]], [2 * BLOCK, [1024, 3072]]]
    np.testing.assert_array_equal(indices(third, (15, 16, 31)), indices(second, (15, 16, 31)))
    back.resume(third.state(25), allow_change=True)
    np.testing.assert_array_equal(indices(back, (16, 31, 32, 39)), indices(second, (16, 31, 32, 39)))
    cursors = third.state(48)["cursors"]
    # 16 steps of each mixture: 1 to 1, 1 to 3, 5 to 1.
    assert cursors == [2048 + 1024 + 3413, 2048 + 3072 + 683]
    assert third.state(48)["epochs"] == [2, 5]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (sequence([70], [30]), sequence([70]), "fingerprint was .* new sources after the old ones"),
        (sequence([70]), sequence([70], [30], seed=4), "seed was 3 and is 4"),
        (sequence([70], [30], weights=[2, 1]), sequence([70], [30], global_batch=8), "global_batch was 16"),
    ],
)
def test_what_a_change_does_not_take(old: SampleSequence, new: SampleSequence, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        new.resume(old.state(5), allow_change=True)


def test_a_broken_history_is_bad_input() -> None:
    made = sequence([70], [30])
    for changes in ([[0, [1, 1]]], [[5, [2048, 2048]]], [["x"]], 7, [[4096, [0, 4096]]]):
        with pytest.raises(BadInput, match="data state cannot be read"):
            made.resume({**made.state(3), "changes": changes})


def test_a_source_smaller_than_its_share_of_a_batch_goes_round() -> None:
    made = sequence([3], [400], global_batch=64)
    picked = made.batch(5)
    mine = picked.sample[picked.source == 0]
    assert len(mine) == 32 and np.bincount(mine, minlength=3).min() >= 10
    assert len(set(picked.epoch[picked.source == 0].tolist())) > 10
    assert made.state(6)["epochs"] == [6 * 32 // 3, 0]

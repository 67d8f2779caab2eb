"""Steps whose numbers went wrong are refused, spikes are found and nothing else is, and a resumed watch agrees."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import WatchConfig
from pretrain.spikes import Recent
from pretrain.watch import Verdict, Watch

CURVES = Path(__file__).parent / "curves.json.gz"


def judge(watch: Watch, loss: float, norm: float = 1.0, step: int = 10) -> Verdict:
    watch.see_loss(step, loss)
    assert watch.accepts(norm) == watch.verdict.update
    return watch.verdict


def watch_of(**settings: Any) -> Watch:
    return Watch(WatchConfig(**{"window": 16, **settings}))


def steady(watch: Watch, steps: int = 16) -> None:
    draw = np.random.default_rng(0)
    for _ in range(steps):
        assert judge(watch, 3 + 0.1 * draw.standard_normal(), math.exp(0.2 * draw.standard_normal())).action == "go"


def test_recorded_runs_of_the_demo_raise_no_alarm() -> None:
    # Losses and norms of every step of two real runs: 1,200 steps of the demo, 6,000 on spoken digits.
    curves = json.loads(gzip.decompress(CURVES.read_bytes()))
    assert [len(curve["loss"]) for curve in curves.values()] == [1200, 6000]
    for curve in curves.values():
        watch = Watch(WatchConfig(policy="skip"))
        found = [judge(watch, loss, norm) for loss, norm in zip(curve["loss"], curve["grad_norm"], strict=True)]
        assert {verdict.kind for verdict in found} == {None}
        # The same curves with one step spoilt, anywhere: found at once, and nothing else is.
        for at in (200, 700, 1150):
            watch = Watch(WatchConfig(policy="skip"))
            for step, (loss, norm) in enumerate(zip(curve["loss"], curve["grad_norm"], strict=True)):
                spoilt = judge(watch, 2.5 * loss if step == at else loss, 1.2 * norm).kind
                assert spoilt == ("loss_spike" if step == at else None)


def test_a_spike_of_the_norm_is_found_where_the_loss_says_nothing() -> None:
    watch = watch_of(policy="skip")
    steady(watch)
    verdict = judge(watch, 3.0, 30.0)
    assert (verdict.action, verdict.kind) == ("skip", "gradient_spike")
    assert verdict.z is not None and verdict.z > 10 and "the gradient's norm is 30," in str(verdict.reason)


def test_there_is_no_alarm_before_there_is_history() -> None:
    watch = watch_of(policy="skip")
    assert all(judge(watch, loss).kind is None for loss in (3, 3.1, 900, 3, 3.05, 2.9, 3, 3))
    assert judge(watch, 900).kind == "loss_spike"


@given(st.floats(0.01, 1e6), st.floats(1e-6, 1e6))
def test_a_flat_curve_does_not_alarm_at_what_is_next_to_nothing(level: float, norm: float) -> None:
    watch = watch_of(policy="skip")
    for _ in range(16):
        assert judge(watch, level, norm).kind is None
    assert judge(watch, level * 1.05, norm * 2).kind is None
    assert judge(watch, level * 0.01, norm * 0.01).kind is None, "a fall is no news"
    assert judge(watch, level * 1.2, norm).kind == "loss_spike"
    assert judge(watch, level, norm * 4).kind == "gradient_spike"


@given(st.floats(-50, 50), st.floats(0.01, 5), st.integers(0, 2**32))
@settings(max_examples=50)
def test_the_score_is_the_textbooks(middle: float, width: float, seed: int) -> None:
    values = middle + width * np.random.default_rng(seed).standard_normal(40)
    recent = Recent("loss", 25)
    for value in values:
        recent.add(float(value))
    last = values[-25:]
    spread = 1.4826 * np.median(np.abs(last - np.median(last)))
    expected = (middle + 9 * width - np.median(last)) / max(spread, 0.01 * abs(np.median(last)))
    assert recent.score(middle + 9 * width) == pytest.approx(max(0.0, expected), rel=1e-9)
    assert recent.typical() == pytest.approx(np.median(last))


def test_log_trains_and_learns_a_new_level() -> None:
    watch = watch_of(policy="log")
    steady(watch)
    found = [judge(watch, 9.0 + 0.01 * step) for step in range(12)]
    assert all(verdict.update for verdict in found)
    assert found[0].kind == "loss_spike" and found[-1].kind is None


def test_what_was_skipped_is_no_history_and_too_many_in_a_row_stop() -> None:
    watch = watch_of(policy="skip", max_spikes=3)
    steady(watch)
    before = watch.state()
    assert [judge(watch, 90.0).action for _ in range(2)] == ["skip", "skip"]
    assert {**watch.state(), "spikes": 0} == before
    assert judge(watch, 3.0).action == "go"
    assert [judge(watch, 90.0).action for _ in range(3)] == ["skip", "skip", "stop"]
    assert "spikes in a row: 3 (watch.max_spikes), steps 8 to 10; of the last one the" in str(watch.verdict.reason)
    assert not watch.verdict.update


def test_the_number_of_roll_backs_is_limited() -> None:
    watch = watch_of(policy="roll_back", max_roll_backs=2)
    steady(watch)
    state = watch.state()
    for times in range(2):
        assert judge(watch, 90.0).action == "roll_back"
        watch.resume(state)
        watch.roll_backs = times + 1
    verdict = judge(watch, 90.0)
    assert verdict.action == "stop" and "gone back 2 times (watch.max_roll_backs)" in str(verdict.reason)


def test_what_is_not_finite_is_skipped_and_no_spike() -> None:
    watch = watch_of(policy="roll_back", max_non_finite=3)
    steady(watch)
    before = watch.state()
    assert judge(watch, math.nan, math.nan) == Verdict("skip", "loss_not_finite", "the loss is nan")
    assert judge(watch, 3.0, math.inf) == Verdict("skip", "gradient_not_finite", "the gradient is not finite")
    assert {**watch.state(), "non_finite": 0} == before
    stopped = judge(watch, math.inf, 1.0)
    assert stopped.action == "stop" and stopped.kind == "loss_not_finite"
    said = "3 steps in a row had a loss or gradient that is not finite (watch.max_non_finite): steps 8 to 10"
    assert stopped.reason == said


NUMBERS = st.tuples(
    st.one_of(st.floats(0.1, 10), st.sampled_from([math.nan, 1e4, math.inf])),
    st.one_of(st.floats(0.1, 10), st.sampled_from([math.inf, 1e5])),
)


@given(st.lists(NUMBERS, min_size=1, max_size=60), st.integers(0, 59), st.sampled_from(["log", "skip", "roll_back"]))
def test_a_resumed_watch_decides_as_an_undisturbed_one(numbers: list, cut: int, policy: str) -> None:
    whole, first, second = (watch_of(policy=policy, window=8) for _ in range(3))
    expected = [judge(whole, *pair) for pair in numbers]
    found = [judge(first, *pair) for pair in numbers[:cut]]
    second.resume(json.loads(json.dumps(first.state())))
    found += [judge(second, *pair) for pair in numbers[cut:]]
    assert found == expected
    assert second.state() == whole.state()


def test_a_loss_that_is_made_of_other_parts_is_no_spike() -> None:
    first = watch_of(policy="skip")
    steady(first)
    for changed, kind in ((["train.learning_rate", "data.train"], "loss_spike"), (["losses.text"], None)):
        watch = watch_of(policy="skip")
        watch.resume(first.state())
        watch.forget(changed)
        assert judge(watch, 60.0).kind == kind


def test_the_state_of_an_older_version_is_taken() -> None:
    watch = watch_of()
    watch.resume({"non_finite": 2})
    assert watch.state() == {"non_finite": 2, "spikes": 0, "roll_backs": 0, "losses": [], "norms": []}

"""Durations, and the time to stop."""

from __future__ import annotations

import time

import pytest

from data_pipelines.errors import BadInput
from pretrain.deadline import Deadline, parse_duration


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), (" 2 m ", 120)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["5", "m", "-5m", "5 days", ""])
def test_what_is_no_duration_is_named(text: str) -> None:
    with pytest.raises(BadInput, match="run.stop_before"):
        parse_duration(text)


def test_the_deadline_is_before_the_end_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert not Deadline("5m").passed()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 120))
    assert Deadline("5m").passed()
    assert not Deadline("1m").passed()
    assert not Deadline(None).passed()

"""Waiting for a checkpoint: who waits for another rank gives no sign of life, or nobody would see that one hang."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.checkpoint import saver
from pretrain.checkpoint.saver import Saver, _Pending
from pretrain.checkpoint.writer import WriterThread
from pretrain.config import CheckpointConfig


class Stuck(Exception):
    """Ends a wait that would not end."""


def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: Any, rounds: int) -> int:
    """Signs of life of rank 1 of 2 in a wait of so many rounds, in which rank 0 never gets through with its part."""
    monkeypatch.setattr(saver, "_POLL_SECONDS", 0.001)
    left = iter(range(rounds))

    def add(values: Sequence[float]) -> list[float]:
        if next(left, None) is None:
            raise Stuck
        return list(values)

    ticks: list[None] = []
    engine: Any = SimpleNamespace(device=SimpleNamespace(type="cpu"), is_main=False, rank=1, world_size=2, sum=add)
    found = Saver(engine, tmp_path, "run", CheckpointConfig(), lambda: ticks.append(None))
    work = WriterThread().start(what)
    found._pending = _Pending(1, tmp_path, time.perf_counter(), work, needed=1)
    with pytest.raises(Stuck):
        found.wait()
    return len(ticks)


def test_who_waits_for_a_rank_that_hangs_in_a_write_gives_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert waiting(tmp_path, monkeypatch, lambda count: count(7), 50) <= 2


def test_who_writes_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(count: Any) -> None:
        for _ in range(5000):
            count(1)
            time.sleep(0.001)

    assert waiting(tmp_path, monkeypatch, write, 200) > 10

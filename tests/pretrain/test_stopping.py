"""Stopping on purpose: the ranks' requests add up to one answer that says who asked."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.stopping import STOP_FILE, StopRequest
from tests.pretrain.tiny import tiny_config


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def requests(folder: Path, world_size: int, **run: str) -> list[StopRequest]:
    config = tiny_config(str(folder), run={"dir": str(folder), **run})
    return [StopRequest(config, rank, world_size) for rank in range(world_size)]


def test_all_ranks_hear_who_asked(tmp_path: Path) -> None:
    ranks = requests(tmp_path, 3)
    assert not any(rank.agree(sum(rank.told() for rank in ranks)) for rank in ranks)
    ranks[1].catch_signals()
    os.kill(os.getpid(), signal.SIGUSR1)
    ranks[2].catch_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    total = sum(rank.told() for rank in ranks)
    assert all(rank.agree(total) for rank in ranks)
    assert {rank.reason for rank in ranks} == {"SIGTERM and SIGUSR1"}


def test_every_rank_at_once_is_no_other_reason(tmp_path: Path) -> None:
    for world_size in (1, 2, 4096):
        (rank,) = requests(tmp_path, world_size)[:1]
        rank.catch_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        assert rank.agree(world_size * rank.told()) and rank.reason == "SIGTERM"


def test_a_second_sigint_ends_at_once(tmp_path: Path) -> None:
    (rank,) = requests(tmp_path, 1)
    rank.catch_signals()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_first_sigint_saves_though_something_else_has_asked_already(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    (rank,) = requests(tmp_path, 1)
    rank.catch_signals()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert rank.told() > 0
    os.kill(os.getpid(), signal.SIGINT)
    assert rank.agree(rank.told()) and rank.reason == "SIGUSR1 and SIGINT and a file named STOP"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_file_is_seen_by_rank_0_and_taken_away(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    first, second = requests(tmp_path, 2)
    assert second.told() == 0 and first.agree(first.told()) and first.reason == "a file named STOP"
    second.done()
    assert (tmp_path / STOP_FILE).exists()
    first.done()
    first.done()
    assert not (tmp_path / STOP_FILE).exists()


def test_a_look_for_the_file_is_rare(tmp_path: Path) -> None:
    (rank,) = requests(tmp_path, 1)
    assert rank.told() == 0
    (tmp_path / STOP_FILE).touch()
    assert rank.told() == 0
    end = time.monotonic() + 5
    while rank.told() == 0:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_deadline_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    (rank,) = requests(tmp_path, 1, stop_before="5m")
    assert rank.agree(rank.told()) and rank.reason == "the time limit is near (run.stop_before)"

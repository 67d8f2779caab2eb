"""Signs of life as another process reads them, and the stacks of a process that hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain import train
from pretrain.config import Config
from pretrain.heartbeat import (
    FOLDER_VARIABLE,
    STACKS_SIGNAL,
    Beat,
    Failure,
    Pulse,
    read_beat,
    read_failure,
    stacks_file,
)
from tests.pretrain.tiny import tiny_config
from tests.ranks import ROOT


def test_beats_and_ticks_are_read_elsewhere(tmp_path: Path) -> None:
    assert read_beat(tmp_path, 3) is None
    pulse = Pulse(3, tmp_path)
    assert read_beat(tmp_path, 3) == Beat(os.getpid(), 0, "start", 1, 0)
    pulse.beat("backward", 12)
    pulse.tick()
    assert read_beat(tmp_path, 3) == Beat(os.getpid(), 12, "backward", 2, 1)
    pulse.beat("optimizer", 12)
    assert read_beat(tmp_path, 3) == Beat(os.getpid(), 12, "optimizer", 3, 1)
    with pulse.ticking():
        end = time.monotonic() + 10
        while (beat := read_beat(tmp_path, 3)) is None or beat.ticks < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
    assert beat.count == 3


def test_without_a_supervisor_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    pulse = Pulse(0)
    pulse.beat("data", 1)
    pulse.tick()
    pulse.fail(ValueError("x"))
    assert not list(tmp_path.iterdir())


def test_the_exception_that_ended_a_rank(tmp_path: Path) -> None:
    pulse = Pulse(0, tmp_path)
    pulse.beat("forward", 4)
    assert read_failure(tmp_path, 0) is None
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        pulse.fail(error)
    failure = read_failure(tmp_path, 0)
    assert failure is not None and (failure.step, failure.phase) == (4, "forward")
    assert failure.line == "ValueError: two lines" and "test_heartbeat.py" in failure.text
    pulse.fail(RuntimeError("while it ended"))
    assert read_failure(tmp_path, 0) == failure


def test_what_ends_a_rank_is_told_before_the_others_can_fail_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Failure | None] = []

    class Broken:
        """An engine of a group that closes as soon as this rank leaves it."""

        rank, is_main = 0, True

        def __init__(self, config: Config) -> None:
            pass

        def gather_objects(self, mine: object) -> list[object]:
            return [mine]

        def barrier(self) -> None:
            raise ValueError("the cause")

        def close(self) -> None:
            told.append(read_failure(tmp_path, 0))

    monkeypatch.setattr(train, "Engine", Broken)
    with pytest.raises(ValueError, match="the cause"):
        train._train(tiny_config(str(tmp_path / "run")), "auto", (), Pulse(0, tmp_path), None)
    assert [failure.line for failure in told if failure] == ["ValueError: the cause"]


def test_a_process_that_hangs_in_native_code_and_its_child_answer_with_stacks(tmp_path: Path) -> None:
    # Holds the interpreter's lock, as a library that hangs may.
    code = """
import ctypes, os
from pretrain.heartbeat import answer_with_stacks
answer_with_stacks(5)
child = os.fork()
print(os.getpid(), child, flush=True) if child else None
ctypes.PyDLL(None).sleep(60)
"""
    environment = {**os.environ, FOLDER_VARIABLE: str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    try:
        end = time.monotonic() + 20
        while stacks_file(tmp_path, 5).read_text().count("line 7 in <module>") < 2:
            assert time.monotonic() < end
            for pid in pids:
                os.kill(pid, STACKS_SIGNAL)
                # They write into one file, and would mix their lines.
                time.sleep(0.1)
    finally:
        for pid in pids:
            os.kill(pid, 9)
        process.communicate(timeout=20)

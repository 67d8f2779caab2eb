"""A disk that is full, or fails, during a save: what is said, what is left, and what becomes of the run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint
from pretrain.checkpoint.manifest import bytes_of
from tests.faults.tracing import attached, ready
from tests.ranks import Rank, started_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

PROGRAM = "tests.faults.saving_rank"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose checkpoints lie on a file system of their own, in memory."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield tmp_path / "run"
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def resize(run: Path, num_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", run / "checkpoints"], check=True)


@contextlib.contextmanager
def one_checkpoint_fits(run: Path, **case: Any) -> Iterator[Rank]:
    """A rank that has saved once and finds no room for a second checkpoint beside the first."""
    with started_ranks(PROGRAM, [str(run), json.dumps(case)], 1) as (rank,):
        ready(run.parent, [rank])
        resize(run, int(1.5 * bytes_of(checkpoint.folder_of(run, 2))) + (1 << 20))
        (run.parent / "go").touch()
        yield rank


def said(rank: Rank, words: str, timeout: float = 60) -> str:
    """The first line on standard error with these words, once it is there."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        for line in rank.err.read_text().splitlines():
            if words in line:
                return line
        time.sleep(0.01)
    raise AssertionError(f"nothing was said with {words!r}: {rank.err.read_text()[-2000:]}")


def steps_left(run: Path) -> list[int]:
    """Steps of the checkpoints, each of which must be valid; nothing else may lie beside them."""
    listed = checkpoint.list_checkpoints(run)
    assert all(found.valid for found in listed), listed
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f.path.name for f in listed} | {"latest"}
    return [found.step for found in listed]


def test_without_room_the_run_says_so_goes_on_and_saves_again_when_there_is(run: Path) -> None:
    with one_checkpoint_fits(run, steps=16) as rank:
        line = said(rank, "no checkpoint of step 4")
        about = os.statvfs(run / "checkpoints")
        match = re.search(r"no room for it: ([\d,]+) bytes needed, ([\d,]+) bytes available at (\S+);", line)
        assert match, line
        needed, available = (int(match[i].replace(",", "")) for i in (1, 2))
        assert available == about.f_bavail * about.f_frsize < needed
        size = bytes_of(checkpoint.folder_of(run, 2))
        assert size < needed < 1.1 * size + (1 << 20)
        assert match[3] == str(run / "checkpoints") and line.endswith(
            "training goes on, the next one is due as planned"
        )
        assert steps_left(run) == [2]
        resize(run, 256 << 20)
        rank.process.join(100)
        assert rank.process.exitcode == 0, rank.err.read_text()[-2000:]
    assert steps_left(run) == [16]
    log = [json.loads(entry) for entry in (run / "checkpoints.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(2, 17, 2))
    assert "no room" in log[1]["reason"] and log[-1]["reason"] is None
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 16


def test_the_last_checkpoint_of_a_run_must_succeed(run: Path) -> None:
    with one_checkpoint_fits(run, steps=4) as rank:
        rank.process.join(60)
        errors = rank.err.read_text()
        assert rank.process.exitcode == 1
        assert errors.count("no checkpoint of step 4") == 1
        assert "error: no checkpoint of step 4: no room for it: " in errors and "Traceback" not in errors
    assert steps_left(run) == [2]


def test_a_disk_that_fills_up_meanwhile_stops_the_run_where_that_is_asked_for(run: Path) -> None:
    with one_checkpoint_fits(run, steps=40, on_failure="stop", mutation="no room check") as rank:
        rank.process.join(60)
        errors = rank.err.read_text()
        assert rank.process.exitcode == 1
        (line,) = [line for line in errors.splitlines() if "no checkpoint of step 4" in line]
        words = r"No space left on device at \S+, ([\d,]+) bytes needed in all, ([\d,]+) bytes available"
        match = re.search(words, line)
        assert line.startswith("error: ") and match, line
        needed, available = (int(match[i].replace(",", "")) for i in (1, 2))
        assert available < needed and bytes_of(checkpoint.folder_of(run, 2)) < needed
        assert "Traceback" not in errors and "unexpected pos" not in errors
    assert steps_left(run) == [2]
    steps = [json.loads(entry)["step"] for entry in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] < 40


def test_training_goes_on_while_a_slow_disk_takes_its_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    case = {"steps": 60, "every_steps": 12}
    with started_ranks(PROGRAM, [str(run), json.dumps(case)], 1) as (rank,):
        (thread,) = ready(tmp_path, [rank])
        with attached(thread, "-e", "inject=fsync:delay_enter=60000:when=1..12"):
            (tmp_path / "go").touch()
            said(rank, "checkpoint of step 24")
            during = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            rank.process.join(60)
            assert rank.process.exitcode == 0, rank.err.read_text()[-2000:]
    log = {entry["step"]: entry for entry in map(json.loads, (run / "checkpoints.jsonl").read_text().splitlines())}
    assert log[24]["seconds"] > 0.6 and log[24]["reason"] is None
    assert log[24]["stall_seconds"] < 0.3 * log[24]["seconds"], log[24]
    assert during[-1] >= 26
    assert steps_left(run) == [60]


def test_an_error_of_another_ranks_disk_is_named_and_the_next_save_works(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started_ranks(PROGRAM, [str(run), json.dumps({"steps": 8})], 2) as ranks:
        thread = ready(tmp_path, ranks)[1]
        with attached(thread, "-e", "inject=fsync:error=EIO:when=1"):
            (tmp_path / "go").touch()
            for one in ranks:
                one.process.join(60)
                assert one.process.exitcode == 0, one.err.read_text()[-2000:]
        (line,) = [line for line in ranks[0].err.read_text().splitlines() if "no checkpoint" in line]
        assert "step 4: rank 1 could not write it: Input/output error at " in line
        assert "no checkpoint" not in ranks[1].err.read_text()
    assert steps_left(run) == [8]

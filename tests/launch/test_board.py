"""Supervisors of two nodes: who is named, who is left alone, and that both end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.board import Board
from launch.node import main
from launch.supervisor import board_of
from tests.launch.supervised import processes_with
from tests.ranks import ROOT

LIMIT = 3
BUSY_SECONDS = 8

# Rank 0 works on something long, of which it gives signs, while rank 1 waits for it; then rank 0 hangs.
RANK = """
import os, sys, time
from pretrain.heartbeat import Pulse, answer_with_stacks
rank, mode = int(sys.argv[1]), sys.argv[2]
answer_with_stacks(rank)
pulse = Pulse(rank)
pulse.beat("data", 1)
if mode == "bad" and rank == 0:
    time.sleep(1)
    sys.exit(2)
if rank == 1:
    pulse.beat("forward", 1)
for _ in range(int(sys.argv[3]) * 10 if rank == 0 else 0):
    pulse.tick()
    time.sleep(0.1)
time.sleep(600)
"""

NODE = """
import os, sys
from pathlib import Path
from launch.supervisor import Job, supervise
from pretrain.config import SupervisorConfig
node, folder, mode = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
command = [sys.executable, str(folder / "rank.py"), str(node), mode, sys.argv[4]]
job = Job(command, os.environ, folder, "again", range(node, node + 1), node, 2)
sys.exit(supervise(job, SupervisorConfig(hang_seconds=int(sys.argv[5]))))
"""


def run_nodes(folder: Path, mode: str) -> tuple[list[int], list[str]]:
    """Exit statuses and standard errors of two supervisors that run until they end by themselves."""
    (folder / "rank.py").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "1", "TMPDIR": str(folder)}
    nodes = []
    try:
        for node in (0, 1):
            arguments = [str(node), str(folder), mode, str(BUSY_SECONDS), str(LIMIT)]
            command = [sys.executable, "-c", NODE, *arguments]
            nodes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        said = [node.communicate(timeout=60)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert not processes_with(str(folder))
    return [node.returncode for node in nodes], said


@pytest.mark.timeout(120)
def test_ranks_that_wait_for_a_busy_node_are_left_alone_until_it_hangs(tmp_path: Path) -> None:
    start = time.monotonic()
    statuses, said = run_nodes(tmp_path, "hang")
    assert statuses == [76, 76], said
    assert time.monotonic() - start > BUSY_SECONDS
    (file,) = tmp_path.glob("incident-*.json")
    incident = json.loads(file.read_text())
    assert (incident["rank"], incident["phase"], incident["kind"]) == (0, "data", "hang"), said
    assert len(incident["ranks"]) == 2 and set(incident["stacks"]) == {"0", "1"}
    assert "ended with another node: rank 0: no sign of life" in "".join(said)


@pytest.mark.timeout(120)
def test_bad_input_of_one_node_is_that_of_all(tmp_path: Path) -> None:
    statuses, said = run_nodes(tmp_path, "bad")
    assert statuses == [2, 2] and "ended with another node: bad input" in said[1], said
    assert not list(tmp_path.glob("incident-*"))


def test_what_stops_the_first_node_before_its_ranks_ends_the_others_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"run": {"dir": str(tmp_path / "run")}, "data": {"train": "unused"}}))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        shape = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", "0", "--main_process_port", str(port)]
        assert main([*shape, "-m", "pretrain.train", str(config)]) == 2
    assert f"port {port}" in capsys.readouterr().err
    other = board_of(tmp_path / "run", 1, 2)
    assert other is not None and other.ended() == ("bad input", 2)


def test_each_alarm_has_its_time_and_a_node_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (Board(tmp_path, node, 3) for node in range(3))
    clock = [1000.0]
    monkeypatch.setattr("launch.board.time.monotonic", lambda: clock[0])
    for board in (first, second):
        assert board.raise_alarm() is not None
        for waited in (0, 10, 20):
            assert third.raise_alarm() is None and third.standing_seconds() == waited
            clock[0] += 10
        board.withdraw()
    # Gone between two looks, and once more much later: each time as new.
    assert third.standing_seconds() == 0
    clock[0] += 1000
    assert third.standing_seconds() == 0


def test_a_folder_that_takes_nothing_ends_no_supervisor(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    board = Board(tmp_path / "logs" / "nodes", 0, 2)
    assert board.raise_alarm() is None and board.standing_seconds() == 0
    board.answer("an alarm", [])
    board.announce_end("rank 1: killed", 76)
    board.withdraw()
    assert board.ended() is None and board.alarm() is None


def test_one_alarm_at_a_time_and_a_node_that_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.board._SECONDS_TO_ANSWER", 0.3)
    first, second = Board(tmp_path, 0, 3), Board(tmp_path, 1, 3)
    alarm = first.raise_alarm()
    assert alarm is not None and second.raise_alarm() is None and first.alarm() is None
    assert second.alarm() == alarm
    second.answer(alarm, [])
    assert second.alarm() is None
    assert first.collect(alarm) == ([], [2])
    first.withdraw()
    again = second.raise_alarm()
    assert again not in (None, alarm) and first.alarm() == again

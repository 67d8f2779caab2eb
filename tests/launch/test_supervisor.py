"""The supervisor over ranks that hang, die or lose what is above them: what it says, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launch.incident import Incident, Log, report
from launch.processes import children
from launch.ranks import ENDED_RANKS, joint_status
from launch.supervisor import Job, _Attempt, _Signals, seconds_before_restart
from pretrain.config import SupervisorConfig
from pretrain.heartbeat import Pulse
from tests.launch.supervised import Supervised

pytestmark = pytest.mark.timeout(120)
LIMIT = 2


def test_a_stopped_rank_is_named_with_the_stacks_of_the_others(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "loop", hang_seconds=LIMIT)
    running.signal_rank(1, signal.SIGSTOP)
    start = time.monotonic()
    status, said = running.end(LIMIT + 10)
    assert status == 76, said
    assert time.monotonic() - start < LIMIT + 10
    incident = running.incident()
    assert (incident["kind"], incident["rank"], incident["status"]) == ("hang", 1, 76)
    assert incident["phase"] in ("data", "forward", "backward", "optimizer") and incident["step"] >= 2
    assert "rank 1: no sign of life for 2 s (supervisor.hang_seconds): it is stopped (SIGSTOP)" in said
    assert "in meet" in incident["stacks"]["0"] and "1" not in incident["stacks"]
    assert "in meet" in (tmp_path / incident["stack_files"]["0"]).read_text()
    assert incident["resume"] == "triptych train again.yaml" and incident["resume"] in said
    assert [rank["rank"] for rank in incident["ranks"]] == [0, 1]


def test_a_rank_that_waits_for_something_else_is_named(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "sleep", hang_seconds=LIMIT)
    status, said = running.end()
    assert status == 76, said
    incident = running.incident()
    assert (incident["rank"], incident["step"], incident["phase"]) == (1, 3, "backward")
    assert "the others wait for it in a collective" in said and set(incident["stacks"]) == {"0", "1"}


def test_a_start_has_its_own_limit(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "start", hang_seconds=600, start_seconds=LIMIT)
    status, said = running.end()
    incident = running.incident()
    assert status == 76 and "supervisor.start_seconds" in said, said
    assert (incident["rank"], incident["step"], incident["phase"]) == (1, 0, "start")


def test_a_killed_rank_is_named_with_its_signal_and_place(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "loop")
    running.signal_rank(1, signal.SIGKILL)
    status, said = running.end()
    incident = running.incident()
    assert status == 76, said
    assert (incident["kind"], incident["rank"], incident["signal"]) == ("rank_died", 1, "SIGKILL")
    assert f"rank 1: killed by SIGKILL, most often for want of memory (in {incident['phase']} of step" in said
    assert "no checkpoint to go on from yet" in said and "go on with: triptych train again.yaml" in said
    assert len(said.splitlines()) <= 5, said


def test_a_dead_launcher_takes_its_ranks_along_within_5_seconds(tmp_path: Path) -> None:
    for fault in ("loop", "deaf"):
        running = Supervised(tmp_path / fault, fault)
        running.pid(0)
        (launcher,) = children(running.process.pid)
        os.kill(launcher, signal.SIGKILL)
        start = time.monotonic()
        status, said = running.end()
        assert time.monotonic() - start < 7 and status == 76, said
        assert running.incident()["kind"] == "launcher_died" and "the launcher: killed by SIGKILL" in said
        saved = [(running.folder / f"saved-{rank}").exists() for rank in (0, 1)]
        assert saved == [fault == "loop"] * 2


def test_a_launcher_that_does_not_end_is_no_rank_s_fault(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "", hang_seconds=LIMIT)
    running.pid(0)
    (launcher,) = children(running.process.pid)
    os.kill(launcher, signal.SIGSTOP)
    status, said = running.end()
    assert status == 76 and running.incident()["rank"] == -1, said
    assert "every rank has ended and their launcher has not" in said


def test_a_stopped_data_worker_is_named_with_its_rank(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "stopped-worker", hang_seconds=LIMIT)
    status, said = running.end()
    incident = running.incident()
    assert status == 76 and (incident["rank"], incident["phase"]) == (1, "backward"), said
    assert "its data worker is stopped" in said


def test_a_killed_supervisor_leaves_nothing_and_the_ranks_save(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "loop")
    running.pid(0)
    running.process.kill()
    running.process.communicate(timeout=30)
    running.nothing_is_left(seconds=10)
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))


def test_both_killed_leave_nothing(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "deaf")
    running.pid(0)
    (launcher,) = children(running.process.pid)
    running.process.kill()
    os.kill(launcher, signal.SIGKILL)
    running.process.communicate(timeout=30)
    running.nothing_is_left(seconds=7)


def test_faults_are_followed_by_restarts_with_back_off(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "raise-once", max_restarts=2, backoff_seconds=0.5)
    status, said = running.end()
    assert status == 0, said
    assert "rank 1: ValueError: the reason (in backward of step 3)" in said
    assert "starting again in 0.5 s, restart 1 of 2" in said
    assert [entry["event"] for entry in running.log()] == ["end", "fault", "restart", "end"]
    assert running.incident()["exception"] == "ValueError: the reason" and running.incident()["status"] == 1


def test_the_same_step_twice_is_given_up(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "worker", max_restarts=5, backoff_seconds=0.1)
    status, said = running.end()
    assert status == 76, said
    assert "not started again: step 3 failed twice in a row" in said
    assert said.count("DataLoader worker (pid 12) is killed by signal: Killed") == 2
    assert running.log()[-1]["event"] == "gave up"


def test_no_restart_is_left(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "raise-later", max_restarts=1, backoff_seconds=0.1)
    status, said = running.end()
    assert status == 1, said
    assert "not started again: no restart is left (supervisor.max_restarts 1)" in said
    assert [entry["step"] for entry in running.log() if entry["event"] == "fault"] == [3, 4]


def test_a_stop_file_or_a_signal_ends_the_wait_for_a_restart(tmp_path: Path) -> None:
    by_file = Supervised(tmp_path / "a", "raise", max_restarts=3, backoff_seconds=60)
    while '"restart"' not in by_file.wait_for("logs/supervisor.jsonl"):
        time.sleep(0.05)
    (by_file.folder / "STOP").touch()
    assert by_file.end()[0] == 75 and not (by_file.folder / "STOP").exists()
    by_signal = Supervised(tmp_path / "b", "raise", max_restarts=3, backoff_seconds=60)
    while '"restart"' not in by_signal.wait_for("logs/supervisor.jsonl"):
        time.sleep(0.05)
    by_signal.process.send_signal(signal.SIGTERM)
    assert by_signal.end()[0] == 75


def test_a_second_signal_ends_everything_at_once(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "deaf")
    running.pid(0)
    for _ in range(2):
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert running.end(10)[0] == 130


@pytest.mark.parametrize(
    ("ended", "failed", "status", "rank", "kind"),
    [
        ([[0, -6], [1, -9]], [], 76, 1, "rank_died"),
        ([[0, -6], [1, -6]], [], 76, 0, "rank_died"),
        ([[0, -6], [1, -6]], [1], 1, 1, "exception"),
        ([[0, -6], [1, -11]], [0], 76, 1, "rank_died"),
    ],
)
def test_a_rank_that_aborts_because_another_died_is_not_the_one(
    tmp_path: Path, ended: list[list[int]], failed: list[int], status: int, rank: int, kind: str
) -> None:
    job = Job([], {}, tmp_path, "again", range(2))
    attempt = _Attempt(job, SupervisorConfig(), _Signals(), tmp_path, 1)
    (tmp_path / "heartbeats-1" / ENDED_RANKS).write_text(json.dumps(ended))
    for each in failed:
        Pulse(each, tmp_path / "heartbeats-1").fail(ValueError("the reason"))
    outcome = attempt._ended(joint_status([code for _, code in ended]))
    assert outcome.incident is not None
    assert (outcome.status, outcome.incident.rank, outcome.incident.kind) == (status, rank, kind)


def test_a_fault_that_two_nodes_saw_is_one_and_those_of_one_node_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for start, step in ((None, 12), (None, 12), ("1", 30), ("1", 29)):
        if start is not None:
            monkeypatch.setenv("SLURM_RESTART_COUNT", start)
        Log(tmp_path).write("fault", attempt=1, step=step)
    assert Log(tmp_path).faults("7") == [12, 30] and Log(tmp_path).faults("8") == []
    Log(tmp_path).write("fault", attempt=2, step=31)
    assert Log(tmp_path).faults("7") == [12, 30, 31]


def test_the_way_on_is_told_though_the_disk_takes_no_incident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").touch()
    died = Incident("rank_died", 1, 3, "forward", "killed")
    assert report(died, tmp_path / "run", 76, 1, "the command again") is None
    said = capsys.readouterr().err
    assert "go on with: the command again" in said and "the incident could not be written" in said


def test_back_off_doubles_and_has_a_cap() -> None:
    settings = SupervisorConfig(max_restarts=20, backoff_seconds=100)
    waits = [seconds_before_restart(list(range(n)), settings) for n in range(1, 6)]
    assert waits == [100, 200, 400, 600, 600]
    assert seconds_before_restart([5], SupervisorConfig()) == "no restart is left (supervisor.max_restarts 0)"
    assert seconds_before_restart([5, 7, 5], settings) == 400
    assert seconds_before_restart([0, 0], settings) == "it failed twice before its first step"

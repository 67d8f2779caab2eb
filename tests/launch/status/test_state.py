"""The state of a run, from files that the programs themselves write: owners, supervisors' logs, metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import BadInput
from launch.incident import Incident, Log, report
from launch.status.run_files import read_run, runs_below, span
from launch.status.slurm import Job
from launch.status.snapshot import Looker, Snapshot
from launch.status.state import State, judge
from launch.status.target import run_directory, run_of_command
from pretrain.owner import OWNER_FILE, Owner, read_owner

CONFIG = "run: {dir: %s, name: small}\ndata: {train: d, global_batch: 8}\ntrain: {max_steps: 100, warmup_steps: 1}\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG % path)
    return path


@pytest.fixture
def owned(run: Path) -> Iterator[Path]:
    owner = Owner.take(run, 60, lambda line: None)
    yield run
    owner.give_back()


def started(run: Path, *steps: int) -> None:
    starts = [
        {"time": time.time() - 50 + i, "step": step, "host": "here", "device": "cpu"} for i, step in enumerate(steps)
    ]
    (run / "run.json").write_text(json.dumps({"run_id": "r", "starts": starts, "world_sizes": [2] * len(steps)}))


def trained(run: Path, last: int, seconds: float = 0.5) -> None:
    now = time.time()
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "time": now - (last - step) * seconds,
            "step_seconds": 0.1,
            "loss": 1.0,
            "data_wait_fraction": 0.25,
        }
        for step in range(1, last + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def look(run: Path) -> Snapshot:
    return Looker(run).look()


def test_before_anything_has_started(run: Path) -> None:
    assert look(run).state == State("new", "nothing has started yet")
    facts = look(run).as_json()
    assert facts["step"] == 0 and facts["max_steps"] == 100 and facts["loss"] is None and not facts["live"]


def test_an_owner_without_steps_is_starting(owned: Path) -> None:
    assert look(owned).state.word == "starting"
    started(owned, 0)
    assert look(owned).state.word == "starting"


def test_an_owner_with_steps_is_training_with_speed_and_end(owned: Path) -> None:
    started(owned, 0)
    trained(owned, 60)
    snapshot = look(owned)
    assert snapshot.state == State("training")
    facts = snapshot.as_json()
    # By the clock: saving and evaluating between steps count, so 0.5 s a step and not the 0.1 s in it.
    assert facts["seconds_a_step"] == pytest.approx(0.5, rel=1e-3) and facts["samples_per_second"] == pytest.approx(
        16, rel=1e-3
    )
    assert facts["seconds_left"] == pytest.approx(20, rel=1e-3) and facts["share"] == 0.6
    assert facts["data_wait_fraction"] == pytest.approx(0.25)


def test_a_resumed_run_is_starting_until_its_next_step(owned: Path) -> None:
    trained(owned, 60)
    lines = (owned / "metrics.jsonl").read_text().splitlines()
    old = [json.dumps(json.loads(line) | {"time": 1000.0 + i}) for i, line in enumerate(lines)]
    (owned / "metrics.jsonl").write_text("\n".join(old) + "\n")
    started(owned, 0, 60)
    assert look(owned).state == State("starting", "to go on from step 60")
    assert look(owned).as_json()["restarts"] == 1


def test_a_stop_file_shows_until_the_ranks_have_obeyed(owned: Path) -> None:
    started(owned, 0)
    trained(owned, 5)
    (owned / "STOP").touch()
    assert look(owned).state.word == "stopping"


def test_an_owner_elsewhere_is_silent_when_its_heartbeat_stands_still(owned: Path) -> None:
    record = read_owner(owned)
    assert record is not None
    started(owned, 0)
    trained(owned, 5)
    for age, word in ((1.0, "training"), (500.0, "silent")):
        elsewhere = replace(record, host="node7", boot_id="another", heartbeat=time.time() - age)
        # A file of its own, for the owner of this test goes on writing its heartbeat into the other one.
        (owned / "new").write_text(json.dumps(asdict(elsewhere)).ljust(1023) + "\n")
        os.replace(owned / "new", owned / OWNER_FILE)
        assert look(owned).state.word == word
    assert look(owned).state.why.startswith("no sign of life from host node7 for 8 min")


def test_an_owner_that_has_gone_without_a_word_was_killed(run: Path) -> None:
    program = (
        "import sys, os; from pathlib import Path; from pretrain.owner import Owner\n"
        "Owner.take(Path(sys.argv[1]), 60, print); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(run)], check=True, timeout=60)
    started(run, 0)
    trained(run, 7)
    state = look(run).state
    assert state.word == "killed" and "at step 7" in state.why


@pytest.mark.parametrize(
    ("status", "word"),
    [(75, "stopped"), (79, "stopped"), (76, "failed"), (1, "failed"), (2, "failed"), (143, "killed")],
)
def test_what_the_supervisor_wrote_last_counts(run: Path, status: int, word: str) -> None:
    started(run, 0)
    trained(run, 30)
    Log(run).write("end", attempt=1, started=time.time(), status=status)
    assert look(run).state.word == word


def test_a_fault_is_told_with_its_incident(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(run, 0)
    trained(run, 30)
    incident = Incident("rank_died", 1, 31, "forward", "killed by SIGKILL")
    report(incident, run, 76, 1, "triptych train x")
    Log(run).write("end", attempt=1, started=time.time(), status=76)
    Log(run).write("fault", attempt=1, incident="i", step=31, text=incident.headline(), status=76)
    snapshot = look(run)
    assert snapshot.state == State("failed", "rank 1: killed by SIGKILL (in forward of step 31) (status 76)")
    assert snapshot.as_json()["incidents"] == 1
    told = snapshot.as_json()["last_incident"]
    assert (told["kind"], told["rank"], told["step"], told["done"]) == ("rank_died", 1, 31, "ended with 76")
    Log(run).write("restart", number=1, wait_seconds=40)
    state = look(run).state
    assert state.word == "restarting" and state.why.startswith("restart 1 in 40 s, after: rank 1")


def test_all_steps_done_is_done(run: Path) -> None:
    started(run, 0)
    trained(run, 100)
    assert look(run).state == State("done", "100 steps")
    Log(run).write("end", attempt=1, started=time.time(), status=0)
    assert look(run).state.word == "done"


def test_what_slurm_says_of_its_job(run: Path) -> None:
    (run / "job.json").write_text(
        json.dumps({"jobs": [{"id": 7, "kind": "build"}, {"id": 8, "kind": "pretrain"}, {"id": 9, "kind": "eval"}]})
    )
    files = read_run(run)
    assert files.job_ids == ["7", "8", "9"] and files.training_job_ids == ["8"]
    waits = Job("8", "t", "PENDING", "Priority")
    assert judge(files, None, [waits, Job("9", "e", "PENDING", "Dependency")]) == State(
        "queued", "job 8: waits for jobs of higher priority"
    )
    assert judge(files, None, [Job("8", "t", "RUNNING", nodes="node[1-2]")]).word == "starting"
    cancelled = Job("8", "t", "CANCELLED", "DependencyNeverSatisfied", dependency="afterok:7(failed)")
    assert judge(files, None, [cancelled]) == State("failed", "job 8: cancelled (DependencyNeverSatisfied)")
    assert judge(files, None, [Job("8", "t", "TIMEOUT")]).word == "failed"


def test_a_run_that_has_not_begun_takes_its_config_from_its_job(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "jobs" / "001").mkdir(parents=True)
    (run / "jobs" / "001" / "config.yaml").write_text(CONFIG % run)
    script = run / "jobs" / "001" / "pretrain.sbatch"
    (run / "job.json").write_text(json.dumps({"jobs": [{"id": 8, "kind": "pretrain", "script": str(script)}]}))
    assert read_run(run).name == "small" and look(run).as_json()["max_steps"] == 100


def test_torn_and_foreign_files_say_nothing(run: Path) -> None:
    for name in (
        "run.json",
        "owner.json",
        "checkpoints.jsonl",
        "job.json",
        "eval/results.json",
        "logs/supervisor.jsonl",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text('{"starts": [')
    (run / "incident-20260101-000000-hang-1.json").write_text("[]")
    (run / "config.yaml").write_text("run: {dir: x, unknown: 1}")
    snapshot = look(run)
    assert snapshot.state.word == "new" and snapshot.run.name == "run"
    assert snapshot.as_json()["incidents"] == 1 and snapshot.as_json()["last_incident"] is None


def test_which_run_is_meant(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started(run, 0)
    (tmp_path / "c.yaml").write_text(CONFIG % run)
    assert run_directory(str(run)) == run == run_directory(str(tmp_path / "c.yaml"))
    Log(run).write("end", status=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert runs_below(Path()) == [Path("run")]
    (run / "job.json").write_text(json.dumps({"jobs": [{"id": 4242, "kind": "pretrain"}]}))
    assert run_directory("4242").resolve() == run
    for wrong in ("nowhere", "4243", "config.yml"):
        with pytest.raises(BadInput):
            run_directory(wrong)
    with pytest.raises(BadInput, match="not a run directory"):
        read_run(tmp_path)


def test_the_run_of_a_job_that_was_submitted_by_hand(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG % "runs/a")
    assert run_of_command("/x/pretrain.sbatch c.yaml", str(tmp_path)) == tmp_path / "runs/a"
    by_hand = "/x/pretrain.sbatch c.yaml --set run.dir=runs/b --set=train.max_steps=7 --resume auto"
    assert run_of_command(by_hand, str(tmp_path)) == tmp_path / "runs/b"
    assert run_of_command("/x/job.sh", str(tmp_path)) is None
    assert run_of_command("/x/job.sh gone.yaml 'a", str(tmp_path)) is None


def test_spans() -> None:
    seconds = (0, 59.6, 61, 600, 7200, 7260, 3 * 86400, 3 * 86400 + 7200)
    assert [span(each) for each in seconds] == [
        "0 s",
        "1 min",
        "1 min 1 s",
        "10 min",
        "2 h",
        "2 h 1 min",
        "3 d",
        "3 d 2 h",
    ]

"""The state of a run, from files that the programs themselves write: owners, supervisors' logs, metrics."""

from __future__ import annotations

import json
import os
import re
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
from launch.status.run_files import RankBeat, read_run, runs_below, span
from launch.status.slurm import FORGOTTEN, Job
from launch.status.snapshot import Looker, Snapshot
from launch.status.state import State, judge
from launch.status.target import run_directory, run_of_command
from launch.status.words import in_words
from pretrain.owner import OWNER_FILE, Owner, read_owner
from tests.faults.harness import ENVIRONMENT

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
        {"time": time.time() + i / 1000, "step": step, "host": "here", "device": "cpu"} for i, step in enumerate(steps)
    ]
    (run / "run.json").write_text(json.dumps({"run_id": "r", "starts": starts, "world_sizes": [2] * len(steps)}))


def trained(run: Path, last: int, seconds: float = 0.5, ago: float = 0.0) -> None:
    now = time.time() - ago
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


def owned_otherwise(run: Path, **facts: Any) -> None:
    """Another owner's record, in a file of its own: a test's owner goes on writing into the other."""
    record = read_owner(run)
    assert record is not None
    (run / "new").write_text(json.dumps(asdict(replace(record, **facts))).ljust(1023) + "\n")
    os.replace(run / "new", run / OWNER_FILE)


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
    started(owned, 0)
    trained(owned, 5)
    for age, word in ((1.0, "training"), (500.0, "silent")):
        owned_otherwise(owned, host="node7", boot_id="another", heartbeat=time.time() - age)
        assert look(owned).state.word == word
    assert look(owned).state.why.startswith("no sign of life from host node7 for 8 min")


def test_without_a_step_for_long_it_has_stalled_unless_it_evaluates(owned: Path) -> None:
    started(owned, 0)
    raw = json.loads((owned / "run.json").read_text())
    raw["starts"][0]["time"] -= 3600
    (owned / "run.json").write_text(json.dumps(raw))
    an_hour_ago = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(time.time() - 3600))
    owned_otherwise(owned, since=an_hour_ago)
    for ago, word in ((50, "training"), (200, "stalled")):
        trained(owned, 10, ago=ago)
        assert look(owned).state.word == word
    state = look(owned).state
    assert state.live and state.why.startswith("no step for 3 min 20 s, where the last one took 0.1 s")
    assert "ended after 10 min" in state.why and look(owned).as_json()["seconds_left"] is None
    # It evaluates every 5 steps; the ranks themselves cannot be seen.
    with (owned / "config.yaml").open("a") as file:
        file.write("evaluation: {every_steps: 5}\n")
    assert look(owned).state == State("training", "evaluating, it seems, 3 min 20 s after step 10")
    trained(owned, 11, ago=200)
    assert look(owned).state.word == "stalled"
    beat = RankBeat(1, "evaluate", 11, 5)
    last = {"step": 11, "time": time.time() - 200, "step_seconds": 0.1}
    assert judge(replace(read_run(owned), beats=[beat]), last).word == "training"
    stopped = replace(beat, phase="backward", process="stopped")
    assert "; rank 1 is stopped; " in judge(replace(read_run(owned), beats=[stopped]), last).why


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


def submitted(run: Path) -> None:
    kinds = [(7, "build"), (8, "pretrain"), (9, "eval")]
    jobs = [{"id": job, "kind": kind, "after": [job - 1] * (job > 7)} for job, kind in kinds]
    (run / "job.json").write_text(json.dumps({"jobs": jobs}))


def test_what_slurm_says_of_its_job(run: Path) -> None:
    submitted(run)
    files = read_run(run)
    assert files.job_ids == ["7", "8", "9"] and files.training_job_ids == ["8"]
    waits = Job("8", "t", "PENDING", "Priority")
    assert judge(files, None, [waits, Job("9", "e", "PENDING", "Dependency")]) == State(
        "queued", "job 8: waits for jobs of higher priority"
    )
    waits = Job("8", "t", "PENDING", "Dependency", dependency="afterok:7(unfulfilled)")
    assert judge(files, None, [waits]) == State("queued", "job 8: waits for build job 7")
    assert judge(files, None, [Job("8", "t", "RUNNING", nodes="node[1-2]")]).word == "starting"
    assert judge(files, None, [Job("8", "t", "TIMEOUT")]) == State("failed", "job 8: timeout")
    assert judge(files, None, [Job("8", "t", "PREEMPTED")]) == State("failed", "job 8: preempted")
    assert judge(files, None, [Job("8", "t", "CANCELLED", "by 0")]) == State("stopped", "job 8: cancelled by root")
    assert (
        judge(files, None, [Job("8", "t", "FAILED", exit_code="0:9")]).why == "job 8: failed by signal 9: see the log"
    )
    assert judge(files, None, [Job("8", "", FORGOTTEN)]).why.startswith("job 8 has left the queue")


def test_a_build_that_failed_is_why_the_training_was_cancelled(run: Path) -> None:
    submitted(run)
    files = read_run(run)
    build = Job("7", "b", "FAILED", exit_code="3:0")
    why = State("failed", "job 8: cancelled: build job 7 failed with 3")
    never = Job("8", "t", "CANCELLED", "DependencyNeverSatisfied", dependency="afterok:7(failed)")
    assert judge(files, None, [build, never]) == why
    # sacct says neither the reason nor the dependency; job.json does.
    bare = replace(never, reason="", dependency="")
    assert judge(files, None, [build, bare]) == why
    assert in_words(Job("9", "e", "CANCELLED"), [build, bare], files.jobs) == (
        "cancelled: pretrain job 8 was cancelled: build job 7 failed with 3"
    )
    # Without --kill-on-invalid-dep it would wait for ever.
    stuck = replace(never, state="PENDING")
    assert judge(files, None, [build, stuck]) == State("failed", "job 8: will never start: build job 7 failed with 3")


def test_a_job_that_was_put_back_waits_whatever_its_last_owner_looks_like(owned: Path) -> None:
    submitted(owned)
    started(owned, 0)
    trained(owned, 30)
    owned_otherwise(owned, host="node7", boot_id="another", job_id="8", job_start=0, heartbeat=time.time() - 60)
    files, last = read_run(owned), {"step": 30, "time": time.time()}
    runs = Job("8", "t", "RUNNING", nodes="node[1-2]")
    assert judge(files, last, [runs]).why == (
        "no sign of life from host node7 for 1 min, though job 8 runs on node[1-2]"
    )
    waits = Job("8", "t", "PENDING", "BeginTime", restarts=1)
    assert judge(files, last, [waits]) == State(
        "queued", "job 8, put back 1 time: waits for the time at which it may start; it has come to step 30"
    )
    assert judge(files, last, [replace(runs, restarts=1)]) == State("starting", "job 8 runs on node[1-2]")
    assert judge(files, last, [Job("8", "t", "NODE_FAIL")]) == State("failed", "job 8: node fail, at step 30")
    assert judge(files, last, [Job("8", "t", "SUSPENDED")]) == State("stalled", "job 8 is suspended by Slurm")


def test_between_the_end_of_the_ranks_and_that_of_their_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(run)
    started(run, 0)
    trained(run, 30)
    job = Job("8", "t", "RUNNING", nodes="node1", start=time.time() - 10)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    Log(run).write("end", attempt=1, started=time.time(), status=75)
    state = judge(read_run(run), {"step": 30}, [job])
    assert state.word == "stopping" and state.why.startswith("the ranks have ended with 75; job 8 ends")
    assert judge(read_run(run), {"step": 30}, [replace(job, start=time.time() + 5)]).word == "starting"
    # A later job that never began says more than how the last start ended.
    later = Job("18", "t", "CANCELLED", "by 0", end=time.time() + 100)
    assert judge(read_run(run), {"step": 30}, [later]) == State("stopped", "job 18: cancelled by root, at step 30")
    assert judge(read_run(run), {"step": 30}, [replace(job, state="COMPLETED")]).why.startswith("at step 30, with a")


def test_without_slurm_jobs_are_what_was_submitted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (run / "job.json").write_text(json.dumps({"jobs": [{"id": 8, "submitted": time.time() - 70}]}))
    snapshot = look(run)
    assert snapshot.state == State("new", "job 8 was submitted 1 min 10 s ago, and Slurm cannot be asked from here")
    assert not snapshot.slurm_is_silent and snapshot.as_json()["jobs"] == []


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


def test_what_may_not_be_read_is_named(run: Path) -> None:
    started(run, 0)
    trained(run, 5)
    (run / "logs").mkdir()
    (run / "logs" / "rank-0.log").write_text("x\n")
    for name in ("metrics.jsonl", "run.json", "logs/rank-0.log"):
        (run / name).chmod(0)

    def triptych(*words: str) -> subprocess.CompletedProcess[str]:
        # root may read everything, but for these capabilities.
        lesser = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
        command = [*lesser, sys.executable, "-c", "from launch.cli import main; main()", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)

    assert re.search(r"unreadable +run.json, metrics.jsonl: no permission", triptych("status", str(run)).stdout)
    logs = triptych("logs", str(run))
    assert logs.returncode == 2 and logs.stderr == f"error: {run}/logs/rank-0.log: may not be read by this user\n"
    (run / "logs").chmod(0)
    assert triptych("logs", str(run)).stderr == f"error: {run}/logs: may not be read by this user\n"
    run.chmod(0)
    status = triptych("status", str(run))
    assert status.returncode == 2 and status.stderr == f"error: {run}: may not be read by this user\n"
    run.chmod(0o755)


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
    with pytest.raises(BadInput, match=f"{tmp_path}: not a run directory; below it are {run}"):
        run_directory(str(tmp_path))


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

"""`triptych submit` on two real nodes: whole runs through time limits, requeues, preemption and dead nodes.

Whatever happens to a job, it must end with the losses of two processes on one machine, with every sample consumed as
the plan says, and with a log that tells what happened.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.data_pipelines.raw import write_files, write_jsonl
from tests.slurm.conftest import ROOT, SCRIPT, STEPS, Cluster, losses, whole_run
from tests.small_run import config_text

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
TOKEN = "hf_a_token_of_the_submitter"
SECRETS = {"HF_TOKEN": TOKEN, "SBATCH_EXPORT": "ALL"}
OPTIONS = ("--cpus-per-task", "1", "--mem", "3000", "--time", "30")


@pytest.fixture(autouse=True)
def _nodes_are_up_and_free(cluster: Cluster) -> Iterator[None]:
    # A node that was killed by the test before may not have come back yet.
    states = ("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
    until(lambda: cluster.run(*states, cwd=Path("/")).stdout.split() == ["idle", "idle"], "two idle nodes", 120)
    yield
    cluster.run("scancel", "--me", cwd=Path("/"))
    subprocess.run(["bash", str(SCRIPT), "up"], capture_output=True, env=cluster.environment, timeout=120, check=True)


def submit(cluster: Cluster, folder: Path, *options: str) -> list[int]:
    """Submit `config.yaml` of a folder, with secrets around, and return the numbers of its jobs."""
    done = cluster.triptych("submit", "config.yaml", *OPTIONS, *options, cwd=folder, **SECRETS)
    assert done.returncode == 0, done.stderr
    return [int(line.split()[0]) for line in done.stdout.splitlines()]


def until(true: Callable[[], object], what: str, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(0.5)


def steps_done(folder: Path) -> int:
    try:
        return len((folder / "run" / "metrics.jsonl").read_bytes().splitlines())
    except OSError:
        return 0


def log(folder: Path, job: int) -> str:
    return (folder / "run" / "logs" / f"slurm-{job}.log").read_text()


def status(cluster: Cluster, folder: Path, target: str = "run") -> dict[str, Any]:
    """What `triptych status` says on the login machine."""
    done = cluster.triptych("status", target, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def ranks_of(job: int) -> list[psutil.Process]:
    """Processes of a job that train, the launchers above them included."""
    return [
        each
        for each in psutil.process_iter(["cmdline"])
        if "pretrain.train" in (each.info["cmdline"] or ()) and each.environ().get("SLURM_JOB_ID") == str(job)
    ]


@contextlib.contextmanager
def paused(job: int) -> Iterator[list[psutil.Process]]:
    """Ranks of a job, standing still: the small run would be over before Slurm, or we, have looked at it."""
    ranks = ranks_of(job)
    for rank in ranks:
        rank.suspend()
    try:
        yield ranks
    finally:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.resume()


def warned(process: psutil.Process) -> bool:
    """Whether SIGUSR1 waits for a process that stands still."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    pending = next(line.split()[1] for line in text.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (signal.SIGUSR1 - 1) & 1)


def check_ledger(cluster: Cluster, folder: Path) -> None:
    """Every step consumed what the plan says, each sample once an epoch."""
    done = cluster.triptych("ledger", "run", "--verify", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def check_no_secret(cluster: Cluster, folder: Path, job: int) -> None:
    """The token is in no file of the run, in nothing that Slurm tells, and in no command line."""
    assert TOKEN not in cluster.run("scontrol", "--details", "show", "job", str(job), cwd=folder).stdout
    assert TOKEN not in cluster.run("scontrol", "write", "batch_script", str(job), "-", cwd=folder).stdout
    for path in (folder / "run").rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    for process in psutil.process_iter(["cmdline"]):
        assert TOKEN not in " ".join(process.info["cmdline"] or ()), process


def test_a_run_saves_before_its_time_limit_and_goes_on(
    cluster: Cluster, tmp_path: Path, losses_here: Callable[[int], list[float]]
) -> None:
    whole_run(tmp_path)
    (job,) = submit(cluster, tmp_path, "--nodes", "2")
    until(lambda: steps_done(tmp_path) >= 3, "the third step")
    limit = ("scontrol", "update", f"JobId={job}")
    with paused(job) as ranks:
        check_no_secret(cluster, tmp_path, job)
        found = status(cluster, tmp_path, str(job))
        assert (found["state"], found["job"], found["nodes"]) == ("training", str(job), "node[1-2]"), found
        assert found["step"] >= 3 and found["jobs"][0]["seconds_left"] > 0
        # No environment of a process of the job has it either.
        assert len({each.environ().get("RANK") for each in ranks} - {None}) == 2
        assert not [each for each in ranks if TOKEN in each.environ().values()]
        again = cluster.triptych("submit", "config.yaml", cwd=tmp_path)
        assert again.returncode == 2 and f"job {job} of this run is running" in again.stderr

        # One to two minutes are left then, less than the 180 s ahead of which it is told.
        hours, minutes, _ = cluster.job(job)["RunTime"].split(":")
        soon = f"TimeLimit={60 * int(hours) + int(minutes) + 2}"
        assert cluster.run(*limit, soon, cwd=tmp_path).returncode == 0
        until(lambda: any(warned(each) for each in ranks), "Slurm's signal", 120)
    until(lambda: cluster.job(job)["Restarts"] == "1", "the requeue")
    found = status(cluster, tmp_path)
    assert found["jobs"][0]["restarts"] == 1 and found["state"] in ("queued", "starting", "training"), found
    assert cluster.run(*limit, "TimeLimit=30", cwd=tmp_path).returncode == 0
    cluster.wait(job, "COMPLETED", seconds=800)

    assert losses(tmp_path / "run") == pytest.approx(losses_here(2), rel=1e-5)
    check_ledger(cluster, tmp_path)
    check_no_secret(cluster, tmp_path, job)
    text = log(tmp_path, job)
    for told in (
        "start 1: 2 nodes x 1 processes",
        "stopped with a checkpoint",
        "back into the queue",
        "start 2: 2 nodes",
    ):
        assert told in text, text
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [(start["job_id"], start["requeues"]) for start in run["starts"]] == [(str(job), 0), (str(job), 1)]
    assert run["restarts"] == 1 and run["starts"][1]["step"] < STEPS
    for rank in (0, 1):
        own = (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text()
        assert "== start 1 of the run" in own and f"== start 2 of the run, on node{rank + 1}" in own
    found = status(cluster, tmp_path)
    assert (found["state"], found["restarts"]) == ("done", 1), found
    assert "start 2: 2 nodes" in cluster.triptych("logs", str(job), "-n", "1000", cwd=tmp_path).stdout
    (noted,) = json.loads((tmp_path / "run" / "job.json").read_text())["jobs"]
    assert (noted["id"], noted["kind"]) == (job, "pretrain")
    assert (tmp_path / "run" / "jobs" / "001" / "config.yaml").is_file()


def chain_config(folder: Path, broken: bool) -> None:
    """A config whose dataset is built from a manifest; a broken one names a sound that is not there."""
    records = write_files(folder / "raw", 24)
    if broken:
        records[12] = {**records[12], "audio": "sounds/gone.flac"}
    write_jsonl(folder / "raw" / "manifest.jsonl", records)
    built = f"build: [{{source: {folder / 'raw' / 'manifest.jsonl'}, out: {folder / 'built'}, shard_size: 6}}]"
    text = config_text(folder / "run", folder / "built", folder / "built")
    (folder / "config.yaml").write_text(text.replace("data:\n", f"data:\n  {built}\n"))


def test_a_failed_build_cancels_what_waits_for_it(cluster: Cluster, tmp_path: Path) -> None:
    chain_config(tmp_path, broken=True)
    jobs = submit(cluster, tmp_path, "--nodes", "2", "--build", "--eval", "--export", "export")
    kinds = [job["kind"] for job in json.loads((tmp_path / "run" / "job.json").read_text())["jobs"]]
    assert kinds == ["build", "build", "pretrain", "eval", "export"]
    cluster.wait(jobs[1], "FAILED")
    for job in jobs[2:]:
        assert cluster.wait(job, "CANCELLED")["Restarts"] == "0"
    found = status(cluster, tmp_path)
    cancelled = rf"job {jobs[2]}: cancelled: build job {jobs[1]} failed with \d+"
    assert found["state"] == "failed" and re.fullmatch(cancelled, found["why"]), found
    assert [job["kind"] for job in found["jobs"]] == kinds
    assert "sounds/gone.flac" in (tmp_path / "run" / "logs" / f"build-{jobs[1]}.log").read_text()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.soak
def test_build_training_evaluation_and_export_go_through_by_themselves(cluster: Cluster, tmp_path: Path) -> None:
    settings = ("train.max_steps=6", "train.warmup_steps=2", "checkpoint.every_steps=3", "run.dir=run")
    words = [word for setting in settings for word in ("--set", setting)]
    for split in ("train", "test"):
        words += ["--set", f"data.{'train' if split == 'train' else 'eval'}=built/{split}"]
    build = "[{source: digits, split: train, out: built/train}, {source: digits, split: test, out: built/test, "
    words += ["--set", f"data.build={build} shard_size: 250}}]"]
    (tmp_path / "config.yaml").write_text((ROOT / "configs" / "digits.yaml").read_text())
    site = tmp_path / "site.yaml"
    site.write_text("build: {throttle: 8, mem: '500'}\n")
    jobs = submit(
        cluster, tmp_path, "--nodes", "2", "--site", str(site), "--build", "--eval", "--export", "export", *words
    )
    assert len(jobs) == 7
    cluster.wait(jobs[-1], "COMPLETED", seconds=800)
    assert len(losses(tmp_path / "run")) == 6
    hosts = [path.read_text().split(":")[0] for path in (tmp_path / "run" / "logs").glob("build-*_*.log")]
    assert {"node1", "node2"} <= set(hosts)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["zero_shot"]["image_top1"] <= 1
    assert (tmp_path / "export" / "config.json").is_file()
    assert "verified:" in (tmp_path / "run" / "logs" / f"export-{jobs[-1]}.log").read_text()


def requeue(cluster: Cluster, folder: Path, job: int) -> None:
    assert cluster.run("scontrol", "requeue", str(job), cwd=folder).returncode == 0


def preempt(cluster: Cluster, folder: Path, job: int) -> None:
    options = ["--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--wrap", "sleep 1"]
    cluster.wait(cluster.submit(*options, cwd=folder), "COMPLETED")


def kill_slurmd(cluster: Cluster, folder: Path, job: int) -> None:
    with paused(job):
        node_command(cluster, "killd")


def crash(cluster: Cluster, folder: Path, job: int) -> None:
    node_command(cluster, "crash")


def node_command(cluster: Cluster, command: str) -> None:
    """What happens to node2 must be seen before the node comes back."""
    subprocess.run(["bash", str(SCRIPT), command, "node2"], env=cluster.environment, check=True, timeout=60)
    nodes = ("sinfo", "--noheader", "--Node", "--nodes=node2", "--format=%T")
    until(lambda: "down" in cluster.run(*nodes, cwd=Path("/")).stdout, "the end of node2", 120)


@pytest.mark.soak
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("fault", [requeue, preempt, kill_slurmd, crash])
def test_whatever_happens_to_a_job_it_ends_as_it_would_have(
    cluster: Cluster,
    tmp_path: Path,
    losses_here: Callable[[int], list[float]],
    fault: Callable[[Cluster, Path, int], None],
    stage: int,
) -> None:
    whole_run(tmp_path, stage)
    (job,) = submit(cluster, tmp_path, "--nodes", "2", "--cpus-per-task", "4", "--set", "supervisor.owner_seconds=5")
    until(lambda: steps_done(tmp_path) >= 3, "the third step")
    fault(cluster, tmp_path, job)
    subprocess.run(["bash", str(SCRIPT), "up"], capture_output=True, env=cluster.environment, timeout=120, check=True)
    done = cluster.wait(job, "COMPLETED", seconds=800)
    assert int(done["Restarts"]) >= 1
    assert losses(tmp_path / "run") == pytest.approx(losses_here(stage), rel=1e-5)
    check_ledger(cluster, tmp_path)
    text = log(tmp_path, job)
    assert "start 1:" in text and "start 2:" in text, text


@pytest.mark.soak
def test_with_min_nodes_a_run_goes_on_with_what_is_left(
    cluster: Cluster, tmp_path: Path, losses_here: Callable[[int], list[float]]
) -> None:
    whole_run(tmp_path)
    (job,) = submit(cluster, tmp_path, "--nodes", "2", "--min-nodes", "1", "--cpus-per-task", "4")
    until(lambda: steps_done(tmp_path) >= 3, "the third step")
    crash(cluster, tmp_path, job)
    cluster.wait(job, "COMPLETED", seconds=800)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_sizes"] == [2, 1]
    assert losses(tmp_path / "run") == pytest.approx(losses_here(2), rel=1e-4)
    check_ledger(cluster, tmp_path)
    assert "start 2: 1 nodes x 1 processes" in log(tmp_path, job)


@pytest.mark.soak
@pytest.mark.parametrize("command", [False, True])
def test_a_file_named_stop_and_the_command_end_a_job_for_good(cluster: Cluster, tmp_path: Path, command: bool) -> None:
    whole_run(tmp_path)
    (job,) = submit(cluster, tmp_path, "--nodes", "2")
    until(lambda: steps_done(tmp_path) >= 3, "the third step")
    if command:
        stop = cluster.triptych("stop", "run", cwd=tmp_path, timeout=400)
        assert stop.returncode == 0 and "triptych: stopped: at step" in stop.stderr, stop.stderr
    else:
        (tmp_path / "run" / "STOP").touch()
    done = cluster.wait(job, "FAILED")
    assert (done["ExitCode"], done["Restarts"]) == ("75:0", "0"), log(tmp_path, job)
    assert not (tmp_path / "run" / "STOP").exists()

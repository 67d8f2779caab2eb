"""`slurm/pretrain.sbatch` on two real nodes: ranks, environment, exit status, signals and requeue.

What trains here is a small program with a real gloo group in the place of `pretrain.train`, so that each case takes
seconds; the last test is a whole run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.slurm.conftest import STEPS, Cluster, losses, whole_run, with_python

ROOT = Path(__file__).resolve().parents[2]
SBATCH = str(ROOT / "slurm" / "pretrain.sbatch")
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]

# Found before the real one, because a job's folder comes first in its ranks' path.
PROGRAM = """
import json, os, signal, socket, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from pretrain.heartbeat import Pulse, answer_with_stacks
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda n, f: got.append(n))
rank, mode, folder = int(os.environ["RANK"]), sys.argv[1], Path("marks")
start = os.environ.get("SLURM_RESTART_COUNT", "0")
answer_with_stacks(rank)
pulse = Pulse(rank)
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
seen = {"sum": total.item(), "host": socket.gethostname(), "arguments": sys.argv[1:], "environment": dict(os.environ)}
(folder / f"{start}-rank-{rank}.json").write_text(json.dumps(seen))
if mode == "bad":
    os._exit(2)
step = 0
while mode in ("loop", "hang") and start == "0":
    time.sleep(0.1)
    step += 1
    pulse.beat("forward", step)
    stop = torch.tensor([len(got)])
    dist.all_reduce(stop)
    if stop.item():
        # A checkpoint takes time, and one node is done before the other.
        time.sleep(2 * rank)
        (folder / f"saved-{rank}").write_text("")
        os._exit(75)
os._exit(0)
"""


@pytest.fixture
def submit_folder(tmp_path: Path) -> Path:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'pretrain')!r})")
    (tmp_path / "pretrain" / "train.py").write_text(PROGRAM)
    supervisor = {"hang_seconds": 6, "max_restarts": 1}
    for mode in ("ok", "bad", "loop", "hang"):
        (tmp_path / mode).write_text(
            json.dumps({"run": {"dir": "run"}, "data": {"train": "unused"}, "supervisor": supervisor})
        )
    (tmp_path / "marks").mkdir()
    return with_python(tmp_path)


def submit(cluster: Cluster, folder: Path, options: list[str], *arguments: str) -> int:
    secret = {"HF_TOKEN": "hf_secret_of_the_submitter", "MY_SECRET": "x"}
    common = ["--mem=3000", "--cpus-per-task=1", "--time=10"]
    return cluster.submit(
        *common, *options, SBATCH, *arguments, cwd=folder, TRIPTYCH_PYTHON=str(folder / "python"), **secret
    )


def marks(folder: Path, start: int) -> list[dict[str, object]]:
    return [json.loads((folder / "marks" / f"{start}-rank-{rank}.json").read_text()) for rank in (0, 1)]


def log(folder: Path, job: int) -> str:
    return (folder / f"triptych-{job}.log").read_text()


def test_two_nodes_form_one_world_without_the_submitters_secrets(cluster: Cluster, submit_folder: Path) -> None:
    job = submit(cluster, submit_folder, [], "ok", "--set", "data.train=[{path: a b}]")
    assert cluster.wait(job, "COMPLETED")["ExitCode"] == "0:0", log(submit_folder, job)
    first, second = marks(submit_folder, 0)
    assert first["sum"] == second["sum"] == 2.0
    assert (first["host"], second["host"]) == ("node1", "node2")
    assert first["arguments"] == ["ok", "--set", "data.train=[{path: a b}]"]
    text = json.dumps([first["environment"], second["environment"]])
    assert "hf_secret" not in text and "MY_SECRET" not in text
    assert not (submit_folder / ".deepspeed_env").exists()


def test_bad_input_fails_the_job_with_2(cluster: Cluster, submit_folder: Path) -> None:
    assert cluster.wait(submit(cluster, submit_folder, [], "bad"), "FAILED")["ExitCode"] == "2:0"
    done = cluster.wait(submit(cluster, submit_folder, []), "FAILED")
    assert done["ExitCode"] == "2:0" and "usage: sbatch" in log(submit_folder, int(done["JobId"]))


def test_a_warned_job_saves_goes_back_to_the_queue_and_goes_on(cluster: Cluster, submit_folder: Path) -> None:
    job = submit(cluster, submit_folder, ["--signal=B:USR1@20"], "loop")
    wait_for(cluster, job, submit_folder / "marks" / "0-rank-1.json")
    # Slurm looks at limits twice a minute and warns up to a minute early; no limit is shorter than a minute.
    change = ("scontrol", "update", f"JobId={job}")
    assert cluster.run(*change, "TimeLimit=1", cwd=submit_folder).returncode == 0
    wait_for(cluster, job, submit_folder / "marks" / "saved-1")
    assert cluster.run(*change, "TimeLimit=10", cwd=submit_folder).returncode == 0
    done = cluster.wait(job, "COMPLETED")
    assert done["Restarts"] == "1"
    assert all((submit_folder / "marks" / f"saved-{rank}").exists() for rank in (0, 1))
    assert marks(submit_folder, 1)[0]["sum"] == 2.0
    text = log(submit_folder, job)
    assert "start 1:" in text and "start 2:" in text, "the log was truncated"
    assert "could not be requeued" not in text


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, submit_folder: Path) -> None:
    job = submit(cluster, submit_folder, [], "loop")
    wait_for(cluster, job, submit_folder / "marks" / "0-rank-1.json")
    cluster.run("scancel", str(job), cwd=submit_folder)
    assert cluster.wait(job, "CANCELLED")["Restarts"] == "0"
    wait_for(None, job, submit_folder / "marks" / "saved-1")


def test_a_preempted_job_saves_and_comes_back(cluster: Cluster, submit_folder: Path) -> None:
    job = submit(cluster, submit_folder, ["--cpus-per-task=4"], "loop")
    wait_for(cluster, job, submit_folder / "marks" / "0-rank-1.json")
    options = ["--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--wrap", "sleep 1"]
    urgent = cluster.submit(*options, cwd=submit_folder)
    cluster.wait(urgent, "COMPLETED")
    assert int(cluster.wait(job, "COMPLETED")["Restarts"]) >= 1
    assert all((submit_folder / "marks" / f"saved-{rank}").exists() for rank in (0, 1))


def test_a_rank_that_hangs_is_named_on_both_nodes_and_the_job_starts_again(
    cluster: Cluster, submit_folder: Path
) -> None:
    job = submit(cluster, submit_folder, [], "hang")
    wait_for(cluster, job, submit_folder / "marks" / "0-rank-1.json")
    (second,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"pretrain.train", "hang"} <= set(process.info["cmdline"] or ())
        and "launch.node" not in process.info["cmdline"]
        and "launch.ranks" not in process.info["cmdline"]
        and process.environ().get("RANK") == "1"
    ]
    second.suspend()
    done = cluster.wait(job, "COMPLETED")
    text = log(submit_folder, job)
    assert done["Restarts"] == "1", text
    (file,) = (submit_folder / "run").glob("incident-*.json")
    incident = json.loads(file.read_text())
    assert (incident["kind"], incident["rank"], incident["host"]) == ("hang", 1, "node2"), text
    assert [rank["host"] for rank in sorted(incident["ranks"], key=lambda rank: rank["rank"])] == ["node1", "node2"]
    assert "all_reduce" in incident["stacks"]["0"]
    assert text.count("it is stopped (SIGSTOP)") == 2 and "ended with another node: rank 1" in text
    assert "restart 1 of 1" in text and "back into the queue" in text


def test_a_whole_run_on_two_nodes_goes_on_after_a_requeue(
    cluster: Cluster, tmp_path: Path, losses_here: Callable[[int], list[float]]
) -> None:
    folder = with_python(tmp_path)
    whole_run(folder)
    job = submit(cluster, folder, [], "config.yaml", "--set", "train.learning_rate=1e-3")
    wait_for(cluster, job, folder / "run" / "metrics.jsonl", seconds=180)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job), cwd=folder)
    done = cluster.wait(job, "COMPLETED", seconds=240)

    assert done["Restarts"] == "1", log(folder, job)
    (manifest,) = (folder / "run" / "checkpoints").glob(f"step-{STEPS:08d}/MANIFEST.json")
    assert json.loads(manifest.read_text())["world_size"] == 2
    run = json.loads((folder / "run" / "run.json").read_text())
    assert run["restarts"] == 1 and run["world_sizes"] == [2, 2]
    assert {start["host"] for start in run["starts"]} <= {"node1", "node2"}
    assert losses(folder / "run") == pytest.approx(losses_here(2), rel=1e-5)


def wait_for(cluster: Cluster | None, job: int, path: Path, seconds: float = 90) -> None:
    import time

    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came; {cluster.job(job) if cluster else ''}"
        time.sleep(0.5)

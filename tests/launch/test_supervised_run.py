"""Real runs on two ranks under the supervisor: hung, orphaned of a data worker, stopped by a file, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.launch.supervised import processes_with
from tests.ranks import ROOT
from tests.small_run import config_text, small_dataset, triptych

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]
LIMIT = 5


class Run:
    """`triptych train` on two ranks as a process of its own."""

    def __init__(self, folder: Path, **changes: dict[str, Any]) -> None:
        self.dir, self.config = folder / "run", folder / "config.yaml"
        small_dataset(folder / "train", "small-train", range(32))
        raw = yaml.safe_load(config_text(self.dir, folder / "train", folder / "none", 2))
        del raw["data"]["eval"]
        raw |= {"checkpoint": {"every_steps": 3, "keep_last": 2}}
        for section, values in changes.items():
            raw[section] = {**raw.get(section, {}), **values}
        self.config.write_text(yaml.safe_dump(raw))
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        command = ["train", str(self.config), "--nproc", "2"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from launch.cli import main; main()", *command],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def end(self, seconds: float = 150) -> tuple[int, str]:
        """Exit status and standard error; nothing of it may be left."""
        assert self.process is not None
        _, errors = self.process.communicate(timeout=seconds)
        assert not processes_with(str(self.config))
        return self.process.returncode, errors

    def metrics(self) -> list[dict[str, Any]]:
        path = self.dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        assert self.process is not None
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end and self.process.poll() is None, self.process.communicate(timeout=5)[1][
                -3000:
            ]
            time.sleep(0.05)
        return found

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank, by its heartbeat."""
        assert self.process is not None
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "pretrain.train" in process.cmdline() and process.environ().get("RANK") == str(rank):
                return process
        raise AssertionError(f"no rank {rank}")


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run(tmp_path, **request.param)
    yield run
    for pid in processes_with(str(run.config)):
        os.kill(pid, signal.SIGKILL)
    if run.process is not None:
        run.process.communicate(timeout=30)


@pytest.mark.parametrize(
    "run", [{"train": {"max_steps": 5000}, "supervisor": {"hang_seconds": LIMIT}}], indirect=True, ids=["endless"]
)
def test_a_stopped_rank_is_named_and_the_run_goes_on_until_a_stop_file(run: Run) -> None:
    run.start()
    run.wait(lambda: len(run.metrics()) > 4)
    second = triptych("train", str(run.config), "--nproc", "2")
    owner = json.loads((run.dir / "owner.json").read_text())
    assert second.returncode == 2 and f"process {owner['pid']}" in second.stderr, second.stderr
    assert owner["pid"] == run.rank(0).pid and owner["host"] == os.uname().nodename

    run.rank(1).suspend()
    stopped = time.monotonic()
    status, said = run.end(LIMIT + 10)
    assert status == 76 and time.monotonic() - stopped < LIMIT + 10, said
    (file,) = run.dir.glob("incident-*.json")
    incident = json.loads(file.read_text())
    assert (incident["kind"], incident["rank"]) == ("hang", 1) and "1" not in incident["stacks"]
    assert "pretrain/trainer.py" in incident["stacks"]["0"], incident["stacks"]
    assert incident["phase"] in ("data", "forward", "backward", "optimizer", "checkpoint")
    assert f"last checkpoint: {run.dir / 'checkpoints'}" in said and f"triptych train {run.config} --nproc 2" in said

    last = run.metrics()[-1]["step"]
    run.start()
    run.wait(lambda: run.metrics()[-1]["step"] > last + 2)
    (run.dir / "STOP").touch()
    status, said = run.end()
    assert status == 75, said
    step = run.metrics()[-1]["step"]
    assert f"stopping after step {step}: a file named STOP" in said and not (run.dir / "STOP").exists()
    assert (run.dir / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").exists()
    assert f"took {run.dir} over" in said and not (run.dir / "owner.json").exists()


@pytest.mark.parametrize("run", [{"train": {"max_steps": 5000}}], indirect=True, ids=["endless"])
def test_a_run_that_was_displaced_stops_without_committing(run: Run) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pretrain.train", str(run.config)]
    run.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    run.wait(lambda: len(run.metrics()) > 4)
    owner = json.loads((run.dir / "owner.json").read_text())
    other = run.dir / "other.json"
    other.write_text(json.dumps(owner | {"token": "of another run", "host": "node7"}))
    other.replace(run.dir / "owner.json")
    displaced_at = run.metrics()[-1]["step"]
    status, said = run.end()
    assert status == 2 and "was taken over by another run (host node7" in said, said
    saved = [int(path.name.removeprefix("step-")) for path in (run.dir / "checkpoints").glob("step-*")]
    assert max(saved) <= displaced_at + 3 and run.metrics()[-1]["step"] <= displaced_at + 9
    assert json.loads((run.dir / "owner.json").read_text())["token"] == "of another run"


@pytest.mark.parametrize(
    "run",
    [
        {
            "train": {"max_steps": 40},
            "data": {"num_workers": 1},
            "supervisor": {"max_restarts": 1, "backoff_seconds": 0.1},
        }
    ],
    indirect=True,
    ids=["restarts"],
)
def test_a_killed_data_worker_is_told_and_the_run_starts_again(run: Run) -> None:
    run.start()
    run.wait(lambda: len(run.metrics()) > 4)
    (worker,) = run.rank(1).children()
    worker.kill()
    status, said = run.end()
    assert status == 0, said
    assert "rank 1: DataLoader worker (pid" in said and "Killed" in said and "restart 1 of 1" in said
    (file,) = run.dir.glob("incident-*.json")
    incident = json.loads(file.read_text())
    assert (incident["kind"], incident["rank"], incident["status"]) == ("worker_died", 1, 76)
    assert [line["step"] for line in run.metrics()] == list(range(1, 41))
    record = json.loads((run.dir / "run.json").read_text())
    assert record["restarts"] == 1 and [start["after"] for start in record["starts"]] == [None, file.name]

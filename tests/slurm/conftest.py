"""A real two-node Slurm cluster on this machine, for the tests of this folder; taken down whatever happens.

Needs root, for network and process namespaces, and apt, which installs Debian's slurm-wlm where it is not there yet.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.small_run import config_text, small_dataset

SCRIPT = Path(__file__).with_name("local-slurm.sh")
ROOT = Path(__file__).resolve().parents[2]
STEPS = 60


def with_python(folder: Path) -> Path:
    """Give a folder a `python` that finds this checkout, installed or not."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


def whole_run(folder: Path, stage: int = 2) -> Path:
    """Write `config.yaml` of a run of `STEPS` steps into `folder/run`, and its data; returns the config."""
    small_dataset(folder / "train", "small-train", range(32))
    text = config_text(folder / "run", folder / "train", folder / "train", stage)
    # No evaluation, and steps enough that something can come in between.
    text = text.replace(f"  eval: {folder / 'train'}\n", "").replace("max_steps: 4", f"max_steps: {STEPS}")
    path = folder / "config.yaml"
    path.write_text(
        text.replace("every_steps: 2", "every_steps: 10").replace("learning_rate: 0.002", "learning_rate: 1e-3")
    )
    return path


def losses(run: Path) -> list[float]:
    """The losses of a run, which has each of its steps once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [float(line["loss"]) for line in lines]


@pytest.fixture(scope="session")
def losses_here(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[float]]:
    """ZeRO stage -> losses of `whole_run` on this machine with two processes."""

    @functools.cache
    def train(stage: int) -> list[float]:
        folder = tmp_path_factory.mktemp(f"here-{stage}")
        config = whole_run(folder, stage)
        two = ["--config_file", str(ROOT / "launch/accelerate/cpu-2.yaml"), "--main_process_port", "0"]
        subprocess.run(
            [sys.executable, "-m", "launch.ranks", *two, "-m", "pretrain.train", str(config)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            timeout=400,
        )
        return losses(folder / "run")

    return train


@dataclass(frozen=True)
class Cluster:
    """Runs commands on the login machine."""

    environment: dict[str, str]

    def run(self, *command: str, cwd: Path, timeout: float = 60, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(SCRIPT), "exec", *command],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=timeout,
            env={**self.environment, **extra},
        )

    def submit(self, *arguments: str, cwd: Path, **extra: str) -> int:
        done = self.run("sbatch", "--parsable", *arguments, cwd=cwd, **extra)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def triptych(
        self, *arguments: str, cwd: Path, timeout: float = 180, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """The `triptych` command on the login machine."""
        program = [sys.executable, "-c", "from launch.cli import main; main()"]
        return self.run(*program, *arguments, cwd=cwd, timeout=timeout, PYTHONPATH=str(ROOT), **extra)

    def job(self, number: int) -> dict[str, str]:
        text = self.run("scontrol", "--oneliner", "show", "job", str(number), cwd=Path("/")).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: int, *states: str, seconds: float = 200) -> dict[str, str]:
        """The job once it is in one of `states`; fails when it takes longer or ends otherwise."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.job(number)
            if job["JobState"] in states:
                return job
            ended = job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not ended and time.monotonic() < deadline, job
            time.sleep(1)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster on one machine needs root")
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        pytest.skip("Slurm is not installed, and there is no apt-get to install it with")
    # Unix sockets below it: the path has to be short.
    state = Path(f"/tmp/tslurm-{os.getpid()}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "LOCAL_SLURM_"))}
    environment |= {"LOCAL_SLURM_STATE": str(state), "LOCAL_SLURM_GPUS": "0", "LOCAL_SLURM_NODES": "2"}
    try:
        up = subprocess.run(["bash", str(SCRIPT), "up"], capture_output=True, text=True, env=environment, timeout=280)
        if "apt-get failed" in up.stderr:
            pytest.skip(f"Slurm cannot be installed here: {up.stderr.strip().splitlines()[-1]}")
        assert up.returncode == 0, up.stderr
        yield Cluster(environment)
    finally:
        subprocess.run(["bash", str(SCRIPT), "purge"], capture_output=True, env=environment, timeout=120)

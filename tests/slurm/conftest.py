"""A real two-node Slurm cluster on this machine, for the tests of this folder; taken down whatever happens.

Needs root, for network and process namespaces, and apt, which installs Debian's slurm-wlm where it is not there yet.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("local-slurm.sh")


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

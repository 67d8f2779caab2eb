"""sbatch, scancel and squeue, and RUN/job.json, where the numbers of a run's jobs are kept.

sbatch itself gets a short list of variables: what its `SBATCH_...` ones say would win over the script, an
`SBATCH_EXPORT=ALL` among them, and nothing that it does not have can reach a job.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipelines.atomic import atomic_file
from data_pipelines.errors import BadInput, printable

JOB_FILE = "job.json"
_SECONDS_TO_ANSWER = 60
# What Slurm's commands themselves need: where the cluster is, who asks, and defaults of the cluster's administrators
# for what nobody asked for. None of it reaches the job but what its --export names.
_CLIENT = ("HOME", "USER", "LOGNAME", "PATH", "LANG", "LC_ALL", "TZ", "SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_DEFAULTS = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "reservation",
}


class NotTaken(BadInput):
    """sbatch refused a job."""


def check_client() -> None:
    """Raise `BadInput` when this machine cannot submit."""
    if shutil.which("sbatch") is None:
        raise BadInput(
            "no sbatch here: run it on a login node of the cluster, see the script with --dry-run, or train on this "
            "machine with `triptych train`"
        )


def client_environment(exported: Sequence[str], directives: Sequence[str]) -> dict[str, str]:
    """The environment of sbatch for a job with these exported variables and these options."""
    names = [*_CLIENT, *exported, *(name for name, option in _DEFAULTS.items() if option not in directives)]
    return {name: os.environ[name] for name in names if name in os.environ}


def submit(script: Path, options: Sequence[str], environment: dict[str, str]) -> int:
    """Submit a script and return the job's number.

    Raises:
        NotTaken: with what sbatch said.
    """
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER, process_group=0
        )
    except subprocess.TimeoutExpired:
        raise BadInput(
            f"sbatch did not answer within {_SECONDS_TO_ANSWER} s; it may have taken the job all the same: squeue --me"
        ) from None
    except OSError as error:
        raise BadInput(f"sbatch cannot be run: {error.strerror}") from None
    # --parsable prints the number, and the cluster's name after a semicolon.
    found = re.search(r"^(\d+)(?:;.*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or found is None:
        said = re.findall(r"^sbatch: (?:error: |fatal: )?(.+)", done.stderr, re.MULTILINE) or [done.stderr.strip()]
        raise NotTaken(f"Slurm does not take {script}: {printable('; '.join(said))}")
    return int(found[1])


def cancel(jobs: Sequence[int]) -> None:
    """Take jobs out of the queue, as far as Slurm answers."""
    if jobs:
        subprocess.run(["scancel", *map(str, jobs)], capture_output=True, check=False, timeout=_SECONDS_TO_ANSWER)


def alive(jobs: Sequence[int]) -> list[tuple[int, str]]:
    """Those of the jobs that wait or run, with their states; none where Slurm does not answer."""
    if not jobs or shutil.which("squeue") is None:
        return []
    # Of a single job that has left the queue squeue says that it is invalid, of several it says nothing.
    numbers = ",".join(map(str, [*jobs, jobs[-1]]))
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--format=%A %T", f"--jobs={numbers}"],
            capture_output=True,
            text=True,
            timeout=_SECONDS_TO_ANSWER,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = (line.split() for line in done.stdout.splitlines())
    return sorted({(int(words[0]), words[1]) for words in lines if len(words) == 2 and words[0].isdigit()})


def read_jobs(run_dir: Path) -> list[dict[str, Any]]:
    """The jobs of a run, oldest first; none where there is no file."""
    try:
        jobs = json.loads((run_dir / JOB_FILE).read_text(encoding="utf-8"))["jobs"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [job for job in jobs if isinstance(job, dict) and isinstance(job.get("id"), int)]


def note_job(run_dir: Path, number: int, kind: str, name: str, script: Path, asked: dict[str, Any]) -> None:
    """Add a job to RUN/job.json."""
    job = {"id": number, "name": name, "kind": kind, "submitted": time.time(), "script": str(script), **asked}
    with atomic_file(run_dir / JOB_FILE) as file:
        file.write(json.dumps({"jobs": [*read_jobs(run_dir), job]}, indent=1).encode())


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait: between sbatch and the note of its number nothing may be lost."""
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if asked:
            raise KeyboardInterrupt

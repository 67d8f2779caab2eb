"""Runs tasks on a Slurm cluster: submits an array, follows it, and says why a part failed.

What every array task does is in `array`; datatrove's executor, which writes the job script and calls sbatch, is in
`slurm_executor` and runs in a process whose environment is a short list of names: it submits with `--export=ALL`, and
so nothing else of this shell, tokens included, can reach a job. What Slurm's commands say is read with formats of ours.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipelines.atomic import atomic_file
from data_pipelines.engines.array import SUBMISSIONS, ArrayWork, check_private, newest_submission
from data_pipelines.errors import BadInput

JOBS_FILE = "jobs.json"
LOGS = "logs"
SCRIPT_FILE = "datatrove/launch_script.slurm"
_MAX_PARTS = 100
# Variables that jobs get where they are set.
EXPORTED = tuple("HOME USER LOGNAME PATH LD_LIBRARY_PATH LANG LC_ALL TZ TMPDIR HF_HOME HF_ENDPOINT".split())
# A user's own defaults for sbatch, which would win over the job script: each where the option is not given.
_DEFAULTS = {"SBATCH_PARTITION": "partition", "SBATCH_ACCOUNT": "account", "SBATCH_TIMELIMIT": "time"}
_MORE_DEFAULTS = {"SBATCH_QOS": "qos", "SBATCH_CONSTRAINT": "constraint", "SBATCH_RESERVATION": "reservation"}
_OURS = ("array", "output", "error", "open-mode", "wrap", "chdir", "wait", "parsable")
_ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    *("PREEMPTED", "REVOKED"),
}


@dataclass(frozen=True)
class SlurmOptions:
    """What to ask Slurm for. None leaves it to the cluster.

    `cpus` and `mem` (sbatch's --mem) are of one array task, `tasks` how many there are at most, `throttle` how many run
    at a time. `sbatch` holds further options by their long names; `export` there adds to the variables that jobs get.
    """

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    cpus: int = 1
    mem: str | None = None
    tasks: int | None = None
    throttle: int | None = None
    sbatch: Mapping[str, str] = field(default_factory=dict)
    wait: bool = True
    dry_run: bool = False
    plan_only: bool = False
    """Leave the jobs to somebody else, who submits slurm/build_shards.sbatch; needs no datatrove."""

    def check(self) -> None:
        """Raise `BadInput` for what no cluster could take."""
        for name in ("cpus", "tasks", "throttle"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"--{name} {value}: give 1 or more")
        named = {"partition": self.partition, "account": self.account, "time": self.time, "mem": self.mem}
        for name, text in (*named.items(), *self.sbatch.items()):
            if text is not None and (not text.isprintable() or '"' in text):
                raise BadInput(f"--{name} {text!r}: quotes and control characters are refused")
        for name in self.sbatch:
            if name in _OURS:
                raise BadInput(f"--sbatch {name}: this one is set by the build itself")
            if not name.replace("-", "").isalnum() or not name.isascii() or name != name.lower():
                raise BadInput(f"--sbatch {name}: give the long name of an option of sbatch, without the dashes")
        for name in self.export_names():
            if name in ("ALL", "NONE") or not name.isidentifier():
                raise BadInput(f"--sbatch export={name}: give names of variables, separated by commas")

    def export_names(self) -> list[str]:
        """Variables that jobs get beside `EXPORTED`."""
        return [name for name in self.sbatch.get("export", "").split(",") if name]

    def client_names(self) -> list[str]:
        """Variables that sbatch itself gets: where the cluster is, and defaults for what is not given here."""
        free = [name for name, option in _DEFAULTS.items() if getattr(self, option) is None]
        return ["SLURM_CONF", *free, *(name for name, option in _MORE_DEFAULTS.items() if option not in self.sbatch)]


@dataclass(frozen=True)
class Request:
    """What the process that submits is told."""

    submission: Path
    job_name: str
    num_parts: int
    python: str
    exported: list[str]
    options: SlurmOptions

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps({**asdict(self), "submission": str(self.submission)})

    @classmethod
    def from_json(cls, text: str) -> Request:
        """What `to_json` gave."""
        values: dict[str, Any] = json.loads(text)
        values["options"] = SlurmOptions(**values["options"])
        values["submission"] = Path(values["submission"])
        return cls(**values)


@dataclass(frozen=True)
class Submission:
    """A submission's folder, the numbers of its jobs, and how many tasks each of its arrays has.

    There are several arrays where the cluster takes no larger one.
    """

    folder: Path
    array: list[str]
    finish: list[str]
    array_size: int

    @property
    def jobs(self) -> list[str]:
        """All of its jobs."""
        return [*self.array, *self.finish]

    @classmethod
    def of(cls, folder: Path) -> Submission:
        """The submission in a folder; it has no jobs when none was taken."""
        try:
            jobs = json.loads((folder / JOBS_FILE).read_bytes())
        except FileNotFoundError:
            return cls(folder, [], [], 1)
        return cls(folder, **jobs)

    def note(self) -> None:
        """Write it for `of`."""
        with atomic_file(self.folder / JOBS_FILE) as file:
            file.write(json.dumps({"array": self.array, "finish": self.finish, "array_size": self.array_size}).encode())

    @property
    def num_taken(self) -> int:
        """Parts that Slurm took, from 0 on: where a cluster takes no more, the last arrays are missing."""
        return len(self.array) * self.array_size

    def task_of(self, part: int) -> tuple[str, Path]:
        """(array task, its log) of a part below `num_taken`."""
        task = f"{self.array[part // self.array_size]}_{part % self.array_size}"
        return task, self.folder / LOGS / f"{task}.log"


def num_parts(num_tasks: int, options: SlurmOptions) -> int:
    """How many array tasks share `num_tasks`."""
    return min(num_tasks, options.tasks or _MAX_PARTS)


def check_client(options: SlurmOptions) -> None:
    """Raise `BadInput` when this machine cannot submit."""
    if importlib.util.find_spec("datatrove") is None:
        raise BadInput("--engine slurm needs datatrove: pip install 'triptych[slurm]'")
    if not options.dry_run and shutil.which("sbatch") is None:
        raise BadInput("--engine slurm: no sbatch here; run it on a login node of the cluster, or use --engine local")


def submit(folder: Path, work: ArrayWork, options: SlurmOptions, job_name: str) -> Submission:
    """Submit `work` as an array, and a job that ends it; `folder` (absolute) is the dataset's.

    With `dry_run` only the job script is written. Raises `BadInput` with what sbatch said when it refuses.
    """
    if not options.plan_only:
        check_client(options)
    if '"' in str(folder) or not str(folder).isprintable() or "%" in str(folder) or "\\" in str(folder):
        raise BadInput(f"{folder}: sbatch cannot take quotes, '%', '\\' and control characters in --out")
    submissions = folder / SUBMISSIONS
    submissions.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(submissions)
    last = newest_submission(folder)
    place = submissions / f"{0 if last is None else int(last.name) + 1:03d}"
    place.mkdir()
    work.save(place)
    if options.plan_only:
        return Submission(place, [], [], 1)
    (place / "datatrove").mkdir()
    (place / LOGS).mkdir()
    python = os.environ.get("TRIPTYCH_PYTHON")
    names = [*EXPORTED, *options.export_names()]
    environment = {name: os.environ[name] for name in (*names, *options.client_names()) if name in os.environ}
    # This package may be a checkout that is not installed. Another Python has one of its own.
    root = str(Path(__file__).resolve().parents[2])
    paths = [*([] if python else [root]), *filter(None, [os.environ.get("PYTHONPATH")])]
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        names.append("PYTHONPATH")
    sbatch = {name: value for name, value in options.sbatch.items() if name != "export"}
    request = Request(place, job_name, work.num_parts, python or sys.executable, names, replace(options, sbatch=sbatch))
    code = f"import sys; sys.path.insert(0, {root!r}); from data_pipelines.engines.slurm_executor import main; main()"
    start = functools.partial(subprocess.run, [sys.executable, "-P", "-c", code], env=environment, process_group=0)
    try:
        # In a thread, which Ctrl-C does not reach: between sbatch and the note of its number nothing may be killed.
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(start, input=request.to_json(), capture_output=True, text=True, check=False).result()
    except KeyboardInterrupt:
        jobs = Submission.of(place).jobs
        if jobs:
            subprocess.run(["scancel", *jobs], check=False, timeout=60)
        raise
    submission = Submission.of(place)
    if done.returncode != 0 and not submission.array:
        said = re.findall(r"^sbatch: (?:error|fatal): (.*)", done.stderr, re.MULTILINE)
        if not said:
            raise RuntimeError(f"submitting failed:\n{done.stderr}")
        raise BadInput(f"Slurm does not take the job: {'; '.join(said)}")
    return submission


def last_submission(folder: Path) -> Submission | None:
    """The last submission of the build of a dataset folder; those before it have ended."""
    place = newest_submission(folder)
    return None if place is None else Submission.of(place)


class Watch:
    """Asks Slurm about the jobs of a submission; remembers the last state of every one, for Slurm forgets."""

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        self.states: dict[str, str] = {}
        self.is_lost = False

    def poll(self) -> bool:
        """Ask; whether any of the jobs is still to run or running. While Slurm does not answer, what it said last."""
        jobs = self.submission.jobs
        if not jobs:
            return False
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T", f"--jobs={','.join(jobs)}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            self.is_lost = True
            return self._any_active() or not self.states
        # A job that ended long ago is unknown to Slurm.
        self.is_lost = done.returncode != 0 and "Invalid job id" not in done.stderr
        if self.is_lost:
            return self._any_active() or not self.states
        now = dict(line.split() for line in done.stdout.splitlines() if line.strip())
        self.states = {job: state if state in _ENDED else now.get(job, "gone") for job, state in self.states.items()}
        self.states |= now
        return self._any_active()

    def _any_active(self) -> bool:
        return any(state not in _ENDED and state != "gone" for state in self.states.values())

    def array_has_ended(self) -> bool:
        """Whether only jobs that end a build are left."""
        left = {job for job, state in self.states.items() if state not in _ENDED and state != "gone"}
        return bool(left) and left <= set(self.submission.finish)

    def cancel_finishing(self) -> None:
        """Take the jobs that end a build out of the queue, unless they run already."""
        jobs = self.submission.finish
        subprocess.run(["scancel", "--state=PENDING", *jobs], capture_output=True, timeout=60, check=False)

    def array_states(self) -> list[str]:
        """Last known states of the array's tasks."""
        return [state for job, state in self.states.items() if job.split("_")[0] in self.submission.array]

    def summary(self) -> str:
        """`2 running, 5 pending` of the array tasks that are left."""
        states = Counter(state for state in self.array_states() if state not in _ENDED)
        return ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()))

"""What went wrong: lines on standard error for people, and `incident-*.json` in the run directory for programs."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipelines.atomic import atomic_file
from launch.processes import signal_name
from pretrain.checkpoint.manifest import directories, looks_whole

Kind = Literal["hang", "rank_died", "worker_died", "exception", "launcher_died"]
_KILLED = 9


@dataclass(frozen=True)
class Incident:
    """One fault. `rank` is -1 where none is to blame more than the others."""

    kind: Kind
    rank: int
    step: int
    phase: str
    what: str
    """In one line, without the place."""
    signal: str | None = None
    exception: str | None = None
    traceback: str | None = None
    host: str = field(default_factory=platform.node)
    stacks: Mapping[int, str] = field(default_factory=dict)
    """Python stacks of the ranks that answered, by rank."""
    ranks: Sequence[Mapping[str, Any]] = ()
    """Where each rank stood, as far as that was asked."""

    def headline(self) -> str:
        """What happened to whom and where, in one line."""
        who = "the launcher" if self.kind == "launcher_died" else f"rank {self.rank}" if self.rank >= 0 else "the ranks"
        where = f"{self.phase} of step {self.step}" if self.step else f"{self.phase}, before the first step"
        return f"{who}: {self.what} (in {where})"


def died_of(number: int) -> str:
    """A death by a signal, in words."""
    guess = ", most often for want of memory" if number == _KILLED else ""
    return f"killed by {signal_name(number)}{guess}"


def report(incident: Incident, run_dir: Path, status: int, attempt: int, resume: str) -> Path | None:
    """Say what happened and how to go on, and write it down.

    Returns:
        The incident file; None where the run directory takes none, as when its disk is what failed.
    """
    newest = last_checkpoint(run_dir)
    say(incident.headline())
    say(f"last checkpoint: {newest[1]} (step {newest[0]})" if newest else "no checkpoint to go on from yet")
    say(f"go on with: {resume}")
    name = f"incident-{time.strftime('%Y%m%d-%H%M%S')}-{incident.kind}-{os.getpid()}"
    files = {str(rank): f"logs/{name}/rank-{rank:05d}.txt" for rank in incident.stacks}
    record = asdict(incident) | {
        "stacks": {str(rank): text for rank, text in incident.stacks.items()},
        "stack_files": files,
        "time": time.time(),
        "status": status,
        "attempt": attempt,
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "checkpoint": {"step": newest[0], "path": str(newest[1])} if newest else None,
        "resume": resume,
    }
    path = run_dir / f"{name}.json"
    try:
        for rank, text in incident.stacks.items():
            file = run_dir / files[str(rank)]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        with atomic_file(path) as out:
            out.write(json.dumps(record, indent=1).encode())
    except OSError as error:
        say(f"the incident could not be written to {path} ({error.strerror})")
        return None
    say(f"more in {path}" + (f", stacks of the ranks in {run_dir / 'logs' / name}" if files else ""))
    return path


def last_checkpoint(run_dir: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint that looks whole; reads no more than its manifest."""
    return next(((step, path) for step, path in reversed(list(directories(run_dir))) if looks_whole(path)), None)


class Log:
    """`logs/supervisor.jsonl`: every end, fault and decision of the supervisors of a run, one JSON object each."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "logs" / "supervisor.jsonl"

    def write(self, event: str, **facts: Any) -> None:
        """Append a line; a run directory that takes none is no reason to end."""
        line = {"time": time.time(), "event": event, "host": platform.node(), "pid": os.getpid()}
        line |= {"job_id": os.environ.get("SLURM_JOB_ID"), "job_start": os.environ.get("SLURM_RESTART_COUNT"), **facts}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            say(f"{self._path} could not be written ({error.strerror})")

    def faults(self, job_id: str) -> list[int]:
        """Steps of the faults of a Slurm job so far, over all of its starts; what several nodes told counts once."""
        steps: dict[tuple[Any, Any], int] = {}
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["event"] == "fault" and entry["job_id"] == job_id:
                    steps.setdefault((entry.get("job_start"), entry.get("attempt")), int(entry["step"]))
            except (ValueError, KeyError, TypeError):
                continue
        return list(steps.values())


def say(text: str) -> None:
    """A line of the supervisor on standard error."""
    print(f"triptych: {text}", file=sys.stderr, flush=True)

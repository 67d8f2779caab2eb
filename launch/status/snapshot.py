"""One look at a run: its files, its numbers, its jobs, its state, as one value for tables and for JSON."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput
from launch.status import slurm
from launch.status.metrics import Metrics, number
from launch.status.run_files import RunFiles, read_run
from launch.status.slurm import Job
from launch.status.state import Progress, State, judge, progress
from launch.status.words import in_words, kind_of


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment."""

    run: RunFiles
    metrics: Metrics
    jobs: list[Job]
    state: State
    progress: Progress
    now: float
    slurm_is_silent: bool = False
    """Whether there is a Slurm and jobs to ask it for, and it does not answer."""

    @property
    def job(self) -> Job | None:
        """The job that trains or is to train, else another one that is under way, else the last one."""
        under_way = [job for job in self.jobs if not job.has_left]
        training = [job for job in under_way if self.kind(job) == "pretrain"]
        return next(iter([*reversed(training), *under_way, *reversed(self.jobs)]), None)

    def kind(self, job: Job) -> str:
        """What a job is for: build, pretrain, eval or export."""
        return kind_of(job.id, self.run.jobs)

    def words(self, job: Job) -> str:
        """What a job does, or how it ended."""
        return in_words(job, self.jobs, self.run.jobs)

    @property
    def last_checkpoint(self) -> tuple[int, float] | None:
        """Step and age in seconds of the newest checkpoint."""
        return (self.run.checkpoints[-1][0], self.now - self.run.checkpoints[-1][1]) if self.run.checkpoints else None

    @property
    def restarts(self) -> int:
        """Starts of the run after the first."""
        return max(0, len(self.run.starts) - 1)

    @property
    def end(self) -> float | None:
        """When the last step is expected, in seconds since 1970."""
        return None if self.progress.seconds_left is None else self.now + self.progress.seconds_left

    @property
    def starts_needed(self) -> int:
        """How many more starts the job's time limit makes it, at the present speed; 0 where it fits or has none."""
        job, left = self.job, self.progress.seconds_left
        if job is None or left is None or job.seconds_left is None or left <= job.seconds_left:
            return 0
        return 1 + int((left - job.seconds_left) // (job.limit_seconds or job.seconds_left or 1))

    def as_json(self) -> dict[str, Any]:
        """For programs; null is what is not known."""
        last, save = self.metrics.last or {}, self.last_checkpoint
        config = self.run.config
        losses = {name: number(last.get(f"loss_{name}")) for name in ("text", "align", "image", "audio")}
        return {
            "run": str(self.run.path),
            "name": self.run.name,
            "run_id": self.run.run.get("run_id"),
            "state": self.state.word,
            "why": self.state.why,
            "live": self.state.live,
            "job": None if self.job is None else self.job.id,
            "jobs": [asdict(job) | {"kind": self.kind(job), "words": self.words(job)} for job in self.jobs],
            "nodes": self.nodes,
            "ranks": (self.run.run.get("world_sizes") or [None])[-1],
            "zero_stage": None if config is None else config.engine.zero_stage,
            "step": self.progress.step,
            "max_steps": self.progress.max_steps,
            "share": self.progress.share,
            "epoch": number(last.get("epoch")),
            "samples_seen": last.get("samples_seen"),
            "loss": number(last.get("loss")),
            "losses": losses,
            "learning_rate": number(last.get("lr")),
            "grad_norm": number(last.get("grad_norm")),
            "samples_per_second": self.progress.samples_per_second,
            "tokens_per_second": self.progress.tokens_per_second,
            "seconds_a_step": self.progress.seconds_a_step,
            "data_wait_fraction": self.progress.data_wait,
            "last_step_time": number(last.get("time")),
            "checkpoint": None if save is None else {"step": save[0], "age_seconds": round(save[1], 1)},
            "restarts": self.restarts,
            "incidents": self.run.num_incidents,
            "last_incident": asdict(self.run.incidents[-1]) if self.run.incidents else None,
            "quarantined": self.run.quarantined,
            "seconds_left": self.progress.seconds_left,
            "end": self.end,
            "starts_needed": self.starts_needed,
            "heartbeats": [asdict(beat) for beat in self.run.beats],
        }

    @property
    def nodes(self) -> str:
        """The nodes it runs on, or ran on last."""
        job = self.job
        if job is not None and job.nodes:
            return job.nodes
        return str(self.run.starts[-1].get("host", "")) if self.run.starts else ""


class Looker:
    """Looks at a run again and again, at little cost: metrics are read on, Slurm is asked now and then."""

    def __init__(self, path: Path, seconds_between_questions: float = 10.0) -> None:
        self.path = path
        self._metrics = Metrics(path / "metrics.jsonl")
        self._seconds = seconds_between_questions
        self._asked: tuple[float, tuple[str, ...]] | None = None
        self._jobs: list[Job] | None = []

    def look(self) -> Snapshot:
        """The run as it is now.

        Raises:
            BadInput: it is no run directory.
        """
        run = read_run(self.path)
        self._metrics.poll()
        return _snapshot(run, self._metrics, self._ask(run.job_ids))

    def _ask(self, ids: Sequence[str]) -> list[Job] | None:
        key = tuple(ids)
        if self._asked is None or self._asked[1] != key or time.monotonic() - self._asked[0] >= self._seconds:
            self._jobs = slurm.jobs(ids)
            self._asked = (time.monotonic(), key)
        return self._jobs


def look_at_all(paths: Sequence[Path]) -> list[Snapshot]:
    """Several runs as they are now, with one question to Slurm for all; those that may not be read are left out."""
    found: list[tuple[RunFiles, Metrics]] = []
    for path in paths:
        with contextlib.suppress(BadInput):
            run, metrics = read_run(path), Metrics(path / "metrics.jsonl")
            metrics.poll()
            found.append((run, metrics))
    asked = slurm.jobs(list(dict.fromkeys(job for run, _ in found for job in run.job_ids)))
    jobs = None if asked is None else {job.id: job for job in asked}
    return [
        _snapshot(run, metrics, None if jobs is None else [jobs[each] for each in run.job_ids if each in jobs])
        for run, metrics in found
    ]


def _snapshot(run: RunFiles, metrics: Metrics, asked: list[Job] | None) -> Snapshot:
    now, jobs = time.time(), asked or []
    state = judge(run, metrics.last, jobs, now)
    told = progress(run, metrics, state, now)
    return Snapshot(run, metrics, jobs, state, told, now, bool(run.job_ids) and asked is None and slurm.is_there())

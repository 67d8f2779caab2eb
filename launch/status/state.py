"""In which state a run is, and when it will be done: judged from its files and from what Slurm says."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launch.ranks import BAD_INPUT, DONE, ENDED, FAULT, RUN_AGAIN, STOPPED_BY_FILE
from launch.status.metrics import Metrics, number
from launch.status.metrics import Record as MetricsLine
from launch.status.run_files import RunFiles, span
from launch.status.slurm import Job
from pretrain.owner import Record

Word = Literal[
    "new", "queued", "starting", "training", "stopping", "restarting", "silent", "done", "stopped", "failed", "killed"
]
LIVE: tuple[Word, ...] = ("starting", "training", "stopping", "restarting", "silent")
_BEATS_OF_SILENCE = 3
_STEPS_OF_SPEED = 200
_SECONDS_TO_SAY_WHY = 15.0


@dataclass(frozen=True)
class State:
    """What a run is doing. `word` is one of `Word`; `why` says more in a line, and may be empty."""

    word: Word
    why: str = ""

    @property
    def live(self) -> bool:
        """Whether something of the run is there, or on its way."""
        return self.word in LIVE


@dataclass(frozen=True)
class Progress:
    """How far a run is, and how fast it goes."""

    step: int
    max_steps: int | None
    samples_per_second: float | None
    """Over the last steps, with what lies between them: checkpoints, evaluations."""
    seconds_a_step: float | None
    """The same."""
    data_wait: float | None
    """Share of the last steps' time in which the loop waited for data."""
    seconds_left: float | None
    """To the last step, at that speed; None where it does not train."""

    @property
    def share(self) -> float | None:
        """Share of the steps that are done."""
        return min(1.0, self.step / self.max_steps) if self.max_steps else None


def judge(run: RunFiles, last: MetricsLine | None, jobs: Sequence[Job] = (), now: float | None = None) -> State:
    """The state of a run.

    Args:
        run: its files.
        last: the last line of metrics.jsonl.
        jobs: its Slurm jobs, oldest first, those of other kinds than training among them.
        now: seconds since 1970.
    """
    now = time.time() if now is None else now
    step = int(last["step"]) if last else 0
    finished = run.config is not None and step >= run.config.train.max_steps
    if run.owner is not None and run.owner_gone is not True:
        return _owned(run, last, step, now)
    job = _training_job(run, jobs)
    if job is not None and job.state == "RUNNING":
        return State("starting", f"job {job.id} runs on {job.nodes}")
    if job is not None and job.waits:
        begun = f"; it has come to step {step}" if step else ""
        return State("queued", f"job {job.id}: {waiting_for(job)}{begun}")
    return _ended(run, last, finished, job, now)


def _owned(run: RunFiles, last: MetricsLine | None, step: int, now: float) -> State:
    owner = run.owner
    assert owner is not None
    silence = now - owner.heartbeat
    if run.owner_gone is None and silence > max(_BEATS_OF_SILENCE * owner.beat_seconds, 30):
        return State("silent", f"no sign of life from host {owner.host} for {span(silence)}")
    started = max((float(start.get("time", 0)) for start in run.starts), default=0.0)
    before = f"to go on from step {run.starts[-1].get('step', 0)}" if run.starts and len(run.starts) > 1 else ""
    if run.stop_asked:
        return State("stopping", "asked to, by a file named STOP; the checkpoint comes first")
    # run.json gets its line when model and checkpoint are loaded; the owner's is older than that.
    loading = not run.starts or _taken(owner) > started + 1
    if loading or not step or (last is not None and 0 < float(last.get("time", now)) < started):
        return State("starting", before)
    return State("training")


def _taken(owner: Record) -> float:
    """When the owner took the run directory, in seconds since 1970; 0 where it wrote that in another time zone."""
    try:
        clock, zone = owner.since.rsplit(" ", 1)
        return time.mktime(time.strptime(clock, "%Y-%m-%d %H:%M:%S")) if zone == time.strftime("%Z") else 0.0
    except (ValueError, OverflowError):
        return 0.0


def _only_just(run: RunFiles, last: MetricsLine | None, now: float) -> bool:
    """Whether the last step is so recent that a supervisor may be about to say what ended it."""
    if last is None or run.owner is not None:
        return False
    seconds = number(last.get("step_seconds")) or 0.0
    return now - float(last.get("time", 0.0)) < _SECONDS_TO_SAY_WHY + 2 * seconds


def _ended(run: RunFiles, last: MetricsLine | None, finished: bool, job: Job | None, now: float) -> State:
    step = int(last["step"]) if last else 0
    end = next((line for line in reversed(run.supervisor) if line.get("event") in ("end", "fault")), None)
    started = max((float(start.get("time", 0)) for start in run.starts), default=0.0)
    if end is not None and float(end.get("time", 0)) >= started:
        waiting = run.supervisor[-1]
        if waiting.get("event") == "restart" and run.supervisor_is_alive() is not False:
            due = float(waiting.get("time", 0)) + float(waiting.get("wait_seconds", 0))
            if run.supervisor_is_alive() or now < due + 120:
                when = f" in {span(due - now)}" if due > now else ""
                return State("restarting", f"restart {waiting.get('number')}{when}, after: {_fault(run)}")
        status = end.get("status")
        if status in (RUN_AGAIN, STOPPED_BY_FILE):
            return State("stopped", f"at step {step}, with a checkpoint; the same command goes on from there")
        if status in (FAULT, ENDED):
            return State("failed", f"{_fault(run)} (status {status})")
        if status == BAD_INPUT:
            return State("failed", "bad input (status 2): see the log")
        if status not in (DONE, None):
            return State("killed", f"ended at once, with status {status}, at step {step}")
    if job is not None and job.has_left and job.state not in ("COMPLETED", "FAILED"):
        by = f" ({job.reason})" if job.reason else ""
        return State("failed", f"job {job.id}: {job.state.lower().replace('_', ' ')}{by}")
    if finished:
        return State("done", f"{step:,} steps")
    if job is not None and job.state == "FAILED":
        return State("failed", f"job {job.id} failed with {job.exit_code or 'no status'}: see the log")
    if not run.starts:
        return State("new", "nothing has started yet")
    if _only_just(run, last, now):
        return State("stopping", "the ranks have ended, and nobody has said why yet")
    if run.supervisor_sees_to_it():
        return State("restarting", "a rank has ended, and the supervisor sees to it")
    if run.owner is not None:
        return State("killed", f"process {run.owner.pid} has gone without a word, at step {step}")
    return State("stopped", f"at step {step}")


def progress(run: RunFiles, metrics: Metrics, state: State, now: float | None = None) -> Progress:
    """How far and how fast. Speed is that of the last steps of the present start."""
    now = time.time() if now is None else now
    last = metrics.last
    max_steps = run.config.train.max_steps if run.config is not None else None
    if last is None:
        return Progress(0, max_steps, None, None, None, None)
    since = int(run.starts[-1].get("step", 0)) if run.starts else 0
    recent = [record for record in metrics.recent[-_STEPS_OF_SPEED:] if int(record["step"]) > since]
    seconds = _seconds_a_step(recent or metrics.recent[-_STEPS_OF_SPEED:])
    batch = run.config.data.global_batch if run.config is not None else None
    waits = [wait for record in recent[-50:] if (wait := number(record.get("data_wait_fraction"))) is not None]
    left = None
    if max_steps is not None and seconds is not None and state.word in ("training", "silent"):
        left = max(0.0, (max_steps - int(last["step"])) * seconds)
    return Progress(
        step=int(last["step"]),
        max_steps=max_steps,
        samples_per_second=batch / seconds if batch and seconds else number(last.get("samples_per_second")),
        seconds_a_step=seconds,
        data_wait=sum(waits) / len(waits) if waits else None,
        seconds_left=left,
    )


def waiting_for(job: Job) -> str:
    """Why a job waits, in words for those who do not know Slurm's."""
    words = {
        "Resources": "waits for nodes",
        "Priority": "waits for jobs of higher priority",
        "Dependency": f"waits for {job.dependency or 'another job'}",
        "DependencyNeverSatisfied": f"will never start: {job.dependency or 'what it depends on'} did not succeed",
        "BeginTime": "was put back into the queue",
        "JobHeldUser": "is held by its user",
        "JobHeldAdmin": "is held by an administrator",
    }
    text = words.get(job.reason, f"waits ({job.reason})" if job.reason else "waits")
    if job.start is not None:
        text += f", expected to start at {time.strftime('%H:%M', time.localtime(job.start))}"
    return text


def in_words(job: Job) -> str:
    """A job's state for people: what it does, or how it ended."""
    if job.reason == "DependencyNeverSatisfied" and job.state in ("CANCELLED", "PENDING"):
        return f"cancelled: {job.dependency or 'what it depended on'} did not succeed"
    if job.waits:
        return waiting_for(job)
    text = job.state.lower().replace("_", " ")
    if job.state == "FAILED" and job.exit_code:
        text += f" with {job.exit_code.partition(':')[0]}"
    elif job.reason and job.reason != "NonZeroExitCode":
        text += f" ({job.reason})"
    if job.tasks:
        text += ": " + ", ".join(f"{count} {name.lower()}" for name, count in sorted(job.tasks.items()))
    return text


def _training_job(run: RunFiles, jobs: Sequence[Job]) -> Job | None:
    """The last job that trains: the one that owns the directory, or was submitted to."""
    kinds = {str(job.get("id")): str(job.get("kind", "pretrain")) for job in run.jobs}
    return next((job for job in reversed(jobs) if kinds.get(job.id, "pretrain") == "pretrain"), None)


def _fault(run: RunFiles) -> str:
    line: dict[str, Any] = next((one for one in reversed(run.supervisor) if one.get("event") == "fault"), {})
    return str(line.get("text") or "a fault; see the log")


def _seconds_a_step(records: Sequence[MetricsLine]) -> float | None:
    if len(records) >= 2 and all(number(record.get("time")) for record in (records[0], records[-1])):
        steps = int(records[-1]["step"]) - int(records[0]["step"])
        passed = float(records[-1]["time"]) - float(records[0]["time"])
        if steps > 0 and passed > 0:
            return passed / steps
    found = [seconds for record in records if (seconds := number(record.get("step_seconds")))]
    return statistics.median(found) if found else None

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
from launch.status.run_files import ALIVE, RunFiles, ago, span
from launch.status.slurm import FORGOTTEN, Job
from launch.status.words import in_words, kind_of, waiting_for, will_never_start
from pretrain.owner import Record
from pretrain.stopping import STOP_FILE

Word = Literal[
    "new",
    "queued",
    "starting",
    "training",
    "stalled",
    "stopping",
    "restarting",
    "silent",
    "done",
    "stopped",
    "failed",
    "killed",
]
LIVE: tuple[Word, ...] = ("starting", "training", "stalled", "stopping", "restarting", "silent")
_BEATS_OF_SILENCE = 3
_STEPS_OF_SPEED = 200
_STEPS_TO_TELL = 10
_SECONDS_TO_SAY_WHY = 15.0
# Without a step for longer than both it has stalled, unless it evaluates or saves.
_SECONDS_OF_A_STALL, _STEPS_OF_A_STALL = 60.0, 20.0


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
    tokens_per_second: float | None
    """The same."""
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
    job = next((each for each in reversed(jobs) if kind_of(each.id, run.jobs) == "pretrain"), None)
    if run.owner is not None and run.owner_gone is not True and not _lost_its_nodes(run, jobs):
        return _owned(run, last, step, now, job)
    if job is not None and job.state == "RUNNING":
        return _has_nodes(run, job, now)
    if job is not None and job.waits:
        word: Word = "failed" if will_never_start(job) else "queued"
        begun = f"; it has come to step {step:,}" if step else ""
        again = f", put back {job.restarts} time{'s' * (job.restarts > 1)}" if job.restarts else ""
        return State(word, f"job {job.id}{again}: {waiting_for(job, jobs, run.jobs)}{begun}")
    return _ended(run, last, finished, job, jobs, now)


def _lost_its_nodes(run: RunFiles, jobs: Sequence[Job]) -> bool:
    """Whether Slurm says that the start of the job that owns the directory, on a host out of sight, is over."""
    owner = run.owner
    if owner is None or run.owner_gone is False:
        return False
    job = next((each for each in jobs if each.id == owner.job_id), None)
    if job is None or job.state in ("SUSPENDED", FORGOTTEN):
        return False
    return job.waits or job.has_left or job.restarts > owner.job_start


def _has_nodes(run: RunFiles, job: Job, now: float) -> State:
    """Of a job that runs without an owner of the directory."""
    end = _last_end(run)
    if end is not None and str(end.get("job_id")) == job.id and float(end.get("time", 0)) >= (job.start or now):
        again = _restarting(run, now)
        what = f"the ranks have ended with {end.get('status')}; job {job.id} ends, or puts itself back into the queue"
        return again or State("stopping", what)
    return State("starting", f"job {job.id} runs on {job.nodes}")


def _owned(run: RunFiles, last: MetricsLine | None, step: int, now: float, job: Job | None) -> State:
    owner = run.owner
    assert owner is not None
    silence = now - owner.heartbeat
    if job is not None and job.id == owner.job_id and job.state == "SUSPENDED":
        return State("stalled", f"job {job.id} is suspended by Slurm")
    if run.owner_gone is None and silence > max(_BEATS_OF_SILENCE * owner.beat_seconds, 30):
        runs = f", though job {job.id} runs on {job.nodes}" if job is not None and job.state == "RUNNING" else ""
        return State("silent", f"no sign of life from host {owner.host} for {span(silence)}{runs}")
    started = max((float(start.get("time", 0)) for start in run.starts), default=0.0)
    before = f"to go on from step {run.starts[-1].get('step', 0):,}" if run.starts and len(run.starts) > 1 else ""
    if run.stop_asked:
        return State("stopping", f"asked to, by a file named {STOP_FILE}; the checkpoint comes first")
    # run.json gets its line when model and checkpoint are loaded; the owner's is older than that.
    loading = not run.starts or _taken(owner) > started + 1
    if loading or last is None or 0 < float(last.get("time", now)) < started:
        return State("starting", before)
    # Seen by one clock, where the owner is on another host.
    return _training(run, last, now if run.owner_gone is False else owner.heartbeat)


def _training(run: RunFiles, last: MetricsLine, now: float) -> State:
    """Of a run that has begun its steps: whether they go on."""
    quiet = now - float(last.get("time", now))
    usual = number(last.get("step_seconds")) or 0.0
    phases = {beat.phase for beat in run.beats}
    busy = "evaluating" if "evaluate" in phases else "saving a checkpoint" if "checkpoint" in phases else ""
    config = run.config
    if not phases and config is not None and config.evaluation.every_steps:
        # Out of sight of the ranks; it evaluates after these steps.
        due = int(last["step"]) % config.evaluation.every_steps == 0
        busy = "evaluating, it seems" if due and quiet < config.supervisor.hang_seconds else ""
    if quiet <= max(_SECONDS_OF_A_STALL, _STEPS_OF_A_STALL * usual):
        return State("training", busy if quiet > 2 * usual + 1 else "")
    if busy:
        return State("training", f"{busy}, {span(quiet)} after step {int(last['step']):,}")
    stuck = [f"rank {beat.rank} is {beat.process}" for beat in run.beats if beat.process != ALIVE]
    told = [f"no step for {span(quiet)}, where the last one took {usual:.2g} s", *stuck[:4]]
    if config is not None:
        told.append(f"ranks without a sign of life are ended after {span(config.supervisor.hang_seconds)}")
    return State("stalled", "; ".join(told))


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


def _ended(
    run: RunFiles, last: MetricsLine | None, finished: bool, job: Job | None, jobs: Sequence[Job], now: float
) -> State:
    step = int(last["step"]) if last else 0
    end = _last_end(run)
    of_job = f"job {job.id}: {in_words(job, jobs, run.jobs)}" if job is not None else ""
    if end is not None and not _is_newer(job, end):
        again = _restarting(run, now)
        if again is not None:
            return again
        status = end.get("status")
        if status in (RUN_AGAIN, STOPPED_BY_FILE):
            return State("stopped", f"at step {step:,}, with a checkpoint; the same command goes on from there")
        if status in (FAULT, ENDED):
            return State("failed", f"{_fault(run)} (status {status})")
        if status == BAD_INPUT:
            return State("failed", "bad input (status 2): see the log")
        if status not in (DONE, None):
            return State("killed", f"ended at once, with status {status}, at step {step:,}")
    if job is not None and job.has_left and job.state not in ("COMPLETED", "FAILED", FORGOTTEN):
        by_hand = job.state == "CANCELLED" and not of_job.startswith(f"job {job.id}: cancelled: ")
        begun = f", at step {step:,}" if step else ""
        return State("stopped" if by_hand else "failed", f"{of_job}{begun}")
    if finished:
        return State("done", f"{step:,} steps")
    if job is not None and job.state == "FAILED":
        return State("failed", f"{of_job}: see the log")
    if not run.starts:
        return _new(run, job)
    if _only_just(run, last, now):
        return State("stopping", "the ranks have ended, and nobody has said why yet")
    if run.supervisor_sees_to_it():
        return State("restarting", "a rank has ended, and the supervisor sees to it")
    if run.owner is not None and run.owner_gone is not True:
        # Of a host out of sight; it is its job that tells.
        return State("killed", f"host {run.owner.host} has gone with job {run.owner.job_id}, at step {step:,}")
    if run.owner is not None:
        return State("killed", f"process {run.owner.pid} has gone without a word, at step {step:,}")
    return State("stopped", f"at step {step:,}")


def _new(run: RunFiles, job: Job | None) -> State:
    if job is not None:
        return State("new", f"job {job.id} has left the queue, and nothing has started: see its log")
    newest = next((each for each in reversed(run.jobs) if each.get("kind") in (None, "pretrain")), None)
    if newest is not None:
        when = ago(number(newest.get("submitted")))
        return State("new", f"job {newest.get('id')} was submitted {when}, and Slurm cannot be asked from here")
    return State("new", "nothing has started yet")


def _last_end(run: RunFiles) -> dict[str, Any] | None:
    """What the supervisor wrote of the end of the last start, if it has ended."""
    end = next((line for line in reversed(run.supervisor) if line.get("event") in ("end", "fault")), None)
    started = max((float(start.get("time", 0)) for start in run.starts), default=0.0)
    return end if end is not None and float(end.get("time", 0)) >= started else None


def _is_newer(job: Job | None, end: dict[str, Any]) -> bool:
    """Whether a job came after that end, and never got as far as to start."""
    if job is None or not job.has_left or job.state in ("COMPLETED", FORGOTTEN) or str(end.get("job_id")) == job.id:
        return False
    return job.end is not None and job.end > float(end.get("time", 0))


def _restarting(run: RunFiles, now: float) -> State | None:
    waiting = run.supervisor[-1]
    if waiting.get("event") != "restart" or run.supervisor_is_alive() is False:
        return None
    due = float(waiting.get("time", 0)) + float(waiting.get("wait_seconds", 0))
    if not run.supervisor_is_alive() and now >= due + 120:
        return None
    when = f" in {span(due - now)}" if due > now else ""
    return State("restarting", f"restart {waiting.get('number')}{when}, after: {_fault(run)}")


def progress(run: RunFiles, metrics: Metrics, state: State, now: float | None = None) -> Progress:
    """How far and how fast. Speed is that of the last steps of the present start."""
    now = time.time() if now is None else now
    last = metrics.last
    max_steps = run.config.train.max_steps if run.config is not None else None
    if last is None:
        return Progress(0, max_steps, None, None, None, None, None)
    since = int(run.starts[-1].get("step", 0)) if run.starts else 0
    recent = [record for record in metrics.recent[-_STEPS_OF_SPEED:] if int(record["step"]) > since]
    if len(recent) >= _STEPS_TO_TELL or len(recent) == len(metrics.recent):
        seconds = _seconds_a_step(recent)
    else:
        # The first steps of a start are slow; those of the one before tell more.
        seconds = _median_seconds(metrics.recent[-_STEPS_OF_SPEED:])
    batch = run.config.data.global_batch if run.config is not None else None
    waits = [wait for record in recent[-50:] if (wait := number(record.get("data_wait_fraction"))) is not None]
    tokens = [
        rate * took
        for record in recent
        if (rate := number(record.get("tokens_per_second"))) is not None
        and (took := number(record.get("step_seconds"))) is not None
    ]
    left = None
    if max_steps is not None and seconds is not None and state.word in ("training", "silent"):
        left = max(0.0, (max_steps - int(last["step"])) * seconds)
    return Progress(
        step=int(last["step"]),
        max_steps=max_steps,
        samples_per_second=batch / seconds if batch and seconds else number(last.get("samples_per_second")),
        tokens_per_second=sum(tokens) / len(tokens) / seconds if tokens and seconds else None,
        seconds_a_step=seconds,
        data_wait=sum(waits) / len(waits) if waits else None,
        seconds_left=left,
    )


def _fault(run: RunFiles) -> str:
    line: dict[str, Any] = next((one for one in reversed(run.supervisor) if one.get("event") == "fault"), {})
    return str(line.get("text") or "a fault; see the log")


def _seconds_a_step(records: Sequence[MetricsLine]) -> float | None:
    if len(records) >= 2 and all(number(record.get("time")) for record in (records[0], records[-1])):
        steps = int(records[-1]["step"]) - int(records[0]["step"])
        passed = float(records[-1]["time"]) - float(records[0]["time"])
        if steps > 0 and passed > 0:
            return passed / steps
    return _median_seconds(records)


def _median_seconds(records: Sequence[MetricsLine]) -> float | None:
    found = [seconds for record in records if (seconds := number(record.get("step_seconds")))]
    return statistics.median(found) if found else None

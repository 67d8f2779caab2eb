"""`triptych stop`: have a run save and end, wherever it runs.

A file named STOP in the run directory does it on any machine that sees the directory. The batch shell of a Slurm job
gets a signal as well, which reaches ranks that do not look for the file yet; told by either, the job does not put
itself back into the queue.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from data_pipelines.errors import BadInput
from launch.json_output import print_json, say
from launch.processes import GONE, signal_name, state
from launch.status import slurm
from launch.status.slurm import Job
from launch.status.snapshot import Looker, Snapshot
from launch.status.target import run_directory
from pretrain.owner import is_gone
from pretrain.stopping import STOP_FILE

DONE, OTHERWISE = 0, 1
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_SIGNALS = 0.5


def stop_command(target: str, wait: bool = True, now: bool = False, as_json: bool = False) -> int:
    """Stop a run; returns the exit status.

    Args:
        target: run directory, config or job.
        wait: until the run has ended.
        now: end it at once, without a checkpoint.
        as_json: JSON alone on standard output.

    Returns:
        0 when it was asked, or with `wait` when it has stopped with a checkpoint or is done; 1 when it ended otherwise.

    Raises:
        BadInput: nothing of it runs or waits, or it cannot be reached from here.
    """
    looker = Looker(run_directory(target), seconds_between_questions=2.0)
    snapshot = looker.look()
    asked = _end_at_once(snapshot) if now else _ask(snapshot)
    say(f"triptych: {asked}")
    if snapshot.state.word == "stalled" and not now:
        say("triptych: it has stalled, and may not hear that: --now ends it at once, without a checkpoint")
    if wait:
        snapshot = _wait(looker)
    words = snapshot.state.word
    stopped = not wait or words in ("stopped", "done") or now and not snapshot.state.live
    if as_json:
        print_json({"run": str(looker.path), "asked": asked, **_outcome(snapshot)})
    elif wait:
        say(f"triptych: {words}" + (f": {snapshot.state.why}" if snapshot.state.why else ""))
    return DONE if stopped else OTHERWISE


def _ask(snapshot: Snapshot) -> str:
    run, job = snapshot.run, _job(snapshot)
    if job is not None and (job.waits or snapshot.kind(job) != "pretrain"):
        return _cancelled(snapshot)
    if job is not None:
        refused = slurm.cancel(job.id, "TERM")
        if refused is None:
            if snapshot.state.word in ("training", "stalled"):
                with contextlib.suppress(OSError):
                    (run.path / STOP_FILE).touch()
            return f"asked job {job.id} to save and end"
        say(f"triptych: scancel: {refused}; a file named {STOP_FILE} asks it instead")
    if not snapshot.state.live and job is None:
        raise BadInput(f"{run.path}: nothing to stop: {snapshot.state.word}{_because(snapshot)}")
    if not run.config and not run.starts:
        raise BadInput(f"{run.path}: it is only starting; try again when it trains")
    try:
        (run.path / STOP_FILE).touch()
    except OSError as error:
        raise BadInput(f"{run.path}: a file named {STOP_FILE} cannot be put there: {error.strerror}") from None
    return f"asked {run.path} to save and end, by a file named {STOP_FILE}"


def _end_at_once(snapshot: Snapshot) -> str:
    run, job = snapshot.run, _job(snapshot)
    if job is not None:
        return _cancelled(snapshot)
    owner = run.owner
    if owner is None or is_gone(owner):
        raise BadInput(f"{run.path}: nothing to stop: {snapshot.state.word}{_because(snapshot)}")
    if is_gone(owner) is None:
        raise BadInput(f"{run.path} runs on host {owner.host}, whose processes cannot be seen from here: do it there")
    # The launcher, and where there is one its supervisor, which ends at once at the second signal.
    top = owner.ancestors[-1] if owner.ancestors else owner.pid
    number = signal.SIGTERM if len(owner.ancestors) > 1 else signal.SIGKILL
    for _ in range(2):
        if state(top) != GONE:
            try:
                os.kill(top, number)
            except PermissionError:
                raise BadInput(f"{run.path}: process {top} is another user's") from None
            except ProcessLookupError:
                break
            time.sleep(_SECONDS_BETWEEN_SIGNALS)
    return f"sent {signal_name(number)} to process {top}"


def _cancelled(snapshot: Snapshot) -> str:
    """Take the run's jobs out of the queue, those that run too: the training, what it waits for, what waits for it."""
    told = []
    for job in snapshot.jobs:
        if job.has_left:
            continue
        refused = slurm.cancel(job.id)
        if refused is not None:
            raise BadInput(f"job {job.id} could not be cancelled: {refused}")
        told.append(f"{snapshot.kind(job)} job {job.id}, which {'waited in the queue' if job.waits else 'ran'}")
    return f"cancelled {' and '.join(told)}"


def _job(snapshot: Snapshot) -> Job | None:
    """The job to tell: the one that trains or is to train, else another one that is under way."""
    job = snapshot.job
    return job if job is not None and not job.has_left else None


def _wait(looker: Looker) -> Snapshot:
    while True:
        snapshot = looker.look()
        job = _job(snapshot)
        if not snapshot.state.live and (job is None or job.waits):
            with contextlib.suppress(OSError):
                (Path(looker.path) / STOP_FILE).unlink(missing_ok=True)
            return snapshot
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _because(snapshot: Snapshot) -> str:
    return f" ({snapshot.state.why})" if snapshot.state.why else ""


def _outcome(snapshot: Snapshot) -> dict[str, object]:
    facts = snapshot.as_json()
    return {name: facts[name] for name in ("state", "why", "step", "max_steps", "checkpoint", "job")}

"""A job's state in words, for those who do not know Slurm's: what it waits for, how it ended, and because of what."""

from __future__ import annotations

import pwd
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch.status.slurm import FORGOTTEN, Job

_NEVER = "DependencyNeverSatisfied"
_REASONS = {
    "Resources": "waits for nodes",
    "Priority": "waits for jobs of higher priority",
    "BeginTime": "waits for the time at which it may start",
    "JobHeldUser": "is held by its user",
    "JobHeldAdmin": "is held by an administrator",
    "launch failed requeued held": "is held, since it could not be started on its nodes (scontrol release lets it go)",
}


def kind_of(job: str, submitted: Sequence[Mapping[str, Any]]) -> str:
    """What a job is for, by job.json: build, pretrain, eval or export; pretrain where nothing is said."""
    return next((str(each.get("kind") or "pretrain") for each in submitted if str(each.get("id")) == job), "pretrain")


def will_never_start(job: Job) -> bool:
    """Whether it waits for something that cannot come any more."""
    return job.reason == _NEVER and not job.has_left


def in_words(job: Job, jobs: Sequence[Job] = (), submitted: Sequence[Mapping[str, Any]] = ()) -> str:
    """What a job does, or how it ended.

    Args:
        job: the job.
        jobs: those of the same run, to say how the one ended that it depended on.
        submitted: what job.json says of them.
    """
    if job.waits:
        return waiting_for(job, jobs, submitted)
    if job.state == FORGOTTEN:
        return "Slurm does not know it any more"
    text = job.state.lower().replace("_", " ")
    if job.tasks:
        return f"{text}: " + ", ".join(f"{count} {name.lower()}" for name, count in sorted(job.tasks.items()))
    if job.state == "CANCELLED":
        return text + _by_whom(job, jobs, submitted)
    if job.state == "FAILED" and job.exit_code:
        status, _, number = job.exit_code.partition(":")
        return f"{text} with {status}" if status != "0" else f"{text} by signal {number}"
    return text if job.reason in ("", "NonZeroExitCode") else f"{text} ({job.reason})"


def waiting_for(job: Job, jobs: Sequence[Job] = (), submitted: Sequence[Mapping[str, Any]] = ()) -> str:
    """Why a job waits."""
    if job.reason in ("Dependency", _NEVER):
        others = [_named(each, submitted) for each, _ in _before(job, submitted)]
        if job.reason == _NEVER:
            return f"will never start: {_unsuccessful(job, jobs, submitted)}"
        return f"waits for {' and '.join(others) or 'another job'}"
    text = _REASONS.get(job.reason, f"waits ({job.reason})" if job.reason else "waits")
    if job.state == "SUSPENDED":
        text = "is suspended"
    elif job.state == "CONFIGURING":
        text = "has its nodes, which are being prepared"
    elif job.start is not None:
        text += f", expected to start at {_clock(job.start)}"
    return text


def _by_whom(job: Job, jobs: Sequence[Job], submitted: Sequence[Mapping[str, Any]]) -> str:
    by = re.fullmatch(r"by (\d+)", job.reason)
    if by is not None:
        return f" by {_user(int(by[1]))}"
    if job.reason == _NEVER or _bad(job, jobs, submitted):
        return f": {_unsuccessful(job, jobs, submitted)}"
    return f" ({job.reason})" if job.reason else ""


def _unsuccessful(job: Job, jobs: Sequence[Job], submitted: Sequence[Mapping[str, Any]]) -> str:
    """Which of the jobs before this one did not succeed, and how each ended."""
    told = []
    for each in _bad(job, jobs, submitted) or [number for number, _ in _before(job, submitted)]:
        other = next((one for one in jobs if one.id == each), None)
        how = in_words(other, jobs, submitted) if other is not None and other.has_left else "did not succeed"
        told.append(f"{_named(each, submitted)} {'was ' * how.startswith('cancelled')}{how}")
    return " and ".join(told) or "what it depended on did not succeed"


def _bad(job: Job, jobs: Sequence[Job], submitted: Sequence[Mapping[str, Any]]) -> list[str]:
    ended = {each.id for each in jobs if each.has_left and each.state not in ("COMPLETED", FORGOTTEN)}
    return [number for number, state in _before(job, submitted) if state == "failed" or number in ended]


def _before(job: Job, submitted: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Number and state of the jobs that it depends on, by Slurm (`afterok:7_*(failed)`) or by job.json."""
    found = re.findall(r"(\d+)(?:_\S*?)?\((\w+)\)", job.dependency)
    if found:
        return [(str(number), str(state)) for number, state in found]
    mine: Mapping[str, Any] = next((each for each in submitted if str(each.get("id")) == job.id), {})
    after = mine.get("after")
    return [(str(number), "") for number in after] if isinstance(after, list) else []


def _named(job: str, submitted: Sequence[Mapping[str, Any]]) -> str:
    there = any(str(each.get("id")) == job for each in submitted)
    return f"{kind_of(job, submitted)} job {job}" if there else f"job {job}"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _clock(moment: float) -> str:
    day = "%H:%M" if abs(moment - time.time()) < 12 * 3600 else "%a %d %b %H:%M"
    return time.strftime(day, time.localtime(moment))

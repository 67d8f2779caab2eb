"""What Slurm says of a job: squeue while it is in the queue, sacct or scontrol once it has left it.

Only formats that Slurm documents as stable are read (`-o`, `--parsable2`), with what a user may have named last. Where
there is no Slurm, or it does not answer, there is no answer here either: status goes on without. Without accounting
Slurm forgets a job some minutes after its end (MinJobAge), and then says nothing of it at all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

_SECONDS_TO_ANSWER = 10.0
_SQUEUE = ("%i", "%T", "%r", "%D", "%N", "%S", "%e", "%L", "%l", "%E", "%j")
_SACCT = ("JobID", "State", "ExitCode", "NNodes", "NodeList", "Start", "End", "Timelimit", "JobName")
FORGOTTEN = "FORGOTTEN"
"""Our word for the state of a job that Slurm does not know any more."""
_LEFT = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"),
    *("PREEMPTED", "REVOKED", FORGOTTEN),
)
_WAITING = (
    *("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "SUSPENDED"),
    "CONFIGURING",
)
_JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")


@dataclass(frozen=True)
class Job:
    """A job as Slurm sees it. Times are seconds since 1970, and None where Slurm does not say."""

    id: str
    name: str
    state: str
    """Slurm's word, such as PENDING, RUNNING, COMPLETED."""
    reason: str = ""
    """Why it waits, or why it ended; empty where there is nothing to say."""
    num_nodes: int = 0
    nodes: str = ""
    """Node list in Slurm's short form, such as node[1-2]; empty while it waits."""
    start: float | None = None
    """When it started, or is expected to."""
    end: float | None = None
    """When it ended, or has to end."""
    seconds_left: float | None = None
    """Until its time limit, while it runs."""
    limit_seconds: float | None = None
    exit_code: str = ""
    """`status:signal`, once it has ended."""
    restarts: int = 0
    dependency: str = ""
    tasks: dict[str, int] | None = None
    """Of an array: how many tasks are in which state."""

    @property
    def waits(self) -> bool:
        """Whether it waits for its nodes."""
        return self.state in _WAITING

    @property
    def has_left(self) -> bool:
        """Whether it is over for good."""
        return self.state in _LEFT


def is_job_id(word: str) -> bool:
    """Whether a word is a job's number, or that of a task of an array."""
    return _JOB_ID.fullmatch(word) is not None


def is_there() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def jobs(ids: Sequence[str]) -> list[Job] | None:
    """The jobs as Slurm knows them, in the order of `ids`; those that it has forgotten say so.

    Returns:
        None where there is no Slurm or it does not answer.
    """
    wanted = [each for each in ids if is_job_id(each)]
    if not wanted:
        return []
    queue = _ask("squeue", "--noheader", "--states=all", f"--jobs={_several(wanted)}", f"--format={'|'.join(_SQUEUE)}")
    if queue is None:
        return None
    found = {job.id: _completed(job) for job in squeue_jobs(queue)}
    missing = [each for each in wanted if each not in found]
    if missing:
        options = ("--noheader", "--parsable2", "--allocations", f"--jobs={','.join(missing)}")
        found |= {job.id: job for job in sacct_jobs(_ask("sacct", *options, f"--format={','.join(_SACCT)}") or "")}
    return [found.get(each, Job(each, "", FORGOTTEN)) for each in wanted]


def _several(ids: Sequence[str]) -> str:
    # squeue refuses a single id that has left the queue, and passes over such ids among several.
    return ",".join([*ids, ids[0]])


def squeue_jobs(text: str) -> list[Job]:
    """The jobs in squeue's answer; tasks of an array as one."""
    found: list[Job] = []
    for line in text.splitlines():
        fields = line.split("|", len(_SQUEUE) - 1)
        if len(fields) != len(_SQUEUE):
            continue
        job, state, reason, nodes, where, start, end, left, limit, dependency, name = fields
        found.append(
            Job(
                id=job.strip(),
                name=name,
                state=state,
                reason="" if reason in ("None", "(null)") else reason,
                num_nodes=int(nodes) if nodes.isdigit() else 0,
                nodes="" if where == "(null)" else where,
                start=moment(start),
                end=moment(end),
                seconds_left=duration(left),
                limit_seconds=duration(limit),
                dependency="" if dependency == "(null)" else dependency,
            )
        )
    return _arrays(found)


def sacct_jobs(text: str) -> list[Job]:
    """The jobs in sacct's answer; tasks of an array as one."""
    found: list[Job] = []
    for line in text.splitlines():
        fields = line.split("|", len(_SACCT) - 1)
        if len(fields) != len(_SACCT):
            continue
        job, state, code, nodes, where, start, end, limit, name = fields
        # "CANCELLED by 1000": who did it is a reason.
        word, _, more = state.partition(" ")
        found.append(
            Job(
                id=job,
                name=name,
                state=word,
                reason=more,
                num_nodes=int(nodes) if nodes.isdigit() else 0,
                nodes="" if where.startswith("None") else where,
                start=moment(start),
                end=moment(end),
                limit_seconds=duration(limit),
                exit_code=code,
            )
        )
    return _arrays(found)


def scontrol_jobs(text: str) -> list[Job]:
    """The jobs in `scontrol --oneliner show job`'s answer. A job's name cannot pass for another field."""
    found = []
    for line in text.splitlines():
        head = re.match(r"JobId=(\S+) (?:Array\S+ )*JobName=(.*?) UserId=", line)
        # Fields that Slurm writes after the name, up to the first one with a value of the user's.
        rest = line[head.end() :].partition(" Command=")[0] if head else ""
        fields = dict(re.findall(r"(\w+)=(\S+)", rest))
        if head is None or "JobState" not in fields:
            continue
        found.append(
            Job(
                id=head[1],
                name=head[2],
                state=fields["JobState"],
                reason=_known(fields.get("Reason", "")),
                num_nodes=int(re.match(r"\d*", fields.get("NumNodes", "0"))[0] or 0),  # type: ignore[index]
                nodes=_known(fields.get("NodeList", "")),
                start=moment(fields.get("StartTime", "")),
                end=moment(fields.get("EndTime", "")),
                limit_seconds=duration(fields.get("TimeLimit", "")),
                exit_code=fields.get("ExitCode", ""),
                restarts=int(fields.get("Restarts", 0)),
                dependency=_known(fields.get("Dependency", "")),
            )
        )
    return found


def command_of(job: str) -> tuple[str, str] | None:
    """What a job runs, script and arguments in one text, and its folder; None where Slurm does not know it."""
    if not is_job_id(job) or not is_there():
        return None
    command, folder = (
        _ask("squeue", "--noheader", "--states=all", f"--jobs={job}", f"--format={what}") for what in ("%o", "%Z")
    )
    lines = (command or "").splitlines(), (folder or "").splitlines()
    return (lines[0][0], lines[1][0]) if all(lines) else None


def output_of(job: str) -> str | None:
    """Where a job writes what it says; None where Slurm does not know it."""
    if not is_job_id(job) or not is_there():
        return None
    found = re.findall(r"^ +StdOut=(.*)$", _ask("scontrol", "show", "job", job) or "", re.MULTILINE)
    return str(found[-1]) if found else None


def cancel(job: str, signal: str | None = None) -> str | None:
    """Cancel a job, or have its batch shell get a signal; why it could not be done, or None."""
    words = ["scancel", *(("--batch", f"--signal={signal}") if signal else ()), job]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if done.returncode == 0 and not done.stderr.strip() else " ".join(done.stderr.split())


def duration(text: str) -> float | None:
    """Slurm's `[days-]hours:minutes:seconds` in seconds; None for UNLIMITED, INVALID and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def moment(text: str) -> float | None:
    """Slurm's local `2026-11-22T20:10:00` in seconds since 1970; None for Unknown, N/A and the like."""
    try:
        return time.mktime(time.strptime(text.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def _completed(job: Job) -> Job:
    """A job with what only scontrol knows."""
    if job.tasks is None:
        for other in scontrol_jobs(_ask("scontrol", "--oneliner", "show", "job", job.id) or ""):
            return replace(job, restarts=other.restarts, exit_code=other.exit_code if job.has_left else "")
    return job


def _arrays(found: Iterable[Job]) -> list[Job]:
    """Tasks of the same array as one job, which runs while one of them runs and has failed when one has."""
    by_id: dict[str, list[Job]] = {}
    for job in found:
        by_id.setdefault(job.id.partition("_")[0], []).append(job)
    joined = []
    for name, tasks in by_id.items():
        counts: dict[str, int] = {}
        for task in tasks:
            counts[task.state] = counts.get(task.state, 0) + 1
        if len(tasks) == 1:
            joined.append(replace(tasks[0], id=name, tasks=counts if "_" in tasks[0].id else None))
            continue
        going = ("RUNNING", "COMPLETING", "PENDING")
        bad = [state for state in counts if state not in (*going, "COMPLETED")]
        state = next((state for state in (*going, *bad) if state in counts), "COMPLETED")
        first = next(task for task in tasks if task.state == state)
        nodes = ",".join(dict.fromkeys(task.nodes for task in tasks if task.nodes and task.state == "RUNNING"))
        joined.append(replace(first, id=name, nodes=nodes or first.nodes, tasks=counts))
    return joined


def _known(text: str) -> str:
    return "" if text in ("None", "(null)", "Unknown") else text


def _ask(*words: str) -> str | None:
    """What one of Slurm's commands says; None where it is not there, fails, or takes too long."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None

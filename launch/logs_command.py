"""`triptych logs`: what a run has said: its ranks, its supervisors, its Slurm job.

Lines of ranks and supervisors begin with the time of day, so several logs are put together in the order of time.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput, printable
from launch.status import slurm
from launch.status.run_files import RunFiles, read_run
from launch.status.snapshot import Looker
from launch.status.target import run_directory

_STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
_STAMP = 19
_TASK_LOG = re.compile(r"_(\d+)\.log$")
_RANK_LOG = re.compile(r"rank-0*(\d+)\.log")
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_STATES = 3.0
_PIECE_BYTES = 1 << 16


class Log:
    """A file that is appended to, read from its last lines on; `name` stands before its lines, if there is one."""

    def __init__(self, name: str, path: Path, supervisor: bool = False) -> None:
        self.name, self.path = name, path
        self._supervisor = supervisor
        self._offset = 0
        self._torn = b""

    def last(self, lines: int) -> list[str]:
        """The last whole lines, and from there on it is read."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                data, start = b"", size
                while start > 0 and data.count(b"\n") <= lines:
                    start = max(0, start - _PIECE_BYTES)
                    file.seek(start)
                    data = file.read(size - start)
        except OSError:
            return []
        self._offset = size
        *whole, self._torn = data.split(b"\n")
        return [self._told(line) for line in deque(whole, maxlen=lines)]

    def new(self) -> list[str]:
        """Whole lines since the last call; from the beginning where the file is another, shorter one now."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:
                    self._offset, self._torn = 0, b""
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        self._offset += len(data)
        *whole, self._torn = (self._torn + data).split(b"\n")
        return [self._told(line) for line in whole]

    def rest(self) -> list[str]:
        """What came after the last line end, as of a process that was killed."""
        rest, self._torn = self._torn, b""
        return [self._told(rest)] if rest else []

    def _told(self, line: bytes) -> str:
        text = line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2]
        return _story(text) if self._supervisor else printable(text.expandtabs())


def logs_command(target: str, follow: bool = False, ranks: Sequence[int] = (), lines: int = 50) -> None:
    """Print the last lines of a run's logs, and with `follow` what comes, until the run ends or Ctrl-C.

    Args:
        target: run directory, config or job.
        follow: go on with new lines.
        ranks: of these ranks alone; by default the job and the supervisors, and rank 0 where there is no job's log.
        lines: of each log, to begin with.

    Raises:
        BadInput: there is no such run or log.
    """
    path = run_directory(target)
    job = target if target != str(path) and slurm.is_job_id(target) else None
    run = read_run(path)
    _check_access(path / "logs")
    logs = _logs(run, ranks, job)
    if not logs and not follow:
        there = sorted(_rank_logs(path))
        which = f"; there are those of rank {_ranges(there)}" if there and ranks else ""
        of = f"of rank {', '.join(map(str, ranks))} " if ranks else ""
        raise BadInput(f"{path}: no log {of}in {path / 'logs'}{which}")
    for log in logs:
        _check_access(log.path)
    try:
        _print([(log, log.last(lines)) for log in logs])
        if follow:
            _follow(path, logs, ranks, job)
    except KeyboardInterrupt:
        return


def _check_access(path: Path) -> None:
    if path.exists() and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise BadInput(f"{path}: may not be read by this user")


def _follow(path: Path, logs: list[Log], ranks: Sequence[int], job: str | None) -> None:
    looker = Looker(path)
    known, looked, ended = {log.path for log in logs}, 0.0, False
    while True:
        _print([(log, log.new()) for log in logs])
        if ended:
            _print([(log, log.rest()) for log in logs])
            return
        if time.monotonic() - looked >= _SECONDS_BETWEEN_STATES:
            looked = time.monotonic()
            snapshot = looker.look()
            # One more round then, for what was written meanwhile.
            ended = not snapshot.state.live and snapshot.state.word != "queued"
            for log in _logs(snapshot.run, ranks, job):
                if log.path not in known:
                    known.add(log.path)
                    logs.append(log)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _logs(run: RunFiles, ranks: Sequence[int], job: str | None) -> list[Log]:
    of_rank = _rank_logs(run.path)
    if ranks:
        return [Log(f"rank {rank}" * (len(ranks) > 1), of_rank[rank]) for rank in ranks if rank in of_rank]
    of_job = next(
        filter(None, (_job_logs(run, each) for each in reversed([job] if job else run.training_job_ids))), None
    )
    if of_job is not None:
        # Its ranks and supervisors say everything there.
        return of_job
    found = [Log(f"rank {min(of_rank)}", of_rank[min(of_rank)])] if of_rank else []
    supervisor = run.path / "logs" / "supervisor.jsonl"
    return [*found, *([Log("supervisor", supervisor, supervisor=True)] if supervisor.is_file() else [])]


def _rank_logs(path: Path) -> dict[int, Path]:
    try:
        names = [(match, file) for file in (path / "logs").iterdir() if (match := _RANK_LOG.fullmatch(file.name))]
    except OSError:
        return {}
    return {int(match[1]): file for match, file in names}


def _job_logs(run: RunFiles, job: str) -> list[Log]:
    """Of a job, or of each task of an array: where `triptych submit` has them, or where Slurm says."""
    folder = run.path / "logs"
    alone = [path for path in sorted(folder.glob(f"*-{job}.log")) if not _RANK_LOG.fullmatch(path.name)][:1]
    if alone:
        return [Log("", alone[0])]
    tasks = {int(match[1]): file for file in folder.glob(f"*-{job}_*.log") if (match := _TASK_LOG.search(file.name))}
    if tasks:
        return [Log(f"task {task}", tasks[task]) for task in sorted(tasks)]
    place = slurm.output_of(job)
    return [Log("", Path(place))] if place is not None and Path(place).is_file() else []


def _story(line: str) -> str:
    """A line of logs/supervisor.jsonl for people."""
    try:
        entry: dict[str, Any] = json.loads(line)
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
        event = entry["event"]
        told = {
            "end": "the ranks ended with {status}",
            "fault": "fault: {text}; more in {incident}",
            "gave up": "not started again: {why}",
            "restart": "restart {number} in {wait_seconds:g} s",
            "stopped": "stopped before the restart, as asked",
        }.get(event, event)
        text = told.format_map(entry)
    except (ValueError, KeyError, TypeError, OverflowError):
        return printable(line)
    return printable(f"{clock} {entry.get('host', '')}: {text}")


def _print(said: Sequence[tuple[Log, Sequence[str]]]) -> None:
    """Print lines of several logs; those that begin with a time, and what follows them, in the order of time."""
    lines: list[tuple[str, int, str]] = []
    for place, (log, new) in enumerate(said):
        stamp = ""
        for line in new:
            stamp = line[:_STAMP] if _STAMPED.match(line) else stamp
            lines.append((stamp, place, f"{log.name} | {line}" if log.name else line))
    # The sort is stable: lines of one log that have the same time, or none, stay as they are.
    for _, _, line in sorted(lines, key=lambda each: each[0]):
        print(line)
    if lines:
        sys.stdout.flush()


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7`."""
    parts: list[list[int]] = []
    for each in numbers:
        if parts and parts[-1][-1] == each - 1:
            parts[-1] = [parts[-1][0], each]
        else:
            parts.append([each])
    return ", ".join("-".join(map(str, dict.fromkeys(part))) for part in parts)

"""Starts the ranks of one machine, watches them, ends what hangs, and starts again where that is asked for.

`triptych train` calls `supervise`, and so does each node of a Slurm job (`launch.node`). This process stays small: it
imports no torch, and it makes sure that nothing it started outlives it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from launch.board import Board
from launch.incident import Incident, Kind, Log, died_of, report, say
from launch.processes import children, descendants, end_all, send, signal_name, wait_until_gone
from launch.ranks import BAD_INPUT, DONE, ENDED, ENDED_RANKS, PASSED_ON, PRIVATE_FOLDER, RUN_AGAIN
from launch.stall import RankView, Verdict, Watch, find_guilty
from pretrain.config import SupervisorConfig
from pretrain.heartbeat import AFTER_VARIABLE, FOLDER_VARIABLE, Failure, read_failure
from pretrain.stopping import STOP_FILE

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SECONDS_BETWEEN_LOOKS = 0.2
_LARGEST_BACKOFF_SECONDS = 600.0
# Ranks whose launcher is gone save and end by themselves within 5 seconds.
_SECONDS_WITHOUT_LAUNCHER = 4.8
_SECONDS_FOR_OTHER_NODES = 5.0
_SECONDS_FOR_THE_ALARM = 30.0
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid[^)]*\) (?:is killed by signal: [^.]*|exited unexpectedly)")
_LOST_PEER = re.compile(
    r"[Cc]onnection (?:closed|reset|refused)|[Bb]roken pipe|[Ss]ocket [Tt]imeout|NCCL.*remote process"
)


@dataclass(frozen=True)
class Job:
    """What to start on this node."""

    command: Sequence[str]
    """Program and arguments; those of `pretrain.train` come last."""
    environment: Mapping[str, str]
    run_dir: Path
    resume: str
    """What a person types to go on."""
    ranks: range
    """Global ranks of this node."""
    node: int = 0
    num_nodes: int = 1
    stopped_by_file: int = RUN_AGAIN
    """Exit status when the ranks stopped because of a STOP file."""


@dataclass(frozen=True)
class Outcome:
    """How one start of the ranks ended."""

    status: int
    incident: Incident | None = None
    """What went wrong on this node, if anything."""


def supervise(job: Job, settings: SupervisorConfig) -> int:
    """Run the ranks to their end, with restarts where the settings allow any, and return the exit status.

    0 done, 1 a fault, 2 bad input, 75 stopped on purpose, 76 a dead rank or a hang, 128 + n ended by a second signal n.
    Nothing that was started stays behind. The first SIGINT, SIGTERM or SIGUSR1 asks the ranks to save and stop; a
    further SIGINT or SIGTERM kills them. Must be called from the main thread.
    """
    log = Log(job.run_dir)
    steps: list[int] = []
    before = _checkpoints(job.run_dir)
    after: Path | None = None
    private = Path(tempfile.mkdtemp(prefix=PRIVATE_FOLDER))
    with _Signals() as signals:
        try:
            while True:
                command = job.command if _checkpoints(job.run_dir) == before else _resuming(job.command)
                started = time.time()
                outcome = _Attempt(job, settings, signals, private, len(steps) + 1).run(command, after)
                if outcome.status != BAD_INPUT:
                    # After bad input the run directory may be another run's, and nothing may be written there.
                    log.write("end", attempt=len(steps) + 1, started=started, status=outcome.status)
                if outcome.incident is None:
                    return outcome.status
                steps.append(outcome.incident.step)
                after = report(outcome.incident, job.run_dir, outcome.status, len(steps), job.resume)
                facts = {"step": outcome.incident.step, "text": outcome.incident.headline(), "status": outcome.status}
                log.write("fault", attempt=len(steps), incident=after.name if after else None, **facts)
                if job.num_nodes > 1 or signals.asked:
                    return outcome.status
                wait = seconds_before_restart(steps, settings)
                if isinstance(wait, str):
                    log.write("gave up", why=wait)
                    if settings.max_restarts:
                        say(f"not started again: {wait}")
                    return outcome.status
                say(f"starting again in {wait:g} s, restart {len(steps)} of {settings.max_restarts}")
                log.write("restart", number=len(steps), wait_seconds=wait)
                if _stopped_meanwhile(wait, signals, job.run_dir):
                    log.write("stopped")
                    return RUN_AGAIN
        finally:
            shutil.rmtree(private, ignore_errors=True)


def seconds_before_restart(steps: Sequence[int], settings: SupervisorConfig) -> float | str:
    """How long to wait before the next start, or why there is none.

    Args:
        steps: the step of each fault so far, in order.
        settings: how many restarts there are.
    """
    if len(steps) > settings.max_restarts:
        return f"no restart is left (supervisor.max_restarts {settings.max_restarts})"
    if len(steps) >= 2 and steps[-1] == steps[-2]:
        return f"step {steps[-1]} failed twice in a row" if steps[-1] else "it failed twice before its first step"
    return float(min(settings.backoff_seconds * 2 ** (len(steps) - 1), _LARGEST_BACKOFF_SECONDS))


class _Signals:
    """What this process was asked: the first signal is passed on, a second one kills."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.pid = os.getpid()
        self.others = set(children(self.pid))
        self.asked: list[int] = []
        self.killed_by: int | None = None
        self.child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._handle) for number in PASSED_ON}
        # Should the launcher die, its ranks become our children instead of init's, and can be found.
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *error: object) -> None:
        end_all(self.pid, self.others)
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def in_child(self) -> None:
        """Between fork and exec: the kernel ends the launcher should this process die."""
        self._libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != self.pid:
            os._exit(1)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1 and any(asked != signal.SIGUSR1 for asked in self.asked):
            self.killed_by = number
            send(descendants(self.pid, self.others), signal.SIGKILL)
            return
        self.asked.append(number)
        say(f"{signal_name(number)}: stopping with a checkpoint; a second signal stops at once")
        if self.child is not None:
            self.child.send_signal(number)


class _Attempt:
    """One start of the ranks of this node, watched to its end."""

    def __init__(self, job: Job, settings: SupervisorConfig, signals: _Signals, private: Path, number: int) -> None:
        self._job, self._settings, self._signals = job, settings, signals
        self._private = private
        self._beats = private / f"heartbeats-{number}"
        self._beats.mkdir()
        self._watch = Watch(self._beats, job.ranks, settings.hang_seconds, settings.start_seconds)
        self._board = _board(job)

    def run(self, command: Sequence[str], after: Path | None) -> Outcome:
        """Start the ranks and wait for their end; nothing of them is left when this returns."""
        signals = self._signals
        environment = {
            # A process killed while it builds one leaves a lock on which every later build in that folder waits.
            "TORCH_EXTENSIONS_DIR": str(self._private / "torch_extensions"),
            **self._job.environment,
            FOLDER_VARIABLE: str(self._beats),
            AFTER_VARIABLE: after.name if after else "",
        }
        child = subprocess.Popen(
            list(command), env=environment, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=signals.in_child
        )
        signals.child = child
        for number in signals.asked:
            child.send_signal(number)
        try:
            outcome = self._until_end(child)
            if self._board is not None and (outcome.incident is not None or outcome.status == BAD_INPUT):
                what = outcome.incident.headline() if outcome.incident else "bad input"
                self._board.announce_end(what, outcome.status)
            return outcome
        finally:
            signals.child = None
            left = end_all(signals.pid, signals.others)
            if child.pid not in left:
                child.wait()
            if left:
                say(f"processes {left} do not end even when killed: they wait for a disk or a device")

    def _until_end(self, child: subprocess.Popen[bytes]) -> Outcome:
        while (status := child.poll()) is None:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            stands_still = self._watch.look()
            if self._board is not None:
                # The folder may be on a slow file system.
                if not self._board.due():
                    continue
                if (ended := self._board.ended()) is not None:
                    return _ended_with(*ended)
                alarm = self._board.alarm()
                if alarm is not None:
                    self._board.answer(alarm, self._ask())
            if stands_still:
                incident = self._hang()
                if incident is not None:
                    return Outcome(ENDED, incident)
        return self._ended(status)

    def _ask(self) -> list[RankView]:
        return self._watch.ask(platform.node(), descendants(self._signals.pid, self._signals.others))

    def _hang(self) -> Incident | None:
        """Find out who hangs; None where some other node is busy and ours only wait for it."""
        limit = self._watch.limit_seconds
        silent: list[str] = []
        if self._board is None:
            views = self._ask()
            if self._job.num_nodes > 1:
                silent = ["the other nodes"]
        else:
            alarm = self._board.raise_alarm()
            if alarm is None and self._watch.still_seconds < limit + _SECONDS_FOR_THE_ALARM:
                # Another node asks already: it hears from us and says what comes of it.
                return None
            views = self._ask()
            others, missing = self._board.collect(alarm) if alarm is not None else ([], [])
            silent = [f"node {node}" for node in missing] if alarm is not None else ["another node"]
            if any(view.still_seconds < limit / 2 for view in others):
                self._board.withdraw()
                self._watch.postpone(limit / 2)
                return None
            views += others
        verdict = find_guilty(views, silent)
        return self._describe(verdict, views, limit)

    def _describe(self, verdict: Verdict, views: Sequence[RankView], limit: float) -> Incident:
        setting = "start_seconds" if limit == self._settings.start_seconds else "hang_seconds"
        return Incident(
            kind="hang",
            rank=verdict.rank,
            step=verdict.step,
            phase=verdict.phase,
            what=f"no sign of life for {limit:g} s (supervisor.{setting}): {verdict.why}",
            host=next((view.host for view in views if view.rank == verdict.rank), platform.node()),
            stacks={view.rank: view.stacks for view in views if view.stacks},
            ranks=[{**asdict(view), "stacks": None} for view in views],
        )

    def _ended(self, status: int) -> Outcome:
        """What the end of the launcher means."""
        signals = self._signals
        if signals.killed_by is not None:
            return Outcome(128 + signals.killed_by)
        if status < 0:
            if -status in signals.asked:
                # Before it could pass anything on: nothing had begun.
                return Outcome(RUN_AGAIN if -status == signal.SIGUSR1 else 128 - status)
            wait_until_gone(signals.pid, signals.others, _SECONDS_WITHOUT_LAUNCHER)
            return Outcome(ENDED, self._incident("launcher_died", -1, f"{died_of(-status)}; its ranks have ended too"))
        if status == RUN_AGAIN:
            say("stopped with a checkpoint; the same command goes on from there")
            if (self._beats / STOP_FILE).exists():
                return Outcome(self._job.stopped_by_file)
        # 130 and 143: ended by signals that somebody sent to the launcher or the ranks, before they could save.
        if status in (DONE, BAD_INPUT, RUN_AGAIN, 128 + signal.SIGINT, 128 + signal.SIGTERM):
            return Outcome(status)
        return self._fault(status)

    def _fault(self, status: int) -> Outcome:
        """Which rank failed first, and of what."""
        failures = {rank: failure for rank in self._job.ranks if (failure := read_failure(self._beats, rank))}
        first = min(failures, key=lambda rank: failures[rank].monotonic, default=None)
        killed = [
            (rank, -code)
            for rank, code in _ended_ranks(self._beats)
            if code < 0 and (first is None or -code != signal.SIGABRT)
        ]
        if killed:
            rank, number = killed[0]
            died = self._incident("rank_died", rank, died_of(number), signal=signal_name(number))
            return Outcome(ENDED, died)
        if first is None:
            rank = next((rank for rank, _ in _ended_ranks(self._beats)), -1)
            return Outcome(status, self._incident("exception", rank, f"ended with status {status}"))
        return self._failure(first, failures[first], status)

    def _failure(self, rank: int, failure: Failure, status: int) -> Outcome:
        if self._job.num_nodes > 1 and _LOST_PEER.search(failure.text):
            if self._board is not None and (ended := self._board.ended(_SECONDS_FOR_OTHER_NODES)) is not None:
                return _ended_with(*ended)
            what = f"lost a rank of another node ({failure.line})"
            return Outcome(ENDED, self._incident("rank_died", -1, what, failure))
        worker = _DEAD_WORKER.search(failure.text)
        if worker:
            return Outcome(ENDED, self._incident("worker_died", rank, worker[0], failure))
        return Outcome(status, self._incident("exception", rank, failure.line, failure))

    def _incident(
        self, kind: Kind, rank: int, what: str, failure: Failure | None = None, signal: str | None = None
    ) -> Incident:
        self._watch.look()
        beat = self._watch.beat(rank)
        place = failure or beat
        return Incident(
            kind=kind,
            rank=rank,
            step=place.step if place else self._watch.step,
            phase=place.phase if place else "start",
            what=what,
            signal=signal,
            exception=failure.line if failure else None,
            traceback=failure.text if failure else None,
        )


def _ended_with(why: str, status: int) -> Outcome:
    """The outcome of a node whose ranks ended because of another one, which has it on record."""
    say(f"ended with another node: {why}")
    return Outcome(status)


def _board(job: Job) -> Board | None:
    slurm = os.environ.get("SLURM_JOB_ID")
    if job.num_nodes == 1 or not slurm:
        # Without a name that all nodes of this start share, and no other start, they cannot meet.
        return None
    start = os.environ.get("SLURM_RESTART_COUNT") or "0"
    name = f"nodes-{slurm}-{start}-{os.environ.get('SLURM_STEP_ID', '')}"
    return Board(job.run_dir / "logs" / name, job.node, job.num_nodes)


def _ended_ranks(folder: Path) -> list[tuple[int, int]]:
    try:
        return [(int(rank), int(code)) for rank, code in json.loads((folder / ENDED_RANKS).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _checkpoints(run_dir: Path) -> set[tuple[str, int]]:
    """The checkpoints of a run, such that one that is written again is another one."""
    return {(path.name, path.stat().st_ino) for path in (run_dir / "checkpoints").glob("step-*")}


def _resuming(command: Sequence[str]) -> list[str]:
    """The same command, going on from the newest checkpoint, now that the run has written one."""
    command = list(command)
    for place, word in enumerate(command):
        if word == "--resume" and place + 1 < len(command):
            command[place + 1] = "auto"
        elif word.startswith("--resume="):
            command[place] = "--resume=auto"
    return command


def _stopped_meanwhile(seconds: float, signals: _Signals, run_dir: Path) -> bool:
    """Wait before a restart; true when a signal or a STOP file says that there shall be none."""
    end = time.monotonic() + seconds
    while True:
        if signals.asked:
            return True
        if (run_dir / STOP_FILE).exists():
            (run_dir / STOP_FILE).unlink(missing_ok=True)
            say(f"stopped by a file named {STOP_FILE}")
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)

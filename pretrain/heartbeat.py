"""What each rank is doing, for a supervisor on the same node to see: a few numbers in a file that both map.

A beat is a store to shared memory, so a rank beats at every change of phase, and a stall shows wherever it is: in a
collective, in a data worker, in a write to a disk that does not answer. Beside its beats a rank leaves what a signal
asks of it (its stacks) and the exception that ended it. Without a supervisor all of that goes nowhere.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import struct
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

FOLDER_VARIABLE = "TRIPTYCH_HEARTBEATS"
"""Environment variable that names the folder of the heartbeats of a node's ranks."""
AFTER_VARIABLE = "TRIPTYCH_AFTER_INCIDENT"
"""Environment variable that names the incident after which the run was started again."""
STACKS_SIGNAL = signal.SIGUSR2
"""A rank answers it with the Python stack of each of its threads, even while it hangs in a collective."""

Phase = Literal["start", "data", "forward", "backward", "optimizer", "checkpoint", "evaluate", "end"]
PHASES: tuple[str, ...] = get_args(Phase)
# Sequence number before and after: a reader that catches a write in the middle sees two different ones.
_LAYOUT = struct.Struct("<qqqqqq")
_TICKS = struct.Struct("<q")
_TICKS_AT = 4 * _TICKS.size


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank."""

    pid: int
    step: int
    """The optimizer step that it is in; 1 is the first."""
    phase: Phase
    count: int
    """Beats so far. Ranks go through the same phases, so the others wait for the one with the fewest."""
    ticks: int
    """Signs of life within long phases so far; these may differ from rank to rank."""


@dataclass(frozen=True)
class Failure:
    """The exception that ended a rank."""

    step: int
    phase: Phase
    line: str
    """Type and message, in one line."""
    text: str
    """The whole traceback."""
    monotonic: float
    """When, by the clock that all processes of a machine share: the first one is the cause of the others."""


class Pulse:
    """A rank's own heartbeat."""

    def __init__(self, rank: int, folder: str | os.PathLike[str] | None = None) -> None:
        folder = folder if folder is not None else os.environ.get(FOLDER_VARIABLE)
        self._count = self._ticks = self._step = 0
        self._phase: Phase = "start"
        self._pid = os.getpid()
        self._map: mmap.mmap | None = None
        self._failure: Path | None = None
        if folder:
            self._failure = _file(Path(folder), rank, ".failed")
            with _file(Path(folder), rank).open("w+b") as file:
                file.truncate(_LAYOUT.size)
                self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
            self.beat("start", 0)

    def beat(self, phase: Phase, step: int) -> None:
        """Say that this rank has come to `phase` of `step`. Every rank says so at the same places."""
        self._phase, self._step = phase, step
        if self._map is None:
            return
        self._count += 1
        number = PHASES.index(phase)
        _LAYOUT.pack_into(self._map, 0, self._count, self._pid, step, number, self._ticks, self._count)

    def tick(self) -> None:
        """Say that this rank gets on with a long phase. Only one that works may, not one that waits for another."""
        self._ticks += 1
        if self._map is not None:
            _TICKS.pack_into(self._map, _TICKS_AT, self._ticks)

    @contextmanager
    def ticking(self) -> Iterator[None]:
        """Tick by the clock: for work that may take hours and has no place to tick itself. Hides its hangs."""
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(1.0):
                self.tick()

        thread = threading.Thread(target=tick, name="pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def fail(self, error: BaseException) -> None:
        """Leave the exception that ends this rank. The first one counts: what follows while it ends is no news."""
        if self._failure is None or self._failure.exists():
            return
        line = " ".join("".join(traceback.format_exception_only(error)).split())
        text = "".join(traceback.format_exception(error))
        failure = Failure(self._step, self._phase, line, text, time.monotonic())
        self._failure.write_text(json.dumps(asdict(failure)), encoding="utf-8")


def answer_with_stacks(rank: int) -> None:
    """From now on `STACKS_SIGNAL` has this process write its stacks: for a supervisor, or to standard error.

    Processes forked from it answer as well, unless they ignore the signal. faulthandler needs no interpreter lock.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        faulthandler.register(STACKS_SIGNAL, all_threads=True)
        return
    file = os.open(stacks_file(Path(folder), rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)


def read_beat(folder: Path, rank: int) -> Beat | None:
    """The last beat of a rank of this node; None where there is none yet, or the rank is just writing it."""
    try:
        data = _file(folder, rank).read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != _LAYOUT.size:
        return None
    before, pid, step, phase, ticks, count = _LAYOUT.unpack(data)
    if not count or before != count:
        return None
    return Beat(pid, step, PHASES[phase], count, ticks)


def read_failure(folder: Path, rank: int) -> Failure | None:
    """The exception that ended a rank of this node; None where none did, or it could not say so any more."""
    try:
        return Failure(**json.loads(_file(folder, rank, ".failed").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank appends its stacks each time that it is asked for them."""
    return _file(folder, rank, ".stacks")


def _file(folder: Path, rank: int, kind: str = "") -> Path:
    return folder / f"rank-{rank:05d}{kind}"

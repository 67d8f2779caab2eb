"""What each rank is doing, for a supervisor on the same node to see: a few numbers in a file that both map.

A beat is a store to shared memory, so a rank beats at every change of phase, and a stall shows wherever it is: in a
collective, in a data worker, in a write to a disk that does not answer. Without a supervisor beats go nowhere.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

FOLDER_VARIABLE = "TRIPTYCH_HEARTBEATS"
"""Environment variable that names the folder of the heartbeats of a node's ranks."""

Phase = Literal["start", "data", "forward", "backward", "optimizer", "checkpoint", "evaluate", "end"]
PHASES: tuple[str, ...] = get_args(Phase)
# Sequence number before and after: a reader that catches a write in the middle sees two different ones.
_LAYOUT = struct.Struct("<qqqqq")


@dataclass(frozen=True)
class Beat:
    """The last sign of life of a rank."""

    pid: int
    step: int
    """The optimizer step that it is in; 1 is the first."""
    phase: Phase
    count: int
    """Beats so far. Ranks go through the same phases, so the others wait for the one with the fewest."""


class Pulse:
    """A rank's own heartbeat."""

    def __init__(self, rank: int, folder: str | os.PathLike[str] | None = None) -> None:
        folder = folder if folder is not None else os.environ.get(FOLDER_VARIABLE)
        self._count = 0
        self._pid = os.getpid()
        self._map: mmap.mmap | None = None
        if folder:
            with _file(Path(folder), rank).open("w+b") as file:
                file.truncate(_LAYOUT.size)
                self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
            self.beat("start", 0)

    def beat(self, phase: Phase, step: int) -> None:
        """Say that this rank has come to `phase` of `step`."""
        if self._map is None:
            return
        self._count += 1
        _LAYOUT.pack_into(self._map, 0, self._count, self._pid, step, PHASES.index(phase), self._count)


def read_beat(folder: Path, rank: int) -> Beat | None:
    """The last beat of a rank of this node; None where there is none yet, or the rank is just writing it."""
    try:
        data = _file(folder, rank).read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != _LAYOUT.size:
        return None
    before, pid, step, phase, count = _LAYOUT.unpack(data)
    if not count or before != count:
        return None
    return Beat(pid, step, PHASES[phase], count)  # type: ignore[arg-type]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}"

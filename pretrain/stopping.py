"""Stopping on purpose: who may ask for it, and how all ranks come to stop after the same step.

A signal, the deadline before the job's time limit, or a file named STOP in the run directory. Each rank says once a
step what it was asked; the sum over ranks tells every rank who asked, and all of them stop in the same step.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from pretrain.config import Config
from pretrain.deadline import Deadline
from pretrain.heartbeat import FOLDER_VARIABLE

STOP_FILE = "STOP"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_ASKING = (
    *(number.name for number in _SIGNALS),
    "the time limit is near (run.stop_before)",
    f"a file named {STOP_FILE}",
)
_SECONDS_BETWEEN_LOOKS = 1.0


class StopRequest:
    """One rank's side: what it was asked, and what all ranks together were."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self._deadline = Deadline(config.run.stop_before)
        self._file = Path(config.run.dir) / STOP_FILE
        # On a shared file system a look costs a round trip, so one rank looks, and not at every step.
        self._looks_for_file = rank == 0
        self._next_look = 0.0
        self._base = world_size + 1
        self._asked = [False] * len(_ASKING)
        self.reason: str | None = None
        """Who asked, once all ranks have agreed to stop."""

    def catch_signals(self) -> None:
        """Take signals as requests from now on. A second SIGINT ends the process at once."""

        def ask(number: int, frame: Any) -> None:
            index = _SIGNALS.index(signal.Signals(number))
            if number == signal.SIGINT and any(self._asked):
                raise KeyboardInterrupt
            self._asked[index] = True

        for number in _SIGNALS:
            signal.signal(number, ask)

    def told(self) -> float:
        """What this rank was asked, as a number: a digit 0 or 1 for each way of asking, in base world size + 1."""
        if self._deadline.passed():
            self._asked[-2] = True
        if self._looks_for_file and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
            self._asked[-1] = self._asked[-1] or self._file.exists()
        return float(sum(self._base**place for place, asked in enumerate(self._asked) if asked))

    def agree(self, summed: float) -> bool:
        """Whether to stop, given the sum over ranks of what they told; sets `reason`."""
        total = int(summed)
        asked = [name for place, name in enumerate(_ASKING) if total // self._base**place % self._base]
        self.reason = " and ".join(asked) or None
        return total > 0

    def done(self) -> None:
        """After the checkpoint: take the STOP file away, so that the next start goes on, and tell the supervisor."""
        if self._looks_for_file:
            beats = os.environ.get(FOLDER_VARIABLE)
            if beats and self._file.exists():
                Path(beats, STOP_FILE).touch()
            self._file.unlink(missing_ok=True)

"""Bad samples of a run: one line each in `quarantine.jsonl`, and the limits past which the run stops."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from data_pipelines.errors import BadInput
from data_pipelines.index import Quarantined

# A rate means little before this many samples: one bad sample among the first ten is not ten per cent.
_MEANINGFUL = 1000


class QuarantineLog:
    """Appends to a quarantine.jsonl that several ranks share: one write a line, each bad sample once a process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told: set[tuple[str, str | None]] = set()

    def append(self, line: Quarantined) -> None:
        """Add one line, unless this sample has one already."""
        if (line.shard, line.key) in self._told:
            return
        self._told.add((line.shard, line.key))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = (json.dumps(vars(line), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Appends of one write do not mix on a local disk, whichever rank they come from.
            os.write(descriptor, content)
        finally:
            os.close(descriptor)


class BadSampleLimit:
    """Counts the samples of one rank in order. Past a limit `see` raises `BadInput`."""

    def __init__(self, max_rate: float, max_run: int, log: Path) -> None:
        self._max_rate = max_rate
        self._max_run = max_run
        self._log = log
        self._seen = self._bad = self._run = 0

    def see(self, flags: Iterable[bool], last: Quarantined | None) -> None:
        """Count a batch: for each sample whether it is bad; `last` is the line of one of them, for the message."""
        for bad in flags:
            self._seen += 1
            self._bad += bad
            self._run = self._run + 1 if bad else 0
            if self._run > self._max_run:
                self._stop(f"{self._run} bad samples in a row, more than data.max_bad_run {self._max_run}", last)
        if self._bad > self._max_rate * max(self._seen, _MEANINGFUL):
            self._stop(
                f"{self._bad} of {self._seen} samples are bad, more than data.max_bad_rate {self._max_rate:g}", last
            )

    def _stop(self, what: str, last: Quarantined | None) -> None:
        example = f"; for example {last.key} in {last.shard}: {last.reason} ({last.detail})" if last else ""
        raise BadInput(f"{what}{example}; see {self._log}")

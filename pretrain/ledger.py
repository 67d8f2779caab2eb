"""The ledger of a run: which global batch each optimizer step consumed, and what became of it.

A batch is written as its number in the data's order, not as its samples' keys: what it holds is a function of the data
and of settings that each start writes down, and a checksum of the sample ids that the ranks really consumed stands
beside it. Under RUN/ledger/ lie `steps`, 24 bytes for each batch, and `events.jsonl`, a line for each start, roll-back
and decision. Both are only appended to. A start or roll-back at step N opens a new stretch and makes void what earlier
stretches did after step N; nothing is deleted, so that tries that were undone can still be read.

Numpy alone: reading a ledger needs neither torch nor the data.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.atomic import fsync_folder
from data_pipelines.errors import BadInput
from data_pipelines.order import splitmix64

FOLDER, STEPS, EVENTS = "ledger", "steps", "events.jsonl"
FORMAT_VERSION = 1
CHECKSUM_MODULUS = 1 << 32
"""Checksums add up modulo this: over the ranks of a step they are summed as float64, exactly up to 2 million ranks."""

RECORD = np.dtype(
    [
        ("step", "<u4"),
        ("stretch", "<u4"),
        ("batch", "<u8"),
        ("checksum", "<u4"),
        ("outcome", "<u2"),
        ("seal", "<u2"),
    ]
)
"""One batch of one step; `seal` tells a whole record from a torn one."""

# Records whose seals are looked at together.
_AT_ONCE = 1 << 18
_OPENING = ("kind", "step", "batch", "time")

IntArray = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]


class Outcome(IntEnum):
    """What became of a batch."""

    TRAINED = 1
    LOSS_NOT_FINITE = 2
    GRADIENT_NOT_FINITE = 3
    LOSS_SPIKE = 4
    GRADIENT_SPIKE = 5
    PASSED_OVER = 6

    @property
    def words(self) -> str:
        """For people: `trained`, `passed over` or `skipped: ...`."""
        name = self.name.lower().replace("_", " ")
        return name if self in (Outcome.TRAINED, Outcome.PASSED_OVER) else f"skipped: {name}"


def id_checksums(ids: npt.ArrayLike) -> IntArray:
    """Checksums of sets of sample ids (int64 [..., B], over all sources), whatever their order: int64 [...].

    The sum of each id's hash modulo 2**32: the checksums of a batch's parts add up to the batch's.
    """
    words = splitmix64(np.asarray(ids, dtype=np.int64).astype(np.uint64))
    total: npt.NDArray[np.uint64] = words.sum(axis=-1, dtype=np.uint64) % np.uint64(CHECKSUM_MODULUS)
    return np.asarray(total).astype(np.int64)


def _seals(records: Records) -> npt.NDArray[np.uint16]:
    def word(name: str) -> npt.NDArray[np.uint64]:
        return np.asarray(records[name]).astype(np.uint64)

    shift = np.uint64(32)
    mixed = splitmix64(word("checksum") | word("outcome") << shift)
    mixed = splitmix64(mixed ^ word("batch"))
    mixed = splitmix64(mixed ^ (word("step") | word("stretch") << shift))
    return (mixed >> np.uint64(48)).astype(np.uint16)


class _Appended:
    """A file that is only appended to, in one write a line, without a buffer: what a killed process wrote is there.

    A full disk does not end a run: what could not be written is kept, and written before whatever comes next.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._pending = b""

    def write(self, data: bytes) -> None:
        self._pending += data
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._descriptor, self._pending) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def flush(self) -> bool:
        """Put everything on the disk; whether there was room for it."""
        self.write(b"")
        os.fsync(self._descriptor)
        return not self._pending

    def close(self) -> None:
        self.flush()
        os.close(self._descriptor)


class LedgerWriter:
    """Appends to the ledger of a run directory. One process at a time writes: rank 0 of the run.

    Raises:
        BadInput: what is there is not a ledger of this version.
    """

    def __init__(self, run_dir: Path) -> None:
        self._folder = folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._steps, self._events = _Appended(folder / STEPS), _Appended(folder / EVENTS)
        fsync_folder(folder)
        fsync_folder(run_dir)
        _drop_torn_end(folder)
        found = Ledger.read(run_dir)
        # Also beyond those of which a full disk took the records and not the line that opens them.
        opened = max((each.number for each in found.stretches), default=0)
        self.stretch = max(opened, int(found.records["stretch"].max(initial=0)))

    def begin(self, kind: str, step: int, batch: int, **facts: Any) -> None:
        """Open a stretch that goes on from `step` and from `batch`: a `start` of the run, or a `roll_back` in it.

        It is on the disk when this returns, as is all before it, if there is room.
        """
        self.stretch += 1
        self.tell(kind, step=step, batch=batch, **facts)
        self.flush()

    def tell(self, kind: str, **facts: Any) -> None:
        """A line about a decision."""
        line = {"kind": kind, "stretch": self.stretch, "time": time.time(), **facts}
        self._events.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))

    def add(self, step: int, batch: int, checksum: int, outcome: Outcome) -> None:
        """Step `step` consumed, or passed over, this batch."""
        record = np.array([(step, self.stretch, batch, checksum, outcome, 0)], dtype=RECORD)
        record["seal"] = _seals(record)
        self._steps.write(record.tobytes())

    def flush(self) -> bool:
        """Put everything written so far on the disk, so that a checkpoint may rely on it; whether there was room."""
        # Both, whatever the first one says; records last, whose stretch the events open.
        return all([self._events.flush(), self._steps.flush()])

    def close(self) -> None:
        """Flush and close."""
        self._events.close()
        self._steps.close()


@dataclass(frozen=True)
class Stretch:
    """Steps that were done one after the other, from a start of the run or from a roll-back on."""

    number: int
    kind: str
    """`start` or `roll_back`."""
    step: int
    """The step that it went on from."""
    batch: int
    time: float
    facts: dict[str, Any] = field(repr=False)
    """Everything else in its line: of a start `world_size` and `data`."""


class Ledger:
    """A run's ledger as it was when it was read. `records` are all that are whole, in the order of writing."""

    def __init__(self, stretches: list[Stretch], decisions: list[dict[str, Any]], records: Records, damaged: int):
        self.stretches = stretches
        self.decisions = decisions
        self.records = records
        self.damaged = damaged
        """Records that are not whole, before the last whole one."""

    @classmethod
    def read(cls, run_dir: Path) -> Ledger:
        """Read a ledger, of a run that goes on as well as of one that has ended.

        Raises:
            BadInput: there is none, or it is not one of this version.
        """
        folder = run_dir / FOLDER
        if not run_dir.is_dir():
            raise BadInput(f"{run_dir}: no such run directory")
        if not (folder / EVENTS).is_file() or not (folder / STEPS).is_file():
            raise BadInput(f"{run_dir}: no ledger in it (no {FOLDER}/{STEPS} and {FOLDER}/{EVENTS})")
        stretches: list[Stretch] = []
        decisions: list[dict[str, Any]] = []
        for event in _events(folder / EVENTS):
            if event["kind"] in ("start", "roll_back"):
                if event.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
                    raise BadInput(f"{folder}: of format version {event['format_version']}, not {FORMAT_VERSION}")
                number, kind, step, batch, when = (event[name] for name in ("stretch", *_OPENING))
                facts = {name: value for name, value in event.items() if name not in ("stretch", *_OPENING)}
                stretches.append(Stretch(number, kind, step, batch, when, facts))
            if event["kind"] != "start":
                decisions.append(event)
        records, damaged = _records(folder / STEPS)
        return cls(stretches, decisions, records, damaged)

    @cached_property
    def _holds(self) -> npt.NDArray[np.bool_]:
        """Which records no later stretch has undone."""
        holds = np.zeros(len(self.records), dtype=bool)
        last = np.iinfo(np.int64).max
        for stretch in reversed(self.stretches):
            mine = self.records["stretch"] == stretch.number
            holds |= mine & (self.records["step"] <= last)
            last = min(last, stretch.step)
        return holds

    @cached_property
    def effective(self) -> Records:
        """The records that count, in the order of steps and batches."""
        found = self.records[self._holds]
        return found[np.lexsort((found["batch"], found["step"]))]

    @property
    def undone(self) -> Records:
        """The records of tries that a later start or roll-back undid, in the order of writing."""
        return self.records[~self._holds]

    def of_step(self, step: int) -> tuple[Records, Records]:
        """The records of a step: those that count, and those that were undone."""
        mine = self.records["step"] == step
        return self.records[mine & self._holds], self.records[mine & ~self._holds]

    def stretch(self, number: int) -> Stretch:
        """A stretch by its number. Raises `BadInput` where its line is gone."""
        for stretch in self.stretches:
            if stretch.number == number:
                return stretch
        raise BadInput(f"the ledger has records of stretch {number} and no line that opens it: {EVENTS} is damaged")

    def start_of(self, number: int) -> Stretch:
        """The start that a stretch belongs to: itself, or the one before the roll-back that opened it."""
        self.stretch(number)
        return [each for each in self.stretches if each.number <= number and each.kind == "start"][-1]


def _drop_torn_end(folder: Path) -> None:
    """Cut off what a crash left half-written at the end of either file."""
    path = folder / STEPS
    whole = np.flatnonzero(_whole(_raw_records(path)))
    os.truncate(path, (int(whole[-1]) + 1) * RECORD.itemsize if len(whole) else 0)
    path = folder / EVENTS
    lines = path.read_bytes().splitlines(keepends=True)
    while lines and _parse_event(lines[-1]) is None:
        lines.pop()
    os.truncate(path, sum(map(len, lines)))


def _raw_records(path: Path) -> Records:
    return np.fromfile(path, dtype=RECORD, count=path.stat().st_size // RECORD.itemsize)


def _whole(records: Records) -> npt.NDArray[np.bool_]:
    whole = records["stretch"] > 0
    for first in range(0, len(records), _AT_ONCE):
        part = records[first : first + _AT_ONCE]
        whole[first : first + _AT_ONCE] &= part["seal"] == _seals(part)
    return np.asarray(whole)


def _records(path: Path) -> tuple[Records, int]:
    """The whole records, and how many before the last of them are not whole."""
    records = _raw_records(path)
    whole = _whole(records)
    last = int(np.flatnonzero(whole)[-1]) + 1 if whole.any() else 0
    return records[whole], last - int(np.count_nonzero(whole))


def _parse_event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"kind", "stretch", "time"} <= event.keys() else None


def _events(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        event = _parse_event(line)
        if event is not None:
            yield event
        elif number < len(lines) - 1:
            raise BadInput(f"{path}: line {number + 1} does not parse; the file is damaged")

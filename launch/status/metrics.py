"""metrics.jsonl as something to look at: the whole run thinly, its end in full, in time that does not grow with it.

A run of a million steps has half a gigabyte of it. So a large file is read at places spread evenly over it, and at its
end; after that only what is appended. A resume or a roll-back writes the file anew, which shows as another inode.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

Record = dict[str, Any]

FILE = "metrics.jsonl"
_READ_WHOLE_BYTES = 8 << 20
_TAIL_BYTES = 1 << 20
# Longer than any line: a place in the file is followed by a whole line within this.
_PIECE_BYTES = 4096


class Metrics:
    """The lines of a metrics.jsonl that are worth keeping, brought up to date by `poll`."""

    def __init__(self, path: Path, places: int = 512, recent: int = 512) -> None:
        self._path, self._places, self._recent = path, places, recent
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._torn = b""
        self.overview: list[Record] = []
        """Lines spread over the whole run, in order; between `places` and twice as many where there are so many."""
        self.recent: list[Record] = []
        """The last `recent` lines, in order."""

    @property
    def last(self) -> Record | None:
        """The last line."""
        return self.recent[-1] if self.recent else None

    def poll(self) -> bool:
        """Read what has come since the last call; whether there was anything."""
        try:
            with self._path.open("rb") as file:
                about = os.fstat(file.fileno())
                same = self._file == (about.st_dev, about.st_ino) and about.st_size >= self._offset
                if same and about.st_size - self._offset <= _READ_WHOLE_BYTES:
                    return self._read_on(file)
                self._file = (about.st_dev, about.st_ino)
                self.overview, self.recent, self._torn, self._offset = [], [], b"", 0
                if about.st_size > _READ_WHOLE_BYTES:
                    self._offset = about.st_size - _TAIL_BYTES
                    self.overview = list(self._spread_out(file, self._offset))
                    file.seek(self._offset)
                    # The first line of the tail began before it.
                    self._offset += len(file.readline())
                self._read_on(file)
                return True
        except OSError:
            had = bool(self.recent)
            self.overview, self.recent, self._file = [], [], None
            return had

    def _read_on(self, file: BinaryIO) -> bool:
        file.seek(self._offset)
        data = file.read()
        self._offset += len(data)
        *lines, self._torn = (self._torn + data).split(b"\n")
        records = list(_parse(lines))
        if not records:
            return False
        first = int(records[0]["step"])
        # Without a new file a step comes again only where a process died between two writes.
        for kept in (self.overview, self.recent):
            while kept and int(kept[-1]["step"]) >= first:
                kept.pop()
        self.recent = [*self.recent, *records][-self._recent :]
        self.overview += records
        if len(self.overview) > 2 * self._places:
            self.overview = thinned(self.overview, self._places)
        return True

    def _spread_out(self, file: BinaryIO, end: int) -> Iterator[Record]:
        step = -1
        for place in range(self._places):
            file.seek(end * place // self._places)
            piece = file.read(_PIECE_BYTES).split(b"\n")
            found = next(_parse(piece[:-1] if place == 0 else piece[1:-1]), None)
            if found is not None and int(found["step"]) > step:
                step = int(found["step"])
                yield found


def every_line(path: Path) -> Iterator[Record]:
    """All lines of a metrics.jsonl in the order of writing, as they are read; none where there is no file."""
    try:
        with path.open("rb") as file:
            yield from _parse(file)
    except OSError:
        return


def thinned(records: list[Record], wanted: int) -> list[Record]:
    """`wanted` of the records, evenly by their steps, with the first and the last; all where there are fewer."""
    if len(records) <= wanted or wanted < 2:
        return records
    first, last = int(records[0]["step"]), int(records[-1]["step"])
    kept, due = [records[0]], 1
    for record in records[1:-1]:
        if (int(record["step"]) - first) * (wanted - 1) >= due * (last - first):
            kept.append(record)
            due = (int(record["step"]) - first) * (wanted - 1) // max(1, last - first) + 1
    return [*kept, records[-1]]


def values(records: Iterable[Record], name: str) -> list[float | None]:
    """One field of each record; None where it is absent or not finite."""
    return [number(record.get(name)) for record in records]


def number(value: Any) -> float | None:
    """A finite number as float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _parse(lines: Iterable[bytes]) -> Iterator[Record]:
    for line in lines:
        try:
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record["step"], int):
                yield record
        except (ValueError, KeyError):
            # Torn by a crash, or in the middle of being written.
            continue

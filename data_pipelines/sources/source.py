"""What every source of raw samples gives: rows to plan with, and a way to turn one row into a sample.

A source is planned once, in one process, and read by many: it travels to the workers by pickle, and `read` is a pure
function of the row and of the files that the row names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample


@dataclass(frozen=True)
class Row:
    """One sample to be: its key, its text, and references to its image and sound that only the source understands.

    `number` is the row's place in the source, from 1. `line` is its line in a text file, None where there are no lines.
    """

    number: int
    key: str
    image: str | None = None
    text: str | None = None
    audio: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    line: int | None = None


class RowFault(Exception):
    """A row that gives no sample: `reason` is one word to count by, `detail` is for people."""

    def __init__(
        self, number: int, line: int | None, key: str | None, member: str | None, reason: str, detail: str
    ) -> None:
        super().__init__(number, line, key, member, reason, detail)
        self.number, self.line, self.key = number, line, key
        self.member, self.reason, self.detail = member, reason, detail

    @classmethod
    def of(cls, row: Row, member: str | None, reason: str, detail: str) -> RowFault:
        """A fault of a row that has a key already."""
        return cls(row.number, row.line, row.key, member, reason, detail)

    @property
    def where(self) -> str:
        """`row 17 (line 18, id 'a-17')`, as far as it is known."""
        known = [f"line {self.line}"] if self.line is not None else []
        known += [f"id {self.key!r}"] if self.key is not None else []
        return f"row {self.number}" + (f" ({', '.join(known)})" if known else "")

    def as_bad_input(self, source: str) -> BadInput:
        """The same as the one line that ends a build."""
        return BadInput(f"{source}: {self.where}: {self.detail}")


@dataclass(frozen=True)
class Note:
    """Something that the user should see once, but that is no fault."""

    message: str


@dataclass(frozen=True)
class Drop:
    """A row that was left out because the user asked for it: counted by `reason`, and no fault."""

    reason: str


@dataclass(frozen=True)
class Change:
    """A row that was changed because the user asked for it: counted by `what`; the row itself comes too."""

    what: str


Item = Row | RowFault | Note | Drop | Change


class Source(Protocol):
    """Raw input of one kind. Implementations are frozen dataclasses, so that workers can be sent one."""

    @property
    def label(self) -> str:
        """How messages call it: the manifest's path, or the embedded source's name."""

    @property
    def default_name(self) -> str:
        """Name of the dataset when none is given."""

    @property
    def shard_prefix(self) -> str:
        """How the shards' file names begin when no name is given."""

    def identity(self) -> dict[str, Any]:
        """What made the rows, as JSON, for build.json. Nothing in it depends on where files lie."""

    def rows(self) -> Iterator[Item]:
        """Every row that the split keeps, in order, and the faults that show without opening a member's file.

        A row's text is the sample's text: `read` does not change it.

        Raises `BadInput` for what is wrong with the source as a whole.
        """

    def read(self, row: Row) -> Sample:
        """The sample of a row. Raises `RowFault` when there is none, `BadInput` when nothing can be read at all."""

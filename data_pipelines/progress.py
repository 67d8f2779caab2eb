"""How far a long piece of work is: a bar on a terminal, a plain line now and then anywhere else.

Everything goes to standard error, which leaves standard output to what a program may want to read.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from data_pipelines.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 5.0


def counted(number: int, what: str) -> str:
    """A number of things, for people: `1 sample`, `6,000 samples`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


class Progress:
    """Counts `unit`s up to a total that `start` sets. A context manager; with `quiet` it says nothing at all."""

    def __init__(self, title: str, unit: str, quiet: bool = False) -> None:
        self.title, self.unit, self.quiet = title, unit, quiet
        self._bar: Bar | None = None
        self._total = self._done = 0
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int, done: int = 0) -> None:
        """Set the total, 0 where it is not known, and what was done before."""
        self._total, self._done, self._last_line = total, done, time.monotonic()
        if self.quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._bar.add_task(self.title, total=total or None, completed=done)
        self._bar.start()

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            of_total = f" of {self._total}" if self._total else ""
            self.say(f"{self.title}: {self._done}{of_total} {self.unit}")

    def say(self, message: str) -> None:
        """A line of its own, or several."""
        if self.quiet:
            return
        message = "\n".join(map(printable, message.split("\n")))
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=sys.stderr, flush=True)

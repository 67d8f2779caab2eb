"""Where a run is in the data, which is not where it is in its steps once batches were passed over.

A global batch is a number: its place in the data's order. Every step takes the next one that is not passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class Cursor:
    """The next batch number and the numbers to leave out; the same on every rank."""

    def __init__(self) -> None:
        self.batch = 0
        """Batches before this one are consumed or passed over."""
        self.passed_over: set[int] = set()
        """Numbers that no step takes."""

    def ranges(self, count: int) -> Iterator[range]:
        """The next `count` batches that are not passed over, as runs of consecutive numbers, in order."""
        first = self.batch
        for gap in sorted(number for number in self.passed_over if number >= self.batch):
            run = range(first, min(gap, first + count))
            if run:
                yield run
            count -= len(run)
            first = gap + 1
        if count > 0:
            yield range(first, first + count)

    def consume(self, number: int) -> list[int]:
        """Batch `number` is trained, or skipped: go on behind it. Returns the numbers that were passed over for it."""
        left = list(range(self.batch, number))
        assert self.passed_over.issuperset(left), (self.batch, number)
        self.batch = number + 1
        return left

    def go_back(self, batch: int, pass_over: Iterable[int]) -> None:
        """Go on from `batch` again, and pass over further numbers."""
        self.batch = batch
        self.passed_over.update(pass_over)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"batch": self.batch, "passed_over": sorted(self.passed_over)}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; where an older one does not say, batches were steps."""
        self.batch = int(state["batch"] if "batch" in state else state["step"])
        self.passed_over = {int(number) for number in state.get("passed_over", ())}

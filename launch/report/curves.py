"""The columns of metrics.jsonl, and curves of them that stay small and true however long the run is.

A curve of a million steps is cut into equal stretches of steps; each keeps its mean, its smallest and its largest
value, so that a single spike still shows.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from launch.status.metrics import every_line, number

Floats = npt.NDArray[np.float64]

MAX_POINTS = 500
FIELDS = (
    "time",
    "loss",
    "loss_text",
    "loss_align",
    "loss_image",
    "loss_audio",
    "lr",
    "grad_norm",
    "logit_scale",
    "samples_per_second",
    "tokens_per_second",
    "data_wait_fraction",
    "step_seconds",
    "rss_bytes",
    "samples_seen",
    "epoch",
)


@dataclass(frozen=True)
class Curve:
    """Values over steps, in order of the steps; no point without a value."""

    steps: Floats
    """Of a point that stands for several steps, the last of them."""
    mean: Floats
    low: Floats
    high: Floats
    num_values: int
    """Finite values behind it."""

    @property
    def thinned(self) -> bool:
        """Whether a point stands for more than one step."""
        return self.num_values > len(self.steps)

    @cached_property
    def smooth(self) -> Floats:
        """The mean of the fortieth of the points around each of them."""
        return centred_mean(self.mean, len(self.mean) // 80)


class Table:
    """What every step of a run said, one row a step, in order; NaN where it said nothing."""

    def __init__(self, steps: Floats, columns: dict[str, Floats]) -> None:
        self.steps, self.columns = steps, columns

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a metrics.jsonl; a step that was done again counts as it was done last."""
        found = {name: array("d") for name in ("step", *FIELDS)}
        for record in every_line(path):
            for name, column in found.items():
                value = number(record.get(name))
                column.append(np.nan if value is None else value)
        columns = {name: np.frombuffer(column) if column else np.empty(0) for name, column in found.items()}
        steps = columns.pop("step")
        if len(steps) > 1 and not (np.diff(steps) > 0).all():
            _, last = np.unique(steps[::-1], return_index=True)
            rows = len(steps) - 1 - last
            steps, columns = steps[rows], {name: column[rows] for name, column in columns.items()}
        return cls(steps, columns)

    def __len__(self) -> int:
        return len(self.steps)

    def column(self, name: str) -> Floats:
        """A column; NaN where a step did not say it."""
        return self.columns[name]

    def last(self, name: str) -> float | None:
        """The last value of a column."""
        known = self.columns[name][~np.isnan(self.columns[name])]
        return float(known[-1]) if len(known) else None

    def curve(self, name: str, points: int = MAX_POINTS) -> Curve | None:
        """A column as a curve of at most `points`; None where it has no finite value."""
        return curve(self.steps, self.columns[name], points)

    def times(self, starts: Sequence[tuple[float, int]]) -> Floats:
        """When each step was done, in seconds since 1970; empty where that is not known.

        Args:
            starts: time and step of each start, oldest first: for runs whose metrics have no times, each step then
                counts as done its own and its predecessors' seconds after its start.
        """
        times = self.columns["time"]
        if len(times) and not np.isnan(times).any():
            return times
        if not len(times) or not starts:
            return np.empty(0)
        guessed = np.full(len(times), np.nan)
        seconds = np.nan_to_num(self.columns["step_seconds"])
        for moment, step in starts:
            after = self.steps > step
            guessed[after] = moment + np.cumsum(seconds[after])
        return (
            np.maximum.accumulate(np.where(np.isnan(times), guessed, times)) if not np.isnan(guessed).any() else times
        )


def curve(steps: Floats, values: Floats, points: int = MAX_POINTS) -> Curve | None:
    """A curve of at most `points` points through the finite values; None where there is none."""
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not len(steps):
        return None
    if len(steps) <= points:
        return Curve(steps, values, values, values, len(values))
    span = steps[-1] - steps[0]
    place = np.minimum(((steps - steps[0]) * points / (span or 1)).astype(np.int64), points - 1)
    first = np.flatnonzero(np.diff(place, prepend=-1))
    counts = np.diff(first, append=len(steps))
    return Curve(
        steps=steps[first + counts - 1],
        mean=np.add.reduceat(values, first) / counts,
        low=np.minimum.reduceat(values, first),
        high=np.maximum.reduceat(values, first),
        num_values=len(values),
    )


def centred_mean(values: Floats, reach: int) -> Floats:
    """Mean of each value with `reach` others on both sides; near the ends with as many as there are.

    At the beginning as many on both sides, or the steep start of a loss would lean inwards; at the end as many as there
    are on either, or the last value would be as restless as the curve itself.
    """
    total = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    before = np.minimum(reach, places)
    after = np.minimum(before, len(values) - 1 - places)
    mean: Floats = (total[places + after + 1] - total[places - before]) / (before + after + 1)
    return mean

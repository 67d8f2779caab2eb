"""How far a step's number lies above what came before, in robust standard deviations.

The scale is the median of the last accepted steps and their median absolute deviation (times 1.4826, so that it is the
standard deviation of Gaussian noise; Leys et al., 2013): a few outliers within the window move neither. Only a rise
counts. A curve that lies flat has a deviation of nearly nothing, so the scale has a floor.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

_TO_SIGMA = 1.4826
# A loss that moves by less than a hundredth of itself, and a norm by less than a tenth, are as usual as can be.
_LOSS_FLOOR, _NORM_FLOOR = 0.01, 0.1
_TINY = 1e-12


class Recent:
    """The last `window` numbers of accepted steps, and how unusual a new one is among them.

    Args:
        kind: `loss` is taken as it is. A `norm` is taken by its logarithm: norms of gradients are spread over orders of
            magnitude, and in the recorded runs of the demo their plain z-score came to 14 where nothing was wrong.
        window: most numbers kept. Half as many must be there before there is a score.
    """

    def __init__(self, kind: Literal["loss", "norm"], window: int) -> None:
        self._logarithm = kind == "norm"
        self._enough = max(2, window // 2)
        self._values: deque[float] = deque(maxlen=window)

    def score(self, value: float) -> float | None:
        """Robust z-score of a finite number, at least 0 (a fall is no news); None before there is enough history."""
        if len(self._values) < self._enough:
            return None
        median = _median(self._values)
        spread = _TO_SIGMA * _median([abs(each - median) for each in self._values])
        floor = _NORM_FLOOR if self._logarithm else _LOSS_FLOOR * abs(median)
        return max(0.0, (self._scaled(value) - median) / max(spread, floor, _TINY))

    def add(self, value: float) -> None:
        """Take the number of an accepted step into the history."""
        self._values.append(self._scaled(value))

    def typical(self) -> float:
        """The median of the history, in the unit of its numbers."""
        median = _median(self._values)
        return math.exp(median) if self._logarithm else median

    def state(self) -> list[float]:
        """The history, oldest first; exact as JSON."""
        return list(self._values)

    def resume(self, state: Iterable[float]) -> None:
        """Go on from `state`, of which as much is kept as the window holds."""
        self._values.clear()
        self._values.extend(float(value) for value in state)

    def _scaled(self, value: float) -> float:
        return math.log(max(value, _TINY)) if self._logarithm else value


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

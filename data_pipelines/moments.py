"""Mean and standard deviation of values that come in parts.

Each part is summed on its own and the parts are merged pairwise without loss of precision (Welford, 1962; Chan, Golub
and LeVeque, 1979), so a billion values with a large mean come out as well as ten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Moments of K columns: `count` values a column, `mean` float64 [K], `squares` float64 [K].

    `squares` is the sum of squared distances from the mean.
    """

    count: int
    mean: FloatArray
    squares: FloatArray

    @classmethod
    def none(cls, columns: int) -> Moments:
        """The moments of no values."""
        return cls(0, np.zeros(columns), np.zeros(columns))

    @classmethod
    def of(cls, values: npt.NDArray[np.generic]) -> Moments:
        """The moments of values [N, K], summed in float64."""
        if not len(values):
            return cls.none(values.shape[1])
        wide = values.astype(np.float64)
        mean = wide.mean(axis=0)
        return cls(len(wide), mean, np.square(wide - mean).sum(axis=0))

    def merged(self, other: Moments) -> Moments:
        """The moments of both parts together."""
        count = self.count + other.count
        if not count:
            return self
        step = other.mean - self.mean
        share = other.count / count
        return Moments(count, self.mean + step * share, self.squares + other.squares + step**2 * self.count * share)

    def pooled(self) -> Moments:
        """All columns as one: K = 1."""
        columns = len(self.mean)
        mean = self.mean.mean()
        squares = self.squares.sum() + self.count * np.square(self.mean - mean).sum()
        return Moments(self.count * columns, np.array([mean]), np.array([squares]))

    @property
    def std(self) -> FloatArray:
        """Standard deviation (of the whole, not of a sample of it) of each column, float64 [K]."""
        return np.sqrt(self.squares / max(1, self.count))

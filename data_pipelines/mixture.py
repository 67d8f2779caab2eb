"""Which source comes when: a pure function of (weights, position).

The endless sequence is cut into equal blocks, and every block holds the same number of samples of each source: the
shares by largest remainder. Within a block each source is spread as evenly as its count allows, so that a batch much
smaller than a block has nearly the right mixture too. Each source counts its own positions, and with them its own
epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

DEFAULT_BLOCK = 4096


def block_counts(weights: Sequence[float], block: int) -> IntArray:
    """Samples of each source in a block of `block`: int64, by largest remainder, at least one each.

    Raises ValueError for weights that are not positive and finite, and for more sources than places.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if shares.ndim != 1 or not shares.size or not np.isfinite(shares).all() or (shares <= 0).any():
        raise ValueError("weights must be positive numbers, one a source")
    if shares.size > block:
        raise ValueError(f"{shares.size} sources do not fit into a block of {block}")
    exact = shares / shares.sum() * block
    counts: IntArray = np.floor(exact).astype(np.int64)
    rest = block - int(counts.sum())
    # Equal remainders go to the earlier source.
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    while (counts == 0).any():
        counts[int(np.argmin(counts))] += 1
        counts[int(np.argmax(counts))] -= 1
    return counts


class Mixture:
    """An endless interleaving of sources. With one source it is the identity.

    `counts` (int64, one a source) is the block that repeats.
    """

    def __init__(self, weights: Sequence[float], block: int = DEFAULT_BLOCK) -> None:
        block = 1 if len(weights) == 1 else block
        self.counts = block_counts(weights, block)
        self.block = block
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        nth: IntArray = np.concatenate([np.arange(count, dtype=np.int64) for count in self.counts])
        # The k-th of c samples belongs at (k + 1/2) / c of the block; cross-multiplied places stay exact integers.
        middle = (2 * nth + 1) * (np.int64(1) << 40) // self.counts[sources]
        line = np.lexsort((sources, middle))
        self._source: IntArray = sources[line]
        self._nth: IntArray = nth[line]
        # Samples of each source before each place of the block: [block + 1, sources].
        self._before: IntArray = np.zeros((block + 1, len(self.counts)), dtype=np.int64)
        self._before[1:] = np.cumsum(self._source[:, None] == np.arange(len(self.counts)), axis=0)

    def at(self, positions: npt.ArrayLike) -> tuple[IntArray, IntArray]:
        """(source, position within that source) at positions 0, 1, 2...: two int64 arrays of the same shape."""
        block, place = np.divmod(np.asarray(positions, dtype=np.int64), self.block)
        source = self._source[place]
        return source, block * self.counts[source] + self._nth[place]

    def consumed(self, position: int) -> IntArray:
        """Samples that each source has given before `position`: int64, one a source."""
        block, place = divmod(position, self.block)
        consumed: IntArray = block * self.counts + self._before[place]
        return consumed

"""Which source comes when: a pure function of (weights, position).

The endless sequence is cut into equal blocks, and every block holds the same number of samples of each source: the
shares by largest remainder. Within a block each source is spread as evenly as its count allows, so that a batch much
smaller than a block has nearly the right mixture too. Each source counts its own positions, and with them its own
epochs.

A mixture may change at the end of a block: `MixtureHistory` is the mixtures that a run had, one after the other, as one
function of the position. A source goes on counting where it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

DEFAULT_BLOCK = 4096
# A checkpoint may come from a stranger, and a block is laid out in memory.
_MOST_IN_BLOCK = 1 << 20


def block_counts(weights: Sequence[float], block: int) -> IntArray:
    """Samples of each source in a block of `block`: int64, by largest remainder, at least one each.

    Raises ValueError for weights that are not positive and finite, and for more sources than places.
    """
    shares = np.asarray(weights, dtype=np.float64)
    # Of finite weights the sum may be infinite, and then no source has a share.
    if shares.ndim != 1 or not shares.size or not np.isfinite(sum(shares.tolist())) or (shares <= 0).any():
        raise ValueError("weights must be positive numbers with a sum, one a source")
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


def source_weights(
    sizes: Sequence[int],
    weights: Sequence[float | None],
    epochs: Sequence[float | None],
    temperature: float | None = None,
) -> list[float]:
    """Shares of the sources, one a source, from whichever way they were given.

    Args:
        sizes: samples in each source.
        weights: relative shares of samples; None stands for 1.
        epochs: or how often each source is gone through while one with 1 epoch is gone through once.
        temperature: or the exponent's inverse of shares that follow size ** (1 / temperature): 1 takes every sample
            equally often, infinity every source (mT5, Xue et al., 2021).

    Raises ValueError when more than one way is used, and for numbers that are not positive.
    """
    by_weight, by_epochs = any(w is not None for w in weights), any(e is not None for e in epochs)
    if by_weight + by_epochs + (temperature is not None) > 1:
        raise ValueError("use weights, epochs or a temperature for the mixture, not two of them")
    if temperature is not None:
        if not temperature > 0:
            raise ValueError("the temperature must be positive")
        # Relative to the largest, so that no power overflows; rounded, because machines differ in a power's last bit.
        return [float(f"{(size / max(sizes)) ** (1 / temperature):.12g}") for size in sizes]
    if by_epochs:
        if None in epochs:
            raise ValueError("give the epochs of every source, or of none")
        return [size * float(turns) for size, turns in zip(sizes, epochs, strict=True) if turns is not None]
    return [1.0 if weight is None else float(weight) for weight in weights]


class Mixture:
    """An endless interleaving of sources. With one source it is the identity.

    `counts` (int64, one a source) is the block that repeats.
    """

    def __init__(self, weights: Sequence[float], block: int = DEFAULT_BLOCK) -> None:
        self._lay_out(block_counts(weights, 1 if len(weights) == 1 else block))

    @classmethod
    def of_counts(cls, counts: Sequence[int]) -> Mixture:
        """The mixture whose block has exactly these counts. Raises ValueError unless all are positive."""
        made = cls.__new__(cls)
        given: IntArray = np.asarray(counts, dtype=np.int64)
        if given.ndim != 1 or not given.size or (given < 1).any():
            raise ValueError("counts must be positive whole numbers, one a source")
        if given.max() > _MOST_IN_BLOCK or given.sum() > _MOST_IN_BLOCK:
            raise ValueError(f"a block of more than {_MOST_IN_BLOCK} samples")
        made._lay_out(given)
        return made

    def _lay_out(self, counts: IntArray) -> None:
        self.counts = counts
        self.block = block = int(counts.sum())
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


class MixtureHistory:
    """Mixtures one after the other: a function of the position, like each of them.

    `changes` are the earlier ones as (position where it ended, counts), in order; every end but the last mixture's lies
    at a block's end. A later mixture has the sources of the one before it first, and may add some.
    Raises ValueError for changes that do not fit together.
    """

    def __init__(self, mixture: Mixture, changes: Sequence[tuple[int, Sequence[int]]] = ()) -> None:
        self.mixture = mixture
        self.changes = [(int(end), [int(count) for count in counts]) for end, counts in changes]
        self._mixtures = [*(Mixture.of_counts(counts) for _, counts in self.changes), mixture]
        self._starts: IntArray = np.array([0, *(end for end, _ in self.changes)], dtype=np.int64)
        num_sources = len(mixture.counts)
        # What each source has given where each mixture begins: [mixtures, sources].
        self._given: IntArray = np.zeros((len(self._mixtures), num_sources), dtype=np.int64)
        for number, (before, after) in enumerate(zip(self._mixtures, self._mixtures[1:], strict=False)):
            length = int(self._starts[number + 1] - self._starts[number])
            if length <= 0 or length % before.block or len(after.counts) < len(before.counts):
                raise ValueError(f"a mixture cannot change at position {int(self._starts[number + 1])}")
            self._given[number + 1] = self._given[number]
            self._given[number + 1, : len(before.counts)] += before.consumed(length)

    def at(self, positions: npt.ArrayLike) -> tuple[IntArray, IntArray]:
        """(source, position within that source) at positions 0, 1, 2...: two int64 arrays of the same shape."""
        wanted: IntArray = np.asarray(positions, dtype=np.int64)
        if len(self._mixtures) == 1:
            return self.mixture.at(wanted)
        source, within = np.empty_like(wanted), np.empty_like(wanted)
        number = np.searchsorted(self._starts, wanted, side="right") - 1
        for one in np.unique(number).tolist():
            here = number == one
            source[here], nth = self._mixtures[one].at(wanted[here] - self._starts[one])
            within[here] = nth + self._given[one][source[here]]
        return source, within

    def consumed(self, position: int) -> IntArray:
        """Samples that each source has given before `position`: int64, one a source."""
        number = max(0, int(np.searchsorted(self._starts, position, side="left")) - 1)
        mixture = self._mixtures[number]
        consumed: IntArray = self._given[number].copy()
        consumed[: len(mixture.counts)] += mixture.consumed(position - int(self._starts[number]))
        return consumed

    def changed(self, mixture: Mixture, position: int) -> MixtureHistory:
        """This history with another mixture from the first end of a block at or after `position`."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        block, start = self._mixtures[number].block, int(self._starts[number])
        end = start - (start - position) // block * block
        earlier = self.changes[:number]
        return MixtureHistory(
            mixture, [*earlier, (end, self._mixtures[number].counts.tolist())] if end > start else earlier
        )

"""Classification metrics from scores of samples against classes.

A tie for the first place is a mistake, and so is NaN: guessing in the sample's favour would let a collapsed encoder
score.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def predictions(scores: npt.ArrayLike) -> Ints:
    """The class with the highest score, -1 where that is not one class (a tie, or a NaN in the row).

    Args:
        scores: float [N, C].

    Returns:
        int64 [N].
    """
    values = np.asarray(scores, dtype=np.float64)
    best = values.max(axis=1, keepdims=True)
    winner = values.argmax(axis=1)
    return np.where((values == best).sum(axis=1) == 1, winner, -1).astype(np.int64)


def top1(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float | None:
    """Share of the samples whose highest score is that of their label; None without samples.

    Args:
        scores: float [N, C].
        labels: int [N], 0..C-1.
    """
    truth = np.asarray(labels)
    return float((predictions(scores) == truth).mean()) if truth.size else None


def per_class_top1(scores: npt.ArrayLike, labels: npt.ArrayLike) -> list[float | None]:
    """`top1` of each class's own samples, in the order of the classes; None for a class without samples."""
    values, truth = np.asarray(scores), np.asarray(labels)
    return [top1(values[truth == c], truth[truth == c]) for c in range(values.shape[1])]


def confusion(scores: npt.ArrayLike, labels: npt.ArrayLike) -> Ints:
    """Counts of (true class, predicted class); the last column counts samples without a single best class.

    Returns:
        int64 [C, C + 1]; its sum is the number of samples.
    """
    values, truth = np.asarray(scores), np.asarray(labels, dtype=np.int64)
    classes = values.shape[1]
    guess = predictions(values)
    table = np.zeros((classes, classes + 1), dtype=np.int64)
    np.add.at(table, (truth, np.where(guess < 0, classes, guess)), 1)
    return table

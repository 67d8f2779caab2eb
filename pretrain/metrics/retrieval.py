"""Retrieval metrics from a similarity matrix, for any pair of modalities and any direction.

A query may have several right answers (COCO has five captions a picture), so what is right is a boolean matrix and the
rank of a query is that of its best right answer, as in the usual image-text retrieval protocol. Ties and NaN count
against the model: a collapsed encoder, which gives every candidate the same similarity, must not look perfect.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

# Queries scored at a time: a block of similarities with 100,000 candidates stays under a gigabyte.
BLOCK = 1024


def ranks(similarity: npt.ArrayLike, positive: npt.ArrayLike) -> Ints:
    """Rank of each query's best right answer, 1 = nothing wrong is as similar.

    Args:
        similarity: float [Q, C]; NaN counts as the worst value for a right answer and as the best for a wrong one.
        positive: bool [Q, C]; True where candidate c is a right answer to query q. Every query needs one.

    Returns:
        int64 [Q], 1 + the number of wrong candidates that are at least as similar.

    Raises:
        ValueError: shapes differ, or a query has no right answer.
    """
    scores = np.asarray(similarity, dtype=np.float64)
    right = np.asarray(positive, dtype=np.bool_)
    if scores.ndim != 2 or scores.shape != right.shape:
        raise ValueError(f"similarity {scores.shape} and positive {right.shape} must be the same [queries, candidates]")
    if not right.any(axis=1).all():
        raise ValueError("a query has no right answer among the candidates")
    unknown = np.isnan(scores)
    best = np.where(right & ~unknown, scores, -np.inf).max(axis=1, initial=-np.inf)
    wrong = np.where(unknown, np.inf, scores)
    return 1 + ((wrong >= best[:, None]) & ~right).sum(axis=1, dtype=np.int64)


def pair_ranks(query: npt.ArrayLike, candidate: npt.ArrayLike, of_query: Ints, of_candidate: Ints) -> Ints:
    """Rank of each query's best right answer by the dot product, a block of queries at a time.

    Args:
        query: float [Q, E]; candidate: float [C, E].
        of_query, of_candidate: int64 [P], the pairs that belong together, as rows of `query` and of `candidate`.

    Returns:
        int64 [Q].
    """
    left, right = np.asarray(query), np.asarray(candidate)
    result = np.zeros(len(left), dtype=np.int64)
    for start in range(0, len(left), BLOCK):
        block = slice(start, min(start + BLOCK, len(left)))
        pairs = (of_query >= block.start) & (of_query < block.stop)
        positive = np.zeros((block.stop - block.start, len(right)), dtype=np.bool_)
        positive[of_query[pairs] - block.start, of_candidate[pairs]] = True
        result[block] = ranks(left[block] @ right.T, positive)
    return result


def class_ranks(query: npt.ArrayLike, candidate: npt.ArrayLike, query_class: Ints, candidate_class: Ints) -> Ints:
    """Rank of the best candidate of each query's class; 1 = the nearest candidate is of the class.

    Queries of a class that no candidate has cannot be answered and are left out. Where several candidates share the
    first place, all of them must be of the class.

    Args:
        query: float [Q, E]; candidate: float [C, E].
        query_class: int64 [Q]; candidate_class: int64 [C].

    Returns:
        int64 [number of queries that can be answered].
    """
    left, right = np.asarray(query), np.asarray(candidate)
    possible = np.flatnonzero(np.isin(query_class, candidate_class))
    blocks = [possible[start : start + BLOCK] for start in range(0, len(possible), BLOCK)]
    found = [ranks(left[rows] @ right.T, query_class[rows, None] == candidate_class[None, :]) for rows in blocks]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def recall_scores(found: Ints, num_candidates: int, at: Sequence[int] = (1, 5, 10)) -> dict[str, float | int]:
    """`R@k` for every k, `median_rank`, `num_queries` and `num_candidates` of one direction, from `pair_ranks`."""
    scores: dict[str, float | int] = {f"R@{k}": float((found <= k).mean()) for k in at}
    return scores | {
        "median_rank": float(np.median(found)),
        "num_queries": len(found),
        "num_candidates": num_candidates,
    }

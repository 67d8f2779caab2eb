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


def retrieval_scores(
    similarity: npt.ArrayLike, positive: npt.ArrayLike, at: Sequence[int] = (1, 5, 10)
) -> dict[str, float | int]:
    """`R@k` for every k, `median_rank`, `num_queries` and `num_candidates` of one direction.

    Args:
        similarity: float [Q, C], queries by candidates. For the other direction pass the transpose.
        positive: bool [Q, C], as for `ranks`.
        at: the k of R@k.
    """
    found = ranks(similarity, positive)
    scores: dict[str, float | int] = {f"R@{k}": float((found <= k).mean()) for k in at}
    scores["median_rank"] = float(np.median(found))
    scores["num_queries"], scores["num_candidates"] = (int(n) for n in np.shape(similarity))
    return scores


def class_precision_at_1(
    similarity: npt.ArrayLike, query_class: npt.ArrayLike, candidate_class: npt.ArrayLike
) -> float | None:
    """Share of the queries whose most similar candidate is of the query's class.

    Queries of a class that no candidate has cannot be answered and are left out; None when no query is left. Where
    several candidates share the first place, all of them must be of the class.

    Args:
        similarity: float [Q, C].
        query_class: int [Q].
        candidate_class: int [C].
    """
    scores = np.asarray(similarity, dtype=np.float64)
    same = np.asarray(query_class)[:, None] == np.asarray(candidate_class)[None, :]
    possible = same.any(axis=1)
    if not possible.any():
        return None
    return float((ranks(scores[possible], same[possible]) == 1).mean())

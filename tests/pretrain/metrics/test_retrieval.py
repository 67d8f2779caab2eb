"""Gold values, ties, NaN and a comparison with the definition written out as a loop."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.metrics.retrieval import class_precision_at_1, ranks, retrieval_scores

SIMILARITY = np.array(
    [
        [0.9, 0.1, 0.3, 0.2],  # rank 1
        [0.8, 0.5, 0.4, 0.6],  # two wrong ones are closer: rank 3
        [0.2, 0.7, 0.6, 0.1],  # rank 2
        [0.9, 0.8, 0.7, 0.1],  # rank 4
    ]
)


def test_gold_values_of_one_right_answer_a_query():
    assert ranks(SIMILARITY, np.eye(4, dtype=bool)).tolist() == [1, 3, 2, 4]
    scores = retrieval_scores(SIMILARITY, np.eye(4, dtype=bool), at=(1, 2, 3))
    assert scores == {
        "R@1": 0.25,
        "R@2": 0.5,
        "R@3": 0.75,
        "median_rank": 2.5,
        "num_queries": 4,
        "num_candidates": 4,
    }


def test_the_other_direction_is_the_transpose():
    assert ranks(SIMILARITY.T, np.eye(4, dtype=bool)).tolist() == [2, 3, 2, 4]  # column 0 ties at 0.9


def test_several_right_answers_count_by_the_best():
    positive = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1]], dtype=bool)
    # Query 3: the right one at 0.8 has one wrong one (0.9) above it.
    assert ranks(SIMILARITY, positive).tolist() == [1, 2, 2, 2]


def test_a_collapsed_encoder_is_last_everywhere():
    assert ranks(np.zeros((5, 5)), np.eye(5, dtype=bool)).tolist() == [5] * 5
    assert class_precision_at_1(np.zeros((4, 4)), [0, 1, 0, 1], [0, 1, 0, 1]) == 0.0


def test_a_tie_among_right_answers_is_no_mistake():
    assert class_precision_at_1([[0.5, 0.5, 0.1]], [7], [7, 7, 3]) == 1.0
    assert class_precision_at_1([[0.5, 0.5, 0.1]], [7], [7, 3, 7]) == 0.0


def test_nan_counts_against_the_model_on_either_side():
    own_is_nan = np.array([[np.nan, -5.0], [0.1, 0.2]])
    assert ranks(own_is_nan, np.eye(2, dtype=bool)).tolist() == [2, 1]
    other_is_nan = np.array([[0.9, np.nan], [0.1, 0.2]])
    assert ranks(other_is_nan, np.eye(2, dtype=bool)).tolist() == [2, 1]
    assert ranks(np.full((3, 3), np.nan), np.eye(3, dtype=bool)).tolist() == [3, 3, 3]


def test_equal_to_the_definition_on_random_matrices_with_ties():
    generator = np.random.default_rng(0)
    for _ in range(50):
        queries, candidates = generator.integers(1, 9, size=2)
        similarity = generator.integers(0, 4, size=(queries, candidates)) / 4
        positive = generator.random((queries, candidates)) < 0.3
        positive[np.arange(queries), generator.integers(0, candidates, size=queries)] = True
        expected = []
        for q in range(queries):
            best = max(similarity[q, c] for c in range(candidates) if positive[q, c])
            expected.append(1 + sum(similarity[q, c] >= best for c in range(candidates) if not positive[q, c]))
        assert ranks(similarity, positive).tolist() == expected


def test_class_precision_gold_value_and_unanswerable_queries():
    similarity = [[0.9, 0.2, 0.1], [0.3, 0.2, 0.1], [0.1, 0.2, 0.9], [1.0, 0.0, 0.0]]
    # Right, wrong (nearest is class 0), right; class 5 has no candidate.
    assert class_precision_at_1(similarity, [0, 1, 2, 5], [0, 1, 2]) == pytest.approx(2 / 3)
    assert class_precision_at_1([[0.1]], [0], [1]) is None
    assert class_precision_at_1(np.zeros((0, 3)), [], [0, 1, 2]) is None


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no right answer"):
        ranks(np.zeros((2, 2)), [[True, False], [False, False]])
    with pytest.raises(ValueError, match="same"):
        ranks(np.zeros((2, 2)), np.eye(3, dtype=bool))

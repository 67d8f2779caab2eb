"""Gold values, ties, NaN and a comparison with the definition written out as a loop."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.metrics import retrieval
from pretrain.metrics.retrieval import class_ranks, pair_ranks, ranks, recall_scores

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
    scores = recall_scores(np.array([1, 3, 2, 4]), num_candidates=4, at=(1, 2, 3))
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
    same = np.tile([[1.0, 0.0]], (4, 1))
    assert (class_ranks(same, same, np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1])) > 1).all()


def test_a_tie_among_right_answers_is_no_mistake():
    candidates = np.array([[0.5], [0.5], [0.1]])
    assert class_ranks([[1.0]], candidates, np.array([7]), np.array([7, 7, 3])).tolist() == [1]
    assert class_ranks([[1.0]], candidates, np.array([7]), np.array([7, 3, 7])).tolist() == [2]


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


def test_class_ranks_gold_values_and_unanswerable_queries():
    queries = np.array([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    # Right; wrong, the nearest is class 0; right; class 5 has no candidate.
    assert class_ranks(queries, np.eye(3), np.array([0, 1, 2, 5]), np.array([0, 1, 2])).tolist() == [1, 2, 1]
    assert class_ranks([[1.0]], [[1.0]], np.array([0]), np.array([1])).tolist() == []
    assert class_ranks(np.zeros((0, 3)), np.eye(3), np.zeros(0, dtype=np.int64), np.arange(3)).tolist() == []


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_blocks_of_queries_do_not_change_a_rank(monkeypatch, block):
    monkeypatch.setattr(retrieval, "BLOCK", block)
    generator = np.random.default_rng(1)
    query, candidate = generator.normal(size=(7, 4)), generator.normal(size=(5, 4))
    of_query = np.concatenate([np.arange(7), [0, 3, 6]])
    of_candidate = generator.integers(0, 5, size=10)
    positive = np.zeros((7, 5), dtype=bool)
    positive[of_query, of_candidate] = True
    assert (
        pair_ranks(query, candidate, of_query, of_candidate).tolist() == ranks(query @ candidate.T, positive).tolist()
    )
    classes = np.array([0, 1, 2, 0, 1, 2, 0])
    same = classes[:, None] == classes[None, :5]
    assert class_ranks(query, candidate, classes, classes[:5]).tolist() == ranks(query @ candidate.T, same).tolist()


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no right answer"):
        ranks(np.zeros((2, 2)), [[True, False], [False, False]])
    with pytest.raises(ValueError, match="same"):
        ranks(np.zeros((2, 2)), np.eye(3, dtype=bool))

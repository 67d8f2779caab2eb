"""Gold values, ties and NaN of the classification metrics."""

from __future__ import annotations

import numpy as np

from pretrain.metrics.classification import confusion, per_class_top1, predictions, top1

SCORES = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.3, 0.6, 0.1], [0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
LABELS = [0, 1, 2, 2, 0]


def test_gold_values():
    assert predictions(SCORES).tolist() == [0, 1, 1, 2, -1]
    assert top1(SCORES, LABELS) == 3 / 5
    assert per_class_top1(SCORES, LABELS) == [0.5, 1.0, 0.5]
    assert confusion(SCORES, LABELS).tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 1, 0]]
    assert confusion(SCORES, LABELS).sum() == len(LABELS)


def test_a_collapsed_or_broken_encoder_scores_nothing():
    assert top1(np.zeros((4, 3)), [0, 0, 1, 2]) == 0.0
    assert top1(np.full((4, 3), np.nan), [0, 0, 1, 2]) == 0.0
    assert top1([[np.nan, 0.9]], [1]) == 0.0


def test_no_samples_is_no_score():
    assert top1(np.zeros((0, 3)), []) is None
    assert per_class_top1(SCORES[:1], LABELS[:1]) == [1.0, None, None]

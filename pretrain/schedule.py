"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from pretrain.config import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Learning rate of step `step`, counted from 0.

    Linear warm-up, then cosine, warmup-stable-decay (linear to the floor over the last `decay_share`), or constant.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    floor = train.learning_rate * train.min_learning_rate_share
    left = max(train.max_steps - train.warmup_steps, 1)
    progress = min((step - train.warmup_steps) / left, 1.0)
    if train.schedule == "constant":
        share = 1.0
    elif train.schedule == "wsd":
        decay = max(train.decay_share, 1e-9)
        share = min(1.0, (1.0 - progress) / decay)
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (train.learning_rate - floor) * share

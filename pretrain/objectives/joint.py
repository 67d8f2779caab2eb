"""Add the losses up: sums over what each rank holds, divided by global counts, weighted by the config.

A loss is never a mean of means: every sum is divided by the number of things that it sums over in the whole global
batch, so the result does not depend on how samples were dealt to ranks and micro-batches.
"""

from __future__ import annotations

from torch import Tensor

from pretrain.config import LossesConfig

NAMES = ("text", "image", "audio", "align")
"""Losses in the order in which counts and sums travel between ranks."""


def weighted_sum(sums: dict[str, Tensor], counts: dict[str, int], weights: LossesConfig) -> Tensor:
    """This rank's share of the joint loss: `sums[name] * weight / counts[name]`, added up.

    A loss with nothing to average over anywhere contributes zero, and stays in the graph.
    """
    total = 0.0 * sums["text"]
    for name, value in sums.items():
        total = total + value * (getattr(weights, name) / max(counts[name], 1))
    return total


def means(
    sums: dict[str, float], counts: dict[str, int], weights: LossesConfig
) -> tuple[float, dict[str, float | None]]:
    """The joint loss and each loss on its own from global sums; null where off or absent from the batch."""
    parts: dict[str, float | None] = {}
    total = 0.0
    for name in NAMES:
        weight = getattr(weights, name)
        on = weight > 0 and counts[name] > 0
        parts[name] = sums[name] / counts[name] if on else None
        if on:
            total += weight * sums[name] / counts[name]
    return total, parts

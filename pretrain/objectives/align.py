"""Contrastive alignment of the modality pairs that are present, with negatives from the whole global batch.

InfoNCE (Radford et al., 2021) or SigLIP (Zhai et al., 2023), over image-text, audio-text and image-audio. A rank scores
its own queries against every rank's keys; the gather carries gradient, so the ranks' sums add up to the loss of one big
batch, whatever the world size. With gradient accumulation the same holds through cached gradients (Gao et al., 2021):
see `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import ObjectivesConfig

PAIRS = (("image", "text"), ("audio", "text"), ("image", "audio"))
_NAMES = ("image", "text", "audio")


@dataclass(frozen=True)
class Embeddings:
    """Joint embeddings of a set of samples. Missing ones are zero vectors with `present` false."""

    vectors: dict[str, Tensor]
    """name -> float32 [B, E], unit norm where present."""
    present: dict[str, Tensor]
    """name -> bool [B]."""
    scale: Tensor
    """float32 [1]."""
    bias: Tensor
    """float32 [1]."""


class _Gather(torch.autograd.Function):
    """All-gather along dim 0 whose backward sums the gradients of every rank's copy."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """Concatenate [B, ...] over the ranks -> [world * B, ...], differentiably. Ranks hold equal shapes."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x) if x.requires_grad else _Gather.forward(None, x)


def align_loss(
    local: Embeddings, objectives: ObjectivesConfig, collect: Callable[[Tensor], Tensor] = gather
) -> tuple[Tensor, int]:
    """This rank's share of the alignment loss, as a sum, and the global number of pairs.

    The sum over ranks divided by the number of pairs is the loss: the mean over all pairs of all kinds, each pair
    counted in both directions with weight one half. `collect` puts the ranks' rows one after the other.
    """
    size = len(local.present["text"])
    flags = torch.stack([local.present[name] for name in _NAMES], dim=1)
    everywhere = collect(torch.cat([local.vectors[name] for name in _NAMES], dim=1))
    all_flags = collect(flags.to(torch.uint8)).bool()
    keys = dict(zip(_NAMES, everywhere.chunk(len(_NAMES), dim=1), strict=True))
    there = {name: all_flags[:, i] for i, name in enumerate(_NAMES)}
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    own = torch.arange(rank * size, (rank + 1) * size, device=flags.device)

    total = 0.0 * (everywhere.sum() + local.scale.sum() + local.bias.sum())
    pairs = 0
    for a, b in PAIRS:
        both = local.present[a] & local.present[b]
        pairs += int((there[a] & there[b]).sum())
        for query, key in ((a, b), (b, a)):
            scores = local.scale * (local.vectors[query][both] @ keys[key].T)
            if objectives.align == "siglip":
                total = total + 0.5 * _siglip(scores + local.bias, own[both], there[key])
            else:
                total = total + 0.5 * _infonce(scores, own[both], there[key], objectives.label_smoothing)
    return total, pairs


def _infonce(scores: Tensor, target: Tensor, allowed: Tensor, smoothing: float) -> Tensor:
    """Sum of cross entropies: scores [Q, K], target int64 [Q], allowed bool [K]."""
    logp = scores.masked_fill(~allowed[None, :], float("-inf")).log_softmax(-1)
    loss = -logp.gather(1, target[:, None]).sum()
    if smoothing:
        spread = -logp.masked_fill(~allowed[None, :], 0.0).sum() / allowed.sum().clamp(min=1)
        loss = (1 - smoothing) * loss + smoothing * spread
    return loss


def _siglip(logits: Tensor, target: Tensor, allowed: Tensor) -> Tensor:
    """Sum over queries of the sum over allowed keys of the sigmoid loss."""
    sign = torch.full_like(logits, -1.0).scatter(1, target[:, None], 1.0)
    return -(torch.nn.functional.logsigmoid(sign * logits) * allowed[None, :]).sum()

"""Masked reconstruction of patches and of log-mel frames: which positions are hidden, and the loss on them.

Targets are normalised per patch (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2022); sound masks are
spans of tokens, because a lone 40 ms gap can be filled by looking left and right. Masks come from the sample's seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.counter_random import uniform

_IMAGE_CHANCE, _IMAGE_PICK, _AUDIO_CHANCE, _AUDIO_PICK = 11, 12, 13, 14
_SPAN = 2


def chance(seed: Tensor, stream: int, probability: float) -> Tensor:
    """A coin a sample: int64 [B] -> bool [B], true with the probability."""
    return uniform(seed, stream, 1)[:, 0] < probability


def patches(seed: Tensor, valid: Tensor, masked_chance: float, share: float) -> Tensor:
    """Patches to hide: seed int64 [N], valid bool [N, P] -> bool [N, P]; round(share * valid) in each masked image."""
    score = uniform(seed, _IMAGE_PICK, valid.shape[1]).masked_fill(~valid, 2.0)
    rank = score.argsort(dim=1).argsort(dim=1)
    wanted = torch.round(valid.sum(1) * share)
    return (rank < wanted[:, None]) & chance(seed, _IMAGE_CHANCE, masked_chance)[:, None] & valid


def tokens(seed: Tensor, count: Tensor, masked_chance: float, share: float) -> Tensor:
    """Audio tokens to hide, in spans: seed int64 [N], count int64 [N] valid tokens -> bool [N, max(count)].

    Where all counts are 0 the width is 2, the dummy sound's.
    """
    width = int(count.max()) or _SPAN
    draw = uniform(seed, _AUDIO_PICK, width // _SPAN + 3)
    phase = (draw[:, 0] < 0.5).long()
    at = torch.arange(width, device=seed.device)[None, :]
    span = (at + phase[:, None]) // _SPAN
    hidden = torch.gather(draw[:, 1:], 1, span) < share
    return hidden & (at < count[:, None]) & chance(seed, _AUDIO_CHANCE, masked_chance)[:, None]


def patch_loss(guess: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
    """Sum over hidden patches of the mean squared error against the patch's normalised pixels.

    Args:
        guess, pixels: [N, P, C]; mask: bool [N, P].
    """
    target = pixels.float()
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, correction=0) + 1e-4).sqrt()
    error = (guess.float() - target).square().mean(-1)
    return (error * mask).sum()


def frame_loss(guess: Tensor, target: Tensor, mask: Tensor, frame_valid: Tensor) -> Tensor:
    """Sum over hidden audio tokens of the mean squared error on their valid frames.

    Args:
        guess, target: [N, A, stride * mel_bins]; mask: bool [N, A]; frame_valid: bool [N, A, stride].
    """
    shape = (*target.shape[:2], frame_valid.shape[-1], -1)
    error = (guess.float() - target.float()).reshape(shape).square().mean(-1)
    weight = frame_valid.float()
    error = (error * weight).sum(-1) / weight.sum(-1).clamp(min=1)
    return (error * mask).sum()

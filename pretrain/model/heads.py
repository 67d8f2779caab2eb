"""What only pretraining needs: read-outs into the joint embedding, the logit scale, reconstruction, mask tokens.

Each head is a module of its own that owns its parameters and uses them inside `forward`, because ZeRO-3 gathers
parameters around a module's forward and nowhere else. Every parameter has at least one dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_LOGIT_SCALE = 100.0


class Readout(nn.Module):
    """Masked mean over a tower's features, a norm, and a projection onto the unit sphere of the joint embedding."""

    def __init__(self, features: int, embedding: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.projection = nn.Linear(features, embedding, bias=False)
        nn.init.normal_(self.projection.weight, std=features**-0.5)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features [N, T, C], mask bool [N, T] -> float32 [N, E] of norm 1."""
        weight = mask.to(features.dtype)[..., None]
        mean = (features * weight).sum(1) / weight.sum(1).clamp(min=1)
        return nn.functional.normalize(self.projection(self.norm(mean)).float(), dim=-1)


class Similarity(nn.Module):
    """Learnt scale and bias of the similarities; the scale is clamped at 100 (CLIP, Radford et al., 2021)."""

    def __init__(self, scale: float, bias: float) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(scale)))
        self.logit_bias = nn.Parameter(torch.full((1,), bias))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Scale and bias, float32 [1] each."""
        scale = self.logit_scale.float().exp().clamp(max=MAX_LOGIT_SCALE)
        return scale, self.logit_bias.float() + 0.0


class MaskToken(nn.Module):
    """A learnt input that stands where a patch or a frame is hidden. Starts as noise: exact zeros blow up the norms."""

    def __init__(self, size: int, mean: float, std: float) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(size).normal_(mean, std))

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """inputs [N, T, C], mask bool [N, T], true = hidden -> [N, T, C]."""
        return torch.where(mask[..., None], self.token.to(inputs.dtype), inputs)


class Heads(nn.Module):
    """All heads of one model; exported beside the backbone in `pretrain_heads/`."""

    def __init__(
        self,
        text: int,
        vision: int,
        audio: int,
        embedding: int,
        patch: int,
        frames: int,
        logit_scale: float,
        logit_bias: float,
    ) -> None:
        super().__init__()
        self.image_readout = Readout(vision, embedding)
        self.audio_readout = Readout(audio, embedding)
        self.text_readout = Readout(text, embedding)
        self.similarity = Similarity(logit_scale, logit_bias)
        self.image_mask = MaskToken(patch, mean=0.5, std=0.1)
        self.audio_mask = MaskToken(frames // 4, mean=0.0, std=0.5)
        self.image_reconstruction = nn.Linear(vision, patch)
        self.audio_reconstruction = nn.Linear(audio, frames)

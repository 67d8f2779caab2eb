"""Random numbers as a pure function of (seed, stream, position), the same on every device, rank and worker.

Masks and SpecAugment draw from here, so a sample's masks depend on the sample alone and never on which rank holds it.
The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) on
torch's wrapping int64 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MULTIPLIERS = ((30, -4658895280553007687), (27, -7723592293110705685))


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    for shift, multiplier in _MULTIPLIERS:
        x = (x ^ _logical_shift_right(x, shift)) * multiplier
    return x ^ _logical_shift_right(x, 31)


def uniform(seed: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1).

    Args:
        seed: int64 [B], one seed a sample.
        stream: which use of the seed this is; two uses with different streams are independent.
        count: numbers a sample.

    Returns:
        float32 [B, count] on the seed's device.
    """
    key = _mix(seed + torch.full_like(seed, stream + 1) * _GAMMA)
    counter = torch.arange(1, count + 1, device=seed.device, dtype=torch.int64)
    bits = _mix(key[:, None] + counter[None, :] * _GAMMA)
    return _logical_shift_right(bits, 40).to(torch.float32) * 2.0**-24

"""Random generators of ranks that have no state to go on with: at the start of a run, and in a world that grew.

What such a rank draws is a function of the run's seed, the step and the rank, so that the same start or resume draws
the same numbers again. A rank that was there before goes on with its own generators.
"""

from __future__ import annotations

import random

import numpy as np
import torch

_WORDS = 4


def derive(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed Python's, NumPy's, torch's CPU and this rank's device generator from (run seed, step, rank)."""
    words = np.random.SeedSequence(seed, spawn_key=(step, rank)).generate_state(_WORDS, np.uint32)
    python, numpy, cpu = (int(word) for word in words[:3])
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(cpu)
    if device.type == "cuda":
        derive_device(seed, step, rank, device)


def derive_device(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed the device's generator alone."""
    word = np.random.SeedSequence(seed, spawn_key=(step, rank)).generate_state(_WORDS, np.uint32)[-1]
    with torch.cuda.device(device):
        torch.cuda.manual_seed(int(word))

"""The random generators of a rank (Python, NumPy, torch, the device's) as plain tensors, so that none is pickled.

A rank that has no state to go on with, at the start of a run and in a world that grew, draws what is a function of the
run's seed, the step and the rank, so that the same start or resume draws the same numbers again.
"""

from __future__ import annotations

import random

import numpy as np
import torch

_WORDS = 4


def generator_file(rank: int) -> str:
    """Name of the file with a rank's generators."""
    return f"rng-rank-{rank:05d}.safetensors"


def generators(device: torch.device) -> dict[str, torch.Tensor]:
    """State of every random generator of this rank, as tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    if version != 3 or name != "MT19937":
        raise RuntimeError("unknown kind of random generator")
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_generators(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `generators` gave."""
    gauss = float(state["python_gauss"])
    words = tuple(int(word) for word in state["python"])
    random.setstate((3, words, None if np.isnan(gauss) else gauss))
    position, has_gauss = (int(value) for value in state["numpy_position"])
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def derive_generators(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed Python's, NumPy's, torch's CPU and this rank's device generator from (run seed, step, rank)."""
    words = np.random.SeedSequence(seed, spawn_key=(step, rank)).generate_state(_WORDS, np.uint32)
    python, numpy, cpu = (int(word) for word in words[:3])
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(cpu)
    if device.type == "cuda":
        derive_device_generator(seed, step, rank, device)


def derive_device_generator(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed the device's generator alone."""
    word = np.random.SeedSequence(seed, spawn_key=(step, rank)).generate_state(_WORDS, np.uint32)[-1]
    with torch.cuda.device(device):
        torch.cuda.manual_seed(int(word))

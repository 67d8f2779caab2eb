"""What a rank draws that has no generators to go on with: a function of seed, step and rank, and another for each."""

from __future__ import annotations

import random

import numpy as np
import torch

from pretrain.checkpoint.generators import derive_generators, generators, restore_generators

CPU = torch.device("cpu")


def draws() -> tuple[float, ...]:
    return random.random(), float(np.random.random()), float(torch.rand(())), random.gauss(0, 1)


def derived(*of: int) -> tuple[float, ...]:
    derive_generators(*of, CPU)
    return draws()


def test_derived_generators_are_a_function_of_seed_step_and_rank() -> None:
    cases = [(0, 0, 0), (1, 0, 0), (0, 5, 0), (0, 0, 1), (0, 1, 0), (0, 5, 1)]
    found = [derived(*case) for case in cases]
    assert found == [derived(*case) for case in cases]
    for kind in range(4):
        assert len({each[kind] for each in found}) == len(cases)


def test_generators_come_back_in_the_middle_of_a_pair_of_normals() -> None:
    derive_generators(3, 7, 1, CPU)
    draws()
    np.random.standard_normal()
    kept = generators(CPU)
    expected = [draws(), draws()]
    derive_generators(4, 7, 1, CPU)
    restore_generators(kept, CPU)
    assert [draws(), draws()] == expected

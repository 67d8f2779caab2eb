"""The chaos run, short: whatever hits a run, it ends as an undisturbed one does. `make chaos` runs it for longer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.chaos import chaos
from tests.faults.harness import Running, recipe
from tests.faults.states import differences

pytestmark = [pytest.mark.distributed, pytest.mark.soak, pytest.mark.timeout(1500)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_random_faults_change_nothing(tmp_path: Path, stage: int) -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    print("seed", seed)
    assert chaos(tmp_path, minutes=2, seed=seed, mean_seconds=20, stage=stage, steps=120) == []


def test_another_run_would_be_seen(tmp_path: Path) -> None:
    folders = []
    for seed in (1, 2):
        run = Running(recipe(tmp_path, f"seed-{seed}", run={"seed": seed}))
        assert run.end() == 0, run.said
        folders.append(run.run_dir)
    assert any("exp_avg" in name or "fp32" in name for name in differences(*folders))

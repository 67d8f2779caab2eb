"""A request to stop does not wait for the end of an evaluation, and an evaluation that was left is caught up on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.faults.harness import Running, metrics, recipe
from tests.small_run import small_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]
STEPS, SAMPLES = 6, 160


def interrupted_at(config: Path, step: int) -> Running:
    """A start that is asked to stop once it evaluates after `step`."""
    run = Running(config)
    assert run.wait_for_step(step), run.said
    time.sleep(0.3)
    asked = time.monotonic()
    run.process.terminate()
    assert run.end() == 75, run.said
    assert time.monotonic() - asked < 10, run.said
    assert f"the evaluation at step {step} was left without results" in run.said
    return run


def test_an_evaluation_is_left_when_the_run_is_to_stop(tmp_path: Path) -> None:
    small_dataset(tmp_path / "long", "test", range(1000, 1000 + SAMPLES))
    config = recipe(
        tmp_path,
        "run",
        train={"max_steps": STEPS},
        data={"eval": str(tmp_path / "long"), "num_workers": 0},
        evaluation={"every_steps": 3, "batch": 2},
        checkpoint={"every_steps": 100},
    )
    run = interrupted_at(config, 3)
    assert [line["step"] for line in metrics(run.run_dir)] == [1, 2, 3, 4]
    run = interrupted_at(config, STEPS)
    assert not (run.run_dir / "eval").exists() and f"stopping after step {STEPS}: SIGTERM" in run.said

    last = Running(config)
    assert last.end() == 0, last.said
    assert json.loads((run.run_dir / "eval" / "results.json").read_text())["num_samples"] == SAMPLES

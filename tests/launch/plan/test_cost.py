"""Time limits, requeues, checkpoints and traffic."""

from __future__ import annotations

import pytest

from data_pipelines.errors import BadInput
from launch.plan.accelerators import ACCELERATORS, accelerator
from launch.plan.cost import checkpoint_bytes, jobs, parse_time_limit, step_seconds, traffic
from launch.plan.memory import Layout, Parameters

MODEL = Parameters({"text": 100}, (100,), 10)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("12:00:00", 43_200),
        ("1-0", 86_400),
        ("2-12:30", 217_800),
        ("1-00:00:10", 86_410),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: float | None) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "-5", "1:2:3:4", "12:00:00; true"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="no time limit"):
        parse_time_limit(text)


def test_requeues_follow_from_the_useful_part_of_a_job() -> None:
    made = jobs(run_seconds=10_000, limit_seconds=3600, restart_seconds=100, margin_seconds=180)
    assert made is not None
    assert (made.useful_seconds, made.number, made.requeues) == (3320, 4, 3)
    assert jobs(10_000, 280, 100, 180) is None
    whole = jobs(100, 3600, 100, 180)
    assert whole is not None and whole.requeues == 0


def test_a_checkpoint_has_weights_fp32_weights_and_moments() -> None:
    def layout(stage: int, element_bytes: int) -> Layout:
        return Layout(stage, False, False, 2, element_bytes, 50, 1, False)

    assert checkpoint_bytes(layout(0, 4), MODEL) == 100 * 12
    assert checkpoint_bytes(layout(2, 4), MODEL) == 100 * 16
    assert checkpoint_bytes(layout(2, 2), MODEL) == 100 * 14
    assert checkpoint_bytes(layout(3, 4), MODEL) == 100 * 12


def test_traffic_grows_with_stage_and_accumulation() -> None:
    def sent(stage: int, accumulation: int = 1) -> float:
        return traffic(Layout(stage, False, False, 4, 2, 50, accumulation, True), MODEL, 1, 0).total

    # All-reduce of gradients, all-gather of weights: 2 * 2 + 2 bytes an element over three quarters of a ring.
    assert sent(2) == 100 * 0.75 * 6
    assert sent(3) == 100 * 0.75 * 4
    assert sent(2, 4) > sent(1, 4)
    alone = traffic(Layout(2, False, False, 1, 2, 50, 1, True), MODEL, 8, 64)
    assert alone.total == 0


def test_the_table_has_every_accelerator_that_is_promised() -> None:
    assert set(ACCELERATORS) == {"a100-40g", "a100-80g", "h100-80g", "h200-141g", "mi300x-192g", "cpu"}
    assert accelerator("H100").name == "h100-80g"
    assert accelerator("cpu", 2).memory_bytes * 2 == accelerator("cpu", 1).memory_bytes
    with pytest.raises(BadInput, match="a100-40g"):
        accelerator("b9000")
    compute, _ = step_seconds(
        989.5e12, traffic(Layout(2, False, False, 1, 2, 50, 1, True), MODEL, 1, 1), accelerator("h100"), "bf16", 0.5, 1
    )
    assert compute == pytest.approx(2.0)

"""The same mathematics under every ZeRO stage, world size, dealing and accumulation; real ranks over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]


def losses(folder: Path, world_size: int = 2, **case: Any) -> list[dict[str, float]]:
    case = {"dealing": "even", "steps": 4, **case}
    return json.loads(
        run_ranks("tests.pretrain.zero_steps", [json.dumps(case), str(folder)], world_size)[0].splitlines()[-1]
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """One process, no ZeRO: the answer that all others must give."""
    return losses(tmp_path_factory.mktemp("reference"), world_size=1, engine={"zero_stage": 0})


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]], rel: float = 1e-5) -> None:
    assert len(found) == len(expected)
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-4)
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=rel)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_starts_and_goes_on_alike(tmp_path: Path, reference: list, stage: int) -> None:
    assert_close(losses(tmp_path, engine={"zero_stage": stage}), reference, rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_one_rank_without_modalities_neither_hangs_nor_changes_the_loss(
    tmp_path: Path, reference: list, stage: int
) -> None:
    found = losses(tmp_path, dealing="alternate", steps=20, engine={"zero_stage": stage})
    assert_close(found[: len(reference)], reference, rel=1e-4)
    assert all(0 < step["loss"] < 100 for step in found)


def test_accumulation_keeps_the_loss_and_the_negatives(tmp_path: Path, reference: list) -> None:
    assert_close(losses(tmp_path, dealing="apart", micro_batch=2), reference, rel=1e-4)


def test_offloaded_optimizer_and_parameters_train_alike(tmp_path: Path, reference: list) -> None:
    engine = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    assert_close(losses(tmp_path, engine=engine), reference, rel=1e-4)


def test_bf16_trains(tmp_path: Path, reference: list) -> None:
    found = losses(tmp_path, engine={"zero_stage": 2, "precision": "bf16"})
    assert found[0]["loss"] == pytest.approx(reference[0]["loss"], rel=0.02)
    assert found[-1]["loss"] < found[0]["loss"] * 1.2


def test_siglip_gathers_negatives_too(tmp_path: Path) -> None:
    alone = losses(tmp_path / "1", world_size=1, objectives={"align": "siglip"})
    assert_close(losses(tmp_path / "2", dealing="apart", objectives={"align": "siglip"}), alone, rel=1e-4)


ENGINES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(
    ("stage", "precision", "offload"), [*((*each, False) for each in ENGINES), (2, "bf16", True), (3, "bf16", True)]
)
def test_a_sample_that_is_not_a_number_on_one_rank_changes_nothing_anywhere(
    tmp_path: Path, stage: int, precision: str, offload: bool
) -> None:
    # The same batch in every step: with step 3 passed over, steps 4 and 5 are what 3 and 4 would have been.
    case = {
        "samples": 8,
        "micro_batch": 2,
        "steps": 5,
        "train": {"schedule": "constant", "warmup_steps": 0},
        "engine": {"zero_stage": stage, "precision": precision, "offload_optimizer": offload},
    }
    clean = losses(tmp_path / "clean", **case)
    poisoned = losses(tmp_path / "poisoned", poison=(1, [3]), **case)
    expected = [step["loss"] for step in clean]
    assert [step["loss"] for step in poisoned] == [*expected[:2], None, *expected[2:4]]
    assert [step["skipped"] for step in poisoned] == [None, None, "the loss is nan", None, None]
    assert [step["grad_norm"] for step in poisoned[3:]] == [step["grad_norm"] for step in clean[2:4]]


def test_too_many_of_them_in_a_row_end_the_run(tmp_path: Path) -> None:
    *steps, end = losses(tmp_path, poison=(0, [2, 4, 5, 6]), steps=8, watch={"max_non_finite": 3})
    assert [step["loss"] is None for step in steps] == [False, True, False, True, True, True]
    assert "step 6: 3 steps in a row" in end["stopped"] and "watch.max_non_finite" in end["stopped"]

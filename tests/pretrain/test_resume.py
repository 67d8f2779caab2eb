"""Going on: bit for bit in the same layout, within rounding in another, and never with a sample lost or repeated."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pretrain.resume_steps import observed, steps_of
from tests.ranks import run_ranks
from tests.small_run import config_text, small_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SIGKILLED = -9


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training set and room for runs."""
    folder = tmp_path_factory.mktemp("resume")
    small_dataset(folder / "train", "train", range(40))
    return folder


def config_file(home: Path, name: str, steps: int, every_steps: int) -> Path:
    raw = yaml.safe_load(config_text(home / name, home / "train", home / "train"))
    del raw["data"]["eval"]
    raw["train"] |= {"max_steps": steps, "warmup_steps": 2}
    raw["checkpoint"] = {"every_steps": every_steps, "keep_last": 20}
    raw["logging"] = {"tensorboard": False}
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def run(config: Path, world_size: int = 2, die_at: int | None = None, exitcode: int = 0, **case: Any) -> None:
    """Start ranks on a config; with `die_at` they all kill themselves once that step is done."""
    case |= {"die_at": die_at}
    code = SIGKILLED if die_at is not None else exitcode
    run_ranks("tests.pretrain.resume_steps", [str(config), json.dumps(case)], world_size, exitcode=code)


EXACT = [(2, "bf16"), (3, "fp32")]
ALL_EXACT = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(*case, marks=() if case in EXACT else pytest.mark.soak, id=f"zero{case[0]}-{case[1]}")
        for case in ALL_EXACT
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(home: Path, stage: int, precision: str) -> None:
    steps, dead = 8, random.randint(4, 7)
    layout = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    whole, cut = (config_file(home, f"{name}-{stage}-{precision}", steps, 3) for name in ("whole", "cut"))
    run(whole, set=layout)
    run(cut, set=layout, die_at=dead)
    run(cut, set=layout)
    for rank in (0, 1):
        expected, found = (observed(home / f"{name}-{stage}-{precision}", rank) for name in ("whole", "cut"))
        assert found[-1] == expected[-1], f"killed after step {dead}"
        lines = steps_of(home / f"cut-{stage}-{precision}", rank)
        assert lines == steps_of(home / f"whole-{stage}-{precision}", rank), f"killed after step {dead}"
    assert not (home / f"cut-{stage}-{precision}" / "universal").exists()


def elastic(
    home: Path, name: str, legs: list[tuple[int, int, list[str]]], every_steps: int, base: list[str]
) -> tuple[Path, Path]:
    """A run on two ranks with `base`, and one that changes its layout at every leg (ranks, last step, settings).

    All but the last leg are killed a step or two after their last checkpoint, so that a part is done twice.
    """
    steps = legs[-1][1]
    whole = config_file(home, f"{name}-whole", steps, every_steps)
    boundaries = [last for _, last, _ in legs[:-1]]
    run(whole, set=base, hash_at=boundaries)
    config = config_file(home, f"{name}-elastic", steps, every_steps)
    for world_size, last, settings in legs:
        die_at = last + random.randint(1, 2) if last != steps else None
        run(config, world_size, die_at, set=base + settings, hash_at=boundaries)
    return home / f"{name}-whole", home / f"{name}-elastic"


def keys_of(run_dir: Path, world_size: int, step: int) -> list[str]:
    return sorted(key for rank in range(world_size) for key in steps_of(run_dir, rank)[step]["keys"])


def assert_goes_on(whole: Path, other: Path, legs: list[tuple[int, int, list[str]]], rel: float) -> None:
    """The same batches of the same samples, losses within `rel`, and state that came over bit for bit."""
    expected, found = steps_of(whole), steps_of(other)
    assert list(found) == list(expected)
    for step, line in expected.items():
        assert found[step]["batch"] == line["batch"] == step - 1
        assert found[step]["loss"] == pytest.approx(line["loss"], rel=rel), f"step {step}"
        ranks = next(world_size for world_size, last, _ in legs if step <= last)
        assert keys_of(other, ranks, step) == keys_of(whole, 2, step)
    lines = observed(other)
    before = {line["hashed"]: line["state"] for line in lines if "hashed" in line}
    after = {line["start"]: line["state"] for line in lines if "start" in line}
    assert list(after) == [last for _, last, _ in legs[:-1]]
    for step, state in after.items():
        assert state == before[step], f"weights, moments or their count changed on the way at step {step}"


LEGS = [
    (2, 10, ["engine.zero_stage=2"]),
    (1, 20, ["engine.zero_stage=3"]),
    (2, 30, ["engine.zero_stage=1", "data.micro_batch=2"]),
    (1, 40, ["engine.zero_stage=0", "data.micro_batch=4"]),
    (2, 50, ["engine.zero_stage=2"]),
]


def test_other_ranks_stages_and_accumulation_go_on_within_rounding(home: Path) -> None:
    whole, other = elastic(home, "fp32", LEGS, 10, [])
    assert_goes_on(whole, other, LEGS, rel=1e-5)
    run_json = json.loads((other / "run.json").read_text())
    assert run_json["world_sizes"] == [2, 1, 2, 1, 2]
    assert ("engine.zero_stage", 2, 3, "free", 10) in {
        (each["field"], each["old"], each["new"], each["kind"], each["step"]) for each in run_json["changes"]
    }


BF16_LEGS = [
    (2, 6, ["engine.zero_stage=2"]),
    (1, 12, ["engine.zero_stage=3"]),
    (2, 18, ["engine.zero_stage=1"]),
    (2, 24, ["engine.zero_stage=3", "engine.offload_optimizer=true"]),
]


def test_bf16_goes_on_in_other_layouts_with_its_master_weights(home: Path) -> None:
    base = ["engine.precision=bf16"]
    whole, other = elastic(home, "bf16", BF16_LEGS, 6, base)
    assert_goes_on(whole, other, BF16_LEGS, rel=2e-2)

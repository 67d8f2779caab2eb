"""Going on: bit for bit in the same layout, within rounding in another, and never with a sample lost or repeated."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from data_pipelines.errors import BadInput
from data_pipelines.progress import Progress
from pretrain import checkpoint, universal
from pretrain.consolidate import open_weights
from pretrain.zero_reader import open_saved
from tests.pretrain.resume_steps import observed, steps_of
from tests.ranks import ROOT, run_ranks
from tests.small_run import config_text, small_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

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


@functools.cache
def whole_run(home: Path, stage: int, precision: str) -> Path:
    """An undisturbed run of eight steps on two ranks, with checkpoints of steps 3, 6 and 8."""
    name = f"whole-{stage}-{precision}"
    layout = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    run(config_file(home, name, 8, 3), set=layout, hash_at=[6])
    return home / name


# ZeRO 2 in fp32 is test_train.py's.
EXACT = [(2, "bf16")]
ALL_EXACT = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(*case, marks=() if case in EXACT else pytest.mark.soak, id=f"zero{case[0]}-{case[1]}")
        for case in ALL_EXACT
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(home: Path, stage: int, precision: str) -> None:
    whole, dead = whole_run(home, stage, precision), random.randint(4, 7)
    layout = [f"engine.zero_stage={stage}", f"engine.precision={precision}"]
    cut, config = home / f"cut-{stage}-{precision}", config_file(home, f"cut-{stage}-{precision}", 8, 3)
    run(config, set=layout, die_at=dead)
    run(config, set=layout)
    for rank in (0, 1):
        assert observed(cut, rank)[-1] == observed(whole, rank)[-1], f"killed after step {dead}"
        assert steps_of(cut, rank) == steps_of(whole, rank), f"killed after step {dead}"
    assert not (cut / "universal").exists()


Leg = tuple[int, int, list[str]]
"""Ranks, the step after which they are killed or end, and their settings."""


def go_through(home: Path, name: str, whole: Path, start: int, legs: list[Leg], every_steps: int) -> Path:
    """A run that goes on from step `start` of another and has another layout on every leg.

    All but the last leg are killed a step or two after their last checkpoint, so that a part is done twice.
    """
    config = config_file(home, name, legs[-1][1], every_steps)
    ends = [last for _, last, _ in legs]
    source = ["--resume", str(checkpoint.folder_of(whole, start))]
    for world_size, last, settings in legs:
        die_at = last + random.randint(1, 2) if last != ends[-1] else None
        run(config, world_size, die_at, set=settings, hash_at=ends, arguments=source)
        source = []
    return home / name


def keys_of(run_dir: Path, world_size: int, step: int) -> list[str]:
    return sorted(key for rank in range(world_size) for key in steps_of(run_dir, rank)[step]["keys"])


def assert_goes_on(whole: Path, other: Path, start: int, legs: list[Leg], rel: float) -> None:
    """The same batches of the same samples, losses within `rel`, and state that came over bit for bit."""
    expected, found = steps_of(whole), steps_of(other)
    assert list(found) == list(range(start + 1, legs[-1][1] + 1))
    for step, line in found.items():
        assert line["batch"] == expected[step]["batch"] == step - 1
        assert line["loss"] == pytest.approx(expected[step]["loss"], rel=rel), f"step {step}"
        ranks = next(world_size for world_size, last, _ in legs if step <= last)
        assert keys_of(other, ranks, step) == keys_of(whole, 2, step)
    before = {line["hashed"]: line["state"] for line in observed(other) if "hashed" in line}
    before[start] = next(line["state"] for line in observed(whole) if line.get("hashed") == start)
    after = {line["start"]: line["state"] for line in observed(other) if "start" in line}
    assert list(after) == [start, *(last for _, last, _ in legs[:-1])]
    for step, state in after.items():
        assert state == before[step], f"weights, moments or their count changed on the way at step {step}"


LEGS: list[Leg] = [
    (1, 10, ["engine.zero_stage=3"]),
    (2, 15, ["engine.zero_stage=1", "data.micro_batch=2"]),
    (1, 20, ["engine.zero_stage=0", "data.micro_batch=4"]),
    (2, 25, ["engine.zero_stage=2"]),
]


def test_other_ranks_stages_and_accumulation_go_on_within_rounding(home: Path) -> None:
    run(config_file(home, "fp32", 25, 5), set=["engine.zero_stage=2"], hash_at=[5])
    other = go_through(home, "fp32-legs", home / "fp32", 5, LEGS, 5)
    assert_goes_on(home / "fp32", other, 5, LEGS, rel=1e-5)
    run_json = json.loads((other / "run.json").read_text())
    assert run_json["world_sizes"] == [1, 2, 1, 2]
    changes = [(each["step"], each["field"], each["old"], each["new"]) for each in run_json["changes"]]
    assert {(5, "engine.zero_stage", 2, 3), (10, "data.micro_batch", None, 2), (20, "data.micro_batch", 4, None)} < {
        *changes
    }


@functools.cache
def alone(home: Path) -> Path:
    """The bf16 run of two ranks under ZeRO 2, gone on with from step 6 by one under ZeRO 3."""
    legs = [(1, 8, ["engine.zero_stage=3", "engine.precision=bf16"])]
    return go_through(home, "alone", whole_run(home, 2, "bf16"), 6, legs, 3)


def test_bf16_goes_on_with_its_master_weights(home: Path) -> None:
    assert_goes_on(whole_run(home, 2, "bf16"), alone(home), 6, [(1, 8, [])], rel=2e-2)


def test_settings_that_were_allowed_to_change_hold_after_the_resume(home: Path) -> None:
    run_dir, config = alone(home), home / "alone.yaml"
    layout = ["engine.zero_stage=3", "engine.precision=bf16"]
    others = ["train.max_steps=9", "train.weight_decay=0.3", "train.beta2=0.9", "train.clip_grad_norm=0.25"]
    run(config, 1, exitcode=2, set=layout + others, arguments=["--allow-change", "train.beta2"])
    before = observed(run_dir)[-1]
    run(config, 1, set=layout + others, arguments=["--allow-change", "train"])
    last = observed(run_dir)[-1]
    assert (before["end"], before["clip"]) == (8, 1.0) and (last["end"], last["clip"]) == (9, 0.25)
    assert {(decay, tuple(betas)) for decay, betas in before["groups"]} == {(0.05, (0.9, 0.98)), (0.0, (0.9, 0.98))}
    assert {(decay, tuple(betas)) for decay, betas in last["groups"]} == {(0.3, (0.9, 0.9)), (0.0, (0.9, 0.9))}


BF16_LEGS: list[Leg] = [
    (2, 12, ["engine.precision=bf16", "engine.zero_stage=1"]),
    (1, 18, ["engine.precision=bf16", "engine.zero_stage=3", "engine.offload_optimizer=true"]),
    (2, 24, ["engine.precision=bf16", "engine.zero_stage=2", "engine.offload_optimizer=true"]),
    (2, 30, ["engine.precision=bf16", "engine.zero_stage=3"]),
]


@pytest.mark.soak
def test_bf16_goes_on_in_every_stage_and_with_offload(home: Path) -> None:
    run(config_file(home, "bf16", 30, 6), set=["engine.precision=bf16", "engine.zero_stage=3"], hash_at=[6])
    other = go_through(home, "bf16-legs", home / "bf16", 6, BF16_LEGS, 6)
    assert_goes_on(home / "bf16", other, 6, BF16_LEGS, rel=2e-2)


@pytest.mark.soak
def test_another_precision_takes_the_same_master_weights(home: Path) -> None:
    run(config_file(home, "fp32-6", 6, 6), set=["engine.zero_stage=1"], hash_at=[6])
    config = config_file(home, "to-bf16", 12, 6)
    source = ["--resume", str(checkpoint.folder_of(home / "fp32-6", 6))]
    allow = ["--allow-change", "engine.precision", "--allow-change", "train.max_steps"]
    run(config, set=["engine.zero_stage=1", "engine.precision=bf16"], arguments=source + allow)
    before = next(line["state"] for line in observed(home / "fp32-6") if line.get("hashed") == 6)
    assert observed(home / "to-bf16")[0] == {"start": 6, "state": before}


@pytest.fixture
def saved(home: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint of two ranks, ZeRO 2, bf16, in `tmp_path/run`."""
    path = checkpoint.folder_of(tmp_path / "run", 6)
    shutil.copytree(checkpoint.folder_of(whole_run(home, 2, "bf16"), 6), path)
    return path


def convert(path: Path, run_dir: Path) -> Path:
    with Progress("converting", "MB", quiet=True) as progress:
        return universal.convert(path, run_dir, progress)


def test_a_form_holds_what_deepspeed_itself_puts_together(saved: Path, tmp_path: Path) -> None:
    form = convert(saved, tmp_path / "run")
    assert universal.why_not(form, saved) is None
    weights = open_weights(saved)
    parameters = json.loads((form / "index.json").read_text())["parameters"]
    used = 0
    for name, entry in parameters.items():
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            with safe_open(form / entry["files"][kind], framework="pt") as file:
                tensor = file.get_tensor(f"{name}/{kind}")
            assert list(tensor.shape) == entry["shape"] == list(weights[name].shape)
            if kind == "fp32":
                assert torch.equal(tensor, weights[name]), name
            else:
                used += int(tensor.abs().sum() > 0)
        assert entry["steps"] == 6
    # A weight or two takes no part in any loss of these.
    assert used > 1.8 * len(parameters)


def test_a_form_is_made_once_and_again_where_it_was_damaged(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, form = tmp_path / "run", universal.folder_of(saved, tmp_path / "run")
    left = form.with_name(".tmp-left-behind")
    left.mkdir(parents=True)

    def again() -> tuple[int, str]:
        universal._find_or_convert(saved, run_dir, lambda: None)
        assert universal.why_not(form, saved) is None and not left.exists()
        return form.stat().st_ino, capfd.readouterr().err

    first, said = again()
    assert f"converted {saved.name}" in said
    assert again() == (first, "")
    data = bytearray((form / "tensors-00000.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (form / "tensors-00000.safetensors").write_bytes(data)
    second, said = again()
    assert second != first and "tensors-00000.safetensors does not have the SHA-256" in said


def test_a_form_goes_with_its_checkpoint(saved: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    form = convert(saved, run_dir)
    universal.prune(run_dir)
    assert form.exists()
    shutil.rmtree(saved)
    universal.prune(run_dir)
    assert not form.exists()
    universal.prune(tmp_path / "no such run")


def test_a_conversion_killed_anywhere_leaves_no_half_form(saved: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.pretrain.convert_and_die", str(saved), str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *deaths, last = json.loads(done.stdout.splitlines()[-1])
    assert len(deaths) >= 10 and all(death["killed"] for death in deaths)
    assert last == {"killed": False, "there": True, "reason": None}
    # Right before the last flush, of the folder, the form is there by its name, and whole.
    assert [death["there"] for death in deaths] == [False] * (len(deaths) - 1) + [True]
    assert all(death["reason"] is None for death in deaths)


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch payload-ran",)


def test_files_that_are_wrong_are_refused_by_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    states = saved / "deepspeed" / "state"
    one = next(states.glob("*rank_1_*optim_states.pt"))
    whole = one.read_bytes()
    torch.save({"optimizer_state_dict": Payload()}, one)
    with pytest.raises(BadInput, match="would execute code"):
        convert(saved, tmp_path / "run")
    assert not (tmp_path / "payload-ran").exists()
    torch.save({"something": "else"}, one)
    with pytest.raises(BadInput, match="not what DeepSpeed .* writes.*optimizer_state_dict"):
        convert(saved, tmp_path / "run")
    one.unlink()
    with pytest.raises(BadInput, match=r"ranks \[0\], of 2 ranks expected"):
        convert(saved, tmp_path / "run")
    one.write_bytes(whole)
    (states / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(BadInput, match="mp_rank_00_model_states.pt is missing"):
        open_saved(saved / "deepspeed", 2)
    assert not list((tmp_path / "run" / "universal").glob("*"))

"""accelerate's settings beside the run's: the real `accelerate launch` with each of our files, and one error where two
places say different things."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipelines.errors import BadInput
from pretrain.accelerate_settings import check_launcher
from pretrain.config import load_config
from tests.ranks import ROOT
from tests.small_run import config_text, small_dataset

FILES = ROOT / "launch" / "accelerate"
OFFLOAD = ("engine.offload_optimizer=true",)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    small_dataset(tmp_path / "train", "small-train", range(32))
    text = config_text(tmp_path / "run", tmp_path / "train", tmp_path / "train", 2)
    path = tmp_path / "config.yaml"
    path.write_text(text.replace(f"  eval: {tmp_path / 'train'}\n", "").replace("max_steps: 4", "max_steps: 2"))
    return path


def told(recipe: Path, environment: dict[str, str], *overrides: str, launcher: tuple[str, ...] = ()) -> str | None:
    try:
        check_launcher(load_config(recipe, overrides), 1, environment, launcher)
    except BadInput as error:
        return str(error)
    return None


def test_what_was_not_said_cannot_disagree(recipe: Path) -> None:
    assert told(recipe, {}) is None
    # What the launcher sets by itself, whatever it was told.
    assert told(recipe, {"ACCELERATE_MIXED_PRECISION": "no"}, "engine.precision=bf16") is None
    same = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_GRADIENT_CLIPPING": "1", "ACCELERATE_USE_CPU": "x"}
    assert told(recipe, same | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}) is None
    assert told(recipe, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}) is None


@pytest.mark.parametrize(
    "environment, overrides, launcher, words",
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, (), (), ("zero_stage 3, here it is 2 (engine.zero_stage)",)),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, (), (), ("gradient_accumulation_steps 4, here it is 1",)),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, (), (), ("mixed_precision bf16, here it is fp32",)),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ("engine.precision=bf16",), (), ("fp16, here it is bf16",)),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,mixed_precision"},
            ("engine.precision=bf16",),
            (),
            ("mixed_precision no, here it is bf16",),
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "no"},
            ("engine.precision=bf16",),
            ("accelerate", "launch", "--mixed_precision=no"),
            ("mixed_precision no, here it is bf16",),
        ),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, (), (), ("nvme, here it is none",)),
        (
            {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"},
            ("engine.zero_stage=3", "engine.offload_parameters=true"),
            (),
            ("offload_param_device none, here it is cpu",),
        ),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, (), (), ("config_file ds.json",)),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, (), (), ("gradient_clipping 0.5, here it is 1.0",)),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, (), (), ("dynamo_backend INDUCTOR",)),
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_MIXED_PRECISION": "bf16"},
            (),
            (),
            ("zero_stage 1", "; mixed_precision bf16"),
        ),
    ],
)
def test_every_disagreement_is_named_in_one_line(
    recipe: Path,
    environment: dict[str, str],
    overrides: tuple[str, ...],
    launcher: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    said = told(recipe, environment, *overrides, launcher=launcher)
    assert said is not None and "\n" not in said
    assert all(word in said for word in words), said


def test_every_file_is_one_that_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    names = {path.stem for path in FILES.glob("*.yaml")}
    assert {"cpu-1", "cpu-2", "gpu-1", "node-8", "multi-node", "zero-1", "zero-2", "zero-3"} <= names
    assert {"zero-2-offload", "zero-3-offload"} <= names
    for path in FILES.glob("*.yaml"):
        found = load_config_from_file(str(path))
        assert found.distributed_type.value == "DEEPSPEED" and found.mixed_precision is None
        assert f"--config_file launch/accelerate/{path.name}" in path.read_text()
        assert yaml.safe_load(path.read_text())["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"


def launch(file: str, recipe: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Plain `accelerate launch`, with nothing of ours in the environment but where the package lies."""
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["accelerate", "launch", "--config_file", str(FILES / file), "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return subprocess.run(
        [*command, "-m", "pretrain.train", str(recipe), *words],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=recipe.parent,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.distributed
@pytest.mark.timeout(420)
def test_plain_accelerate_launch_ends_with_one_line_where_they_disagree(recipe: Path, tmp_path: Path) -> None:
    wrong = launch("zero-1.yaml", recipe)
    assert wrong.returncode != 0
    said = [line for line in wrong.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "zero_stage 1, here it is 2 (engine.zero_stage)" in said[0], wrong.stderr[-3000:]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_every_file_trains_on_a_cpu(recipe: Path, tmp_path: Path) -> None:
    for file, settings in (
        ("cpu-1.yaml", ()),
        ("cpu-2.yaml", ()),
        ("zero-1.yaml", ("engine.zero_stage=1",)),
        ("zero-2.yaml", ()),
        ("zero-2-offload.yaml", OFFLOAD),
        ("zero-3.yaml", ("engine.zero_stage=3",)),
        ("zero-3-offload.yaml", ("engine.zero_stage=3", *OFFLOAD, "engine.offload_parameters=true")),
    ):
        run = tmp_path / file
        done = launch(file, recipe, f"run.dir={run}", *settings)
        assert done.returncode == 0, (file, done.stderr[-3000:])
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

"""The command line as its users meet it: what it prints where, and the status that it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from launch.cli import app

ROOT = Path(__file__).resolve().parents[2]
WATCHING = ("status", "stop", "logs", "report")
COMMANDS = ("config", "train", "checkpoints", "ledger", "eval", "export", "verify", "push", "demo", *WATCHING)
GOOD = "run: {dir: runs/x}\ndata:\n  train: d\n"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_for_real(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from launch.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_help_names_every_command_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom launch.cli import main\nsys.argv = ['triptych', '--help']\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.rstrip().endswith("[]")
    for command in ("data", *COMMANDS):
        assert f"  {command} " in done.stdout, command


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"example: triptych {command} " in " ".join(result.output.split()).lower()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("trian", "x.yaml"), "Did you mean 'train'?"),
        (("train",), "Missing argument"),
        (("train", "nope.yaml"), "error: nope.yaml: no such config file"),
        (("train", "{good}", "--nproc", "0"), "Invalid value for '--nproc'"),
        (("train", "{good}", "--set", "train.max_step=3"), "did you mean train.max_steps?"),
        (("train", "{good}", "--resume", "nowhere"), "error: --resume nowhere: no such checkpoint folder"),
        (("config", "{good}", "--set", "data.train=3"), "error: --set data.train: data.train: expected text or list"),
        (("checkpoints", "nowhere"), "error: nowhere: no such run directory"),
        (("checkpoints", "{folder}"), "not a run directory"),
    ],
)
def test_mistakes_end_with_2_and_one_line(good: Path, arguments: tuple[str, ...], says: str) -> None:
    result = run(*(argument.format(good=good, folder=good.parent) for argument in arguments))
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.output and result.stdout == ""


def test_config_prints_json_alone_that_is_the_config(good: Path) -> None:
    result = run("config", good, "--set", "train.learning_rate=3e-4", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert found["train"]["learning_rate"] == 3e-4
    assert found["data"]["train"] == "d"


def test_config_shows_value_and_default_in_one_line(good: Path) -> None:
    lines = run("config", good, "--set", "train.max_steps=200").stdout.splitlines()
    line = next(line for line in lines if line.startswith("train.max_steps"))
    assert line.split()[1:3] == ["200", "1000"]


def test_config_without_a_file_lists_every_setting() -> None:
    settings = json.loads(run("config", "--json").stdout)
    assert {"path", "type", "required", "default", "description"} == set(settings[0])
    assert run("config").exit_code == 0


def test_the_config_reference_is_current() -> None:
    from launch.config_reference import reference

    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "run `make docs`"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_valid(path: Path) -> None:
    result = run("config", path, "--json")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_accelerate_config_is_one(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(path))
    assert found.distributed_type.value == "DEEPSPEED"
    settings = yaml.safe_load(path.read_text())["deepspeed_config"]
    assert settings.pop("deepspeed_multinode_launcher") == "standard"
    # Those that the program holds against its own config; of a precision accelerate would make a setting of its own.
    assert set(settings) <= {"zero_stage", "offload_optimizer_device", "offload_param_device"}
    assert found.mixed_precision is None


def test_checkpoints_of_a_run_without_any(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert json.loads(run("checkpoints", tmp_path, "--json").stdout) == []
    assert "no checkpoint yet" in run("checkpoints", tmp_path).stdout


def test_a_broken_checkpoint_is_listed_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (found,) = json.loads(run("checkpoints", tmp_path, "--json").stdout)
    assert set(found) == {"step", "path", "valid", "reason", "bytes"}
    assert found["step"] == 4 and found["valid"] is False and "MANIFEST.json" in found["reason"]
    assert "no: MANIFEST.json" in " ".join(run("checkpoints", tmp_path).stdout.split())


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -c 'from launch.cli import main; main()' config | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "Settings" and "Traceback" not in done.stderr


def test_the_installed_command_is_the_same(good: Path) -> None:
    done = run_for_real("config", good, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["run"]["dir"] == "runs/x"
    assert run_for_real("config", "nope.yaml").returncode == 2

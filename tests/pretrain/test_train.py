"""The program itself, on real ranks: exact after SIGKILL, stopped on purpose, refusing what it must."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.small_run import ROOT, config_text, small_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

LAUNCH = ("-m", "launch.ranks", "--config_file", str(ROOT / "launch/accelerate/cpu-2.yaml"), "-m", "pretrain.train")
ALONE = ("-m", "pretrain.train")
STEPS = 9


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training set, a test set and room for runs."""
    folder = tmp_path_factory.mktemp("train")
    small_dataset(folder / "train", "train", range(40))
    small_dataset(folder / "test", "test", range(100, 112))
    return folder


def config_file(home: Path, name: str, stage: int = 2, **changes: dict[str, Any]) -> Path:
    raw = yaml.safe_load(config_text(home / name, home / "train", home / "test", stage))
    raw["train"]["max_steps"] = STEPS
    raw["data"]["num_workers"] = 1
    raw["checkpoint"] = {"every_steps": 3, "keep_last": 2}
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    path = home / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def start(program: tuple[str, ...], *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *program, *arguments], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    """Exit status and standard error; everything that the process started is ended whatever happens."""
    try:
        _, errors = process.communicate(timeout=timeout)
        return process.returncode, errors
    finally:
        kill_tree(process)


def kill_tree(process: subprocess.Popen[str]) -> None:
    try:
        root = psutil.Process(process.pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for one in family:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], timeout: float = 150) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(
        f"no step {step}: {process.communicate(timeout=5)[1][-3000:] if process.poll() is not None else ''}"
    )


def test_a_killed_run_goes_on_bit_exactly(home: Path) -> None:
    # Other stages and precisions, and the state of everything besides the loss: test_resume.py.
    whole = config_file(home, "whole")
    status, errors = finish(start(LAUNCH, str(whole)))
    assert status == 0, errors
    expected = metrics(home / "whole")
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))

    cut = config_file(home, "cut")
    process = start(LAUNCH, str(cut))
    try:
        wait_for_step(home / "cut", random.randint(4, STEPS - 2), process)
    finally:
        kill_tree(process)
        process.communicate(timeout=30)
    assert metrics(home / "cut")[-1]["step"] < STEPS
    status, errors = finish(start(LAUNCH, str(cut), "--resume", "auto"))
    assert status == 0, errors
    assert "resuming from" in errors
    found = metrics(home / "cut")
    assert [(line["step"], line["loss_hex"]) for line in found] == [
        (line["step"], line["loss_hex"]) for line in expected
    ]
    run = json.loads((home / "cut" / "run.json").read_text())
    assert run["restarts"] == 1 and run["world_sizes"] == [2, 2]
    results = json.loads((home / "cut" / "eval" / "results.json").read_text())
    assert results == {
        **json.loads((home / "whole" / "eval" / "results.json").read_text()),
        "seconds": results["seconds"],
    }

    lines = metrics(home / "whole")[-1]
    assert float.fromhex(lines["loss_hex"]) == lines["loss"]
    weights = {"text": 1.0, "align": 1.0, "image": 0.5, "audio": 0.5}
    assert lines["loss"] == pytest.approx(sum(w * lines[f"loss_{k}"] for k, w in weights.items()))


def test_sigterm_saves_and_ends_with_75_and_goes_on(home: Path) -> None:
    config = config_file(home, "stopped", train={"max_steps": 400})
    process = start(LAUNCH, str(config))
    wait_for_step(home / "stopped", 2, process)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    assert status == 75, errors
    last = metrics(home / "stopped")[-1]["step"]
    assert last < 400
    assert (home / "stopped" / "checkpoints" / f"step-{last:08d}" / "MANIFEST.json").exists()

    status, errors = finish(start(ALONE, str(config), "--set", f"train.max_steps={last + 2}"))
    assert status == 2 and "train.max_steps" in errors and len(errors.strip().splitlines()) <= 5
    less = ("--set", f"train.max_steps={last + 2}", "--allow-change", "train.max_steps")
    status, errors = finish(start(ALONE, str(config), *less))
    assert status == 0, errors
    assert f"changed since step-{last:08d}: train.max_steps: 400 -> {last + 2} (allowed)" in errors
    assert f"converted step-{last:08d}" in errors
    assert [line["step"] for line in metrics(home / "stopped")] == list(range(1, last + 3))
    run = json.loads((home / "stopped" / "run.json").read_text())
    assert run["world_sizes"] == [2, 1]
    (change,) = run["changes"]
    assert change == {"step": last, "field": "train.max_steps", "old": 400, "new": last + 2, "kind": "allowed"}


def test_ranks_save_and_end_when_their_launcher_is_killed(home: Path) -> None:
    config = config_file(home, "orphans", train={"max_steps": 400})
    process = start(("-m", "accelerate.commands.launch", *LAUNCH[2:]), str(config))
    try:
        wait_for_step(home / "orphans", 2, process)
        ranks = [
            one for one in psutil.Process(process.pid).children(recursive=True) if "pretrain.train" in one.cmdline()
        ]
        process.kill()
        # Within 5 seconds, and a loaded machine's share.
        _, alive = psutil.wait_procs(ranks, timeout=8)
    finally:
        kill_tree(process)
        process.communicate(timeout=30)
    assert len(ranks) >= 2 and not alive
    last = metrics(home / "orphans")[-1]["step"]
    assert (home / "orphans" / "checkpoints" / f"step-{last:08d}" / "MANIFEST.json").exists()


def test_an_invalid_checkpoint_is_passed_over_by_name(home: Path) -> None:
    config = config_file(home, "damaged")
    assert finish(start(ALONE, str(config)))[0] == 0
    newest = home / "damaged" / "checkpoints" / f"step-{STEPS:08d}"
    (newest / "trainer.json").write_text("{}")
    status, errors = finish(start(ALONE, str(config)))
    assert status == 0, errors
    assert f"passed over {newest}" in errors and "trainer.json" in errors
    assert metrics(home / "damaged")[-1]["step"] == STEPS
    assert not json.loads((newest / "trainer.json").read_text()) == {}


BAD = {
    "no such file": ([], "missing.yaml"),
    "unknown key": (["--set", "train.learning_rat=1"], "train.learning_rate"),
    "unknown preset": (["--set", "model.preset=huge"], "model.preset"),
    "batch not divisible by micro": (["--set", "data.micro_batch=3"], "micro_batch"),
    "not a dataset": (["--set", "data.train=/nonexistent"], "/nonexistent"),
    "no such checkpoint": (["--resume", "/nonexistent"], "/nonexistent"),
    "image grid": (["--set", "data.image.size=30"], "size 30"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(home: Path, case: str) -> None:
    arguments, mentioned = BAD[case]
    config = "missing.yaml" if case == "no such file" else str(config_file(home, "bad"))
    status, errors = finish(start(ALONE, config, *arguments))
    assert status == 2, errors
    assert mentioned in errors and "Traceback" not in errors
    assert len(errors.strip().splitlines()) <= 5
    assert not (home / "bad" / "checkpoints").exists()


def test_a_checkpoint_of_another_config_is_refused_by_field(home: Path) -> None:
    config = config_file(home, "other")
    assert finish(start(ALONE, str(config)))[0] == 0
    status, errors = finish(start(ALONE, str(config), "--set", "train.learning_rate=0.1"))
    assert status == 2 and "train.learning_rate: 0.002 -> 0.1" in errors
    assert "--allow-change train.learning_rate" in errors and len(errors.strip().splitlines()) <= 5
    status, errors = finish(start(ALONE, str(config), "--set", "run.seed=7", "--allow-change", "run.seed"))
    assert status == 2 and "run.seed" in errors and len(errors.strip().splitlines()) == 1
    status, errors = finish(start(ALONE, str(config), "--resume", "never"))
    assert status == 2 and "--resume" in errors
    status, errors = finish(start(ALONE, str(config), "--set", "logging.every_steps=3"))
    assert status == 0, errors


def test_a_batch_that_the_ranks_cannot_share_is_refused(home: Path) -> None:
    config = config_file(home, "odd", data={"global_batch": 7})
    status, errors = finish(start(LAUNCH, str(config)))
    assert status == 2
    assert "data.global_batch 7" in errors and len(errors.strip().splitlines()) <= 5

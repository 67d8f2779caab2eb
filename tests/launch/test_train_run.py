"""`triptych train` with the real trainer on two ranks: what a person sees, and that stopping loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.small_run import config_text, small_dataset, triptych

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(420)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    small_dataset(tmp_path / "train", "small-train", range(32))
    text = config_text(tmp_path / "run", tmp_path / "train", tmp_path / "none", 2)
    text = text.replace(f"  eval: {tmp_path / 'none'}\n", "").replace("every_steps: 2", "every_steps: 500")
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_what_only_the_ranks_can_refuse_is_one_line_and_2(recipe: Path, tmp_path: Path) -> None:
    for setting, says in (
        (f"data.train={tmp_path / 'nowhere'}", "nowhere"),
        ("data.global_batch=7", "data.global_batch 7 does not divide by the 2 ranks"),
    ):
        done = triptych("train", str(recipe), "--nproc", "2", "--set", setting)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) <= 5, done.stderr


def test_ctrl_c_saves_and_the_same_command_goes_on(recipe: Path, tmp_path: Path) -> None:
    command = ["train", str(recipe), "--nproc", "2", "--set", "train.max_steps=40"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", "from launch.cli import main; main()", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not metrics.exists() or not metrics.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert "stopped with a checkpoint; the same command goes on" in errors and "Traceback" not in errors

    done = triptych(*command, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 41))
    found = json.loads(triptych("checkpoints", str(tmp_path / "run"), "--json").stdout)
    assert len(found) == 2 and all(each["valid"] and each["reason"] is None for each in found)
    assert found[-1]["step"] == 40

"""The demo, cut short: the real data, real ranks, a real export; then what giving the command again does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.small_run import ROOT, triptych

pytest.importorskip("espeakng_loader")
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

QUICK = [
    "train.max_steps=3",
    "train.warmup_steps=1",
    "checkpoint.every_steps=100",
    "model.text={num_hidden_layers: 1}",
    "model.vision={num_hidden_layers: 1}",
    "model.audio={num_hidden_layers: 1}",
]


def demo(out: Path, *more: str, timeout: float = 850) -> subprocess.CompletedProcess[str]:
    overrides = [part for setting in (*QUICK, *more) for part in ("--set", setting)]
    return triptych("demo", "--out", str(out), "--json", *overrides, timeout=timeout)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("demo") / "out"
    finished = demo(out)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return out, json.loads(finished.stdout)


def test_results_have_the_keys_that_others_rely_on(done):
    out, results = done
    assert json.loads((out / "results.json").read_text()) == results
    for value in (
        results["zero_shot"]["image_top1"],
        results["zero_shot"]["audio_top1"],
        results["retrieval"]["image_to_audio_class_p1"],
    ):
        assert isinstance(value, float) and 0 <= value <= 1
    assert results["export"]["verified"] is True
    assert results["num_processes"] == 2 and results["zero_stage"] == 2 and results["seconds"] > 0
    assert len(results["zero_shot"]["classes"]) == 10 and results["step"] == 3


def test_everything_is_where_it_should_be(done):
    out, _ = done
    for name in ("dataset/train/dataset.json", "dataset/test/dataset.json", "run/metrics.jsonl", "export/config.json"):
        assert (out / name).is_file(), name
    page = (out / "report.html").read_text()
    assert page.count("<audio") >= 10 and "http://" not in page and "https://" not in page
    metrics = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == [1, 2, 3]
    assert all(metrics[0][f"loss_{name}"] is not None for name in ("text", "image", "audio", "align"))


def test_a_second_time_nothing_is_done_again(done):
    out, results = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "demo.json"}
    again = demo(out, timeout=120)
    assert again.returncode == 0 and json.loads(again.stdout) == results
    assert "done already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_missing_result_is_made_from_what_is_there(done):
    out, results = done
    (out / "results.json").unlink()
    (out / "report.html").unlink()
    again = demo(out, timeout=240)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "trained already" in again.stderr
    assert json.loads(again.stdout)["zero_shot"] == results["zero_shot"]
    assert (out / "report.html").is_file()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    refused = demo(tmp_path, timeout=60)
    assert refused.returncode == 2 and "not a demo" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    refused = demo(tmp_path / "new", "train.max_stepz=3", timeout=60)
    assert refused.returncode == 2 and "max_steps" in refused.stderr and not (tmp_path / "new").exists()


def test_ctrl_c_while_training_leaves_no_process_and_a_checkpoint(done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0] / "dataset", out / "dataset")
    command = [sys.executable, "-c", "from launch.cli import main; main()", "demo", "--out", str(out)]
    settings = [*QUICK, "train.max_steps=100000"]
    command += [part for setting in settings for part in ("--set", setting)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 300
            while not (out / "run" / "metrics.jsonl").is_file() and time.monotonic() < deadline:
                assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(1)
            time.sleep(2)
            os.killpg(process.pid, signal.SIGINT)
            status = process.wait(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert status == 75, (tmp_path / "log").read_text()[-3000:]
    assert list((out / "run" / "checkpoints").glob("step-*"))
    assert not _alive(process.pid), "a process of the demo's session is still there"


def _alive(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found

"""Batches that do harm, on real ranks: what is skipped, what is gone back from, and that nothing else changes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli import app
from pretrain.checkpoint import read_manifest, verification
from pretrain.checkpoint.manifest import folder_of
from pretrain.ledger import Ledger, Outcome
from pretrain.roll_back import _newest_valid
from tests.pretrain.checkpoint.test_retention import committed
from tests.pretrain.test_train import ALONE, LAUNCH, config_file, finish, kill_tree, metrics
from tests.ranks import run_ranks
from tests.small_run import ROOT, small_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS = 16
# Batch 4 on rank 1 is not a number; batch 10 on rank 0 is a spike.
POISON = [[1, 4, "loss"], [0, 10, "spike"]]
WATCH = {"policy": "roll_back", "window": 8, "threshold": 30.0, "pass_over_around": 1}


def incidents(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in run.glob("incident-*.json")]
    return sorted(found, key=lambda incident: (incident["step"], incident["time"]))


OTHERS = [(0, "fp32"), (1, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize(
    ("stage", "precision"), [(2, "fp32"), *(pytest.param(*each, marks=pytest.mark.soak) for each in OTHERS)]
)
def test_what_does_harm_leaves_no_trace_but_in_the_records(tmp_path: Path, stage: int, precision: str) -> None:
    # The same batch in every step, so that what is left out changes nothing: the run must be the clean one.
    case = {
        "dealing": "even",
        "samples": 8,
        "micro_batch": 2,
        "steps": 8,
        "train": {"schedule": "constant", "warmup_steps": 0},
        "engine": {"zero_stage": stage, "precision": precision},
        "checkpoint": {"every_steps": 4},
        "watch": {"policy": "roll_back", "window": 4, "pass_over_around": 0},
    }
    poisons = [[1, 2, "loss"], [1, 3, "gradient"], [1, 7, "spike"]]
    clean, harmed = (
        json.loads(run_ranks("tests.pretrain.zero_steps", [json.dumps(one), str(tmp_path / name)])[0].splitlines()[-1])
        for name, one in (("clean", case), ("harmed", {**case, "poisons": poisons}))
    )
    expected = [(each["loss"], each["grad_norm"]) for each in clean]
    good = [each for each in harmed if each["skipped"] is None]
    assert [each["step"] for each in harmed] == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]
    assert [(each["loss"], each["grad_norm"]) for each in good] == [*expected[:4], *expected[2:6]]
    assert [each["skipped"] for each in harmed[1:3]] == ["the loss is nan", "the gradient is not finite"]
    assert "robust deviations above" in harmed[6]["skipped"] and harmed[9]["batch"] == 7

    run = tmp_path / "harmed" / "run-0"
    found = incidents(run)
    assert [(each["kind"], each["action"]) for each in found] == [
        ("loss_not_finite", "skip"),
        ("gradient_not_finite", "skip"),
        ("loss_spike", "roll_back"),
    ]
    for each in found:
        assert each["rank"] == 1 and each["phase"] == "optimizer" and each["stacks"] == {}
        assert each["keys"] == [f"key-{i}" for i in (4, 5, 6, 7, 0, 1, 2, 3)], "those of the guilty rank come first"
        assert [share["rank"] for share in each["ranks"]] == [1, 0]
    assert [[share["finite"] for share in each["ranks"]] for each in found] == [
        [False, True],
        [False, True],
        [True] * 2,
    ]
    assert "from the samples of rank 1" in found[0]["reason"] and "from the samples of rank 1" in found[1]["reason"]

    assert [line["step"] for line in metrics(run)] == list(range(1, 9))
    ledger = Ledger.read(run)
    held = [(int(one["step"]), int(one["batch"]), Outcome(int(one["outcome"])).name) for one in ledger.effective]
    assert held == [
        (1, 0, "TRAINED"),
        (2, 1, "LOSS_NOT_FINITE"),
        (3, 2, "GRADIENT_NOT_FINITE"),
        (4, 3, "TRAINED"),
        (5, 4, "TRAINED"),
        (6, 5, "TRAINED"),
        (7, 6, "PASSED_OVER"),
        (7, 7, "TRAINED"),
        (8, 8, "TRAINED"),
    ]
    assert len(ledger.undone) == 3 and len(set(ledger.effective["checksum"].tolist()) - {0}) == 1


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roll-back")
    small_dataset(folder / "train", "train", range(40))
    small_dataset(folder / "test", "test", range(100, 112))
    return folder


def start(program: tuple[str, ...], *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRIPTYCH_TEST_POISON": json.dumps(POISON)}
    command = [sys.executable, *program[:-1], "tests.pretrain.poison", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def poisoned_config(home: Path, name: str, **changes: dict[str, Any]) -> Path:
    return config_file(home, name, train={"max_steps": STEPS}, watch=WATCH, **changes)


def wait_for_incident(run: Path, kind: str, process: subprocess.Popen[str], timeout: float = 150) -> None:
    end = time.monotonic() + timeout
    while not list(run.glob(f"incident-*-{kind}-*.json")):
        assert time.monotonic() < end and process.poll() is None, f"no {kind}"
        time.sleep(0.02)


def wait_for_records(run: Path, starts: int, more: int, process: subprocess.Popen[str], timeout: float = 150) -> None:
    """Until the run has started so often, and this start has written so many records or come to its end."""
    end = time.monotonic() + timeout
    while process.poll() is None:
        assert time.monotonic() < end
        ledger = Ledger.read(run)
        begun = [each.number for each in ledger.stretches if each.kind == "start"]
        if len(begun) == starts and (ledger.records["stretch"] >= begun[-1]).sum() >= more:
            return
        time.sleep(0.02)


def ask(run: Path, *options: str) -> Any:
    done = CliRunner().invoke(app, ["ledger", str(run), *options, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.soak)])
def test_killed_and_rolled_back_a_run_is_the_undisturbed_one_and_its_ledger_exact(home: Path, kills: int) -> None:
    whole = poisoned_config(home, f"whole-{kills}")
    status, errors = finish(start(LAUNCH, str(whole)))
    assert status == 0, errors
    undisturbed = home / f"whole-{kills}"
    expected = metrics(undisturbed)
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    batches = [*range(9), *range(12, 12 + STEPS - 9)]
    assert [line["batch"] for line in expected] == batches, "9, 10 and 11 are passed over"
    assert [line["loss"] is None for line in expected] == [batch == 4 for batch in batches]
    assert expected[-1]["samples_seen"] == (batches[-1] + 1) * 8
    assert "step 11 (batch 10): the " in errors and "going back; samples in " in errors
    assert "back at step 9, passing over the batches 9, 10, 11" in errors

    config, run = poisoned_config(home, f"killed-{kills}"), home / f"killed-{kills}"
    for kill in range(kills):
        process = start(LAUNCH, str(config))
        try:
            if kill:
                wait_for_records(run, kill + 1, random.randint(1, 4), process)
            else:
                # Right after the roll-back, before a checkpoint knows of it.
                wait_for_incident(run, "loss_spike", process)
        finally:
            kill_tree(process)
            process.communicate(timeout=30)
    status, errors = finish(start(LAUNCH, str(config)))
    assert status == 0, errors
    found = metrics(run)
    assert [(line["step"], line["batch"], line["loss_hex"]) for line in found] == [
        (line["step"], line["batch"], line["loss_hex"]) for line in expected
    ]

    for each in (undisturbed, run):
        assert ask(each, "--repeated") == []
        assert {(one["batch"], one["why"]) for one in ask(each, "--unseen")} == {
            (n, "passed over") for n in (9, 10, 11)
        }
        assert ask(each, "--verify") == {"steps": STEPS, "samples": STEPS * 8, "mismatched": []}
    effective = [Ledger.read(each).effective[["step", "batch", "checksum", "outcome"]] for each in (undisturbed, run)]
    assert effective[0].tolist() == effective[1].tolist()
    whole_summary, summary = ask(undisturbed), ask(run)
    assert (whole_summary["trained"], whole_summary["skipped"], whole_summary["passed_over"]) == (STEPS - 1, 1, 3)
    assert [each["kind"] for each in whole_summary["starts"]] == ["start", "roll_back"]
    assert sum(each["kind"] == "start" for each in summary["starts"]) == kills + 1
    listed = ask(run, "--step", "5")
    incident = next(each for each in incidents(run) if each["kind"] == "loss_not_finite")
    assert listed["outcome"] == "skipped: loss not finite" and incident["rank"] == 1 and incident["batch"] == 4
    assert sorted(sample["key"] for sample in listed["samples"]) == sorted(incident["keys"])
    assert set(incident["ranks"][0]["keys"]) == set(incident["keys"][:4])


def test_ranks_share_the_reading_before_they_go_back_and_show_that_they_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    committed(tmp_path, 2, 4)
    (folder_of(tmp_path, 4) / "file").write_bytes(b"step 5")
    read: list[str] = []
    sha256_of = verification.sha256_of
    monkeypatch.setattr(verification, "sha256_of", lambda path, count: read.append(path.name) or sha256_of(path, count))
    for rank in (0, 1):
        ticks: list[int] = []
        # What rank 1 is told is what rank 0 found; the one file is rank 0's to read.
        manifests = [(read_manifest(folder_of(tmp_path, step)), None) for step in (4, 2)]
        answers = iter([True, manifests[0], ["file is wrong"], True, manifests[1], []])
        engine = SimpleNamespace(is_main=rank == 0, rank=rank, world_size=2)
        engine.gather_objects = lambda mine, rank=rank, answers=answers: [mine] if rank == 0 else [next(answers)]
        trainer = SimpleNamespace(
            engine=engine,
            committed=[folder_of(tmp_path, 2), folder_of(tmp_path, 4)],
            pulse=SimpleNamespace(tick=lambda ticks=ticks: ticks.append(1)),
        )
        assert _newest_valid(trainer) == folder_of(tmp_path, 2)
        assert len(ticks) == 2
    assert read == ["file", "file"]
    said = capsys.readouterr().err
    assert said.count("passed over") == 1 and "file does not have the SHA-256 of the manifest" in said


def test_a_run_that_has_to_stop_says_so_in_one_line(home: Path) -> None:
    config = poisoned_config(home, "stopped")
    status, errors = finish(start(ALONE, str(config), "--set", "watch.max_spikes=1"))
    assert status == 1 and "Traceback" not in errors
    said = [line for line in errors.splitlines() if line.startswith("stopped: ")]
    assert len(said) == 1 and "stopped: step 11: spikes in a row: 1 (watch.max_spikes), step 11; of the" in said[0]
    file = said[0].split("samples in ")[1]
    assert json.loads(Path(file).read_text())["action"] == "stop"

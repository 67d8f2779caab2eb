"""`triptych ledger` as its users meet it: a summary, a step's samples, and proofs with their exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from data_pipelines.dataset import open_dataset
from launch.cli import app
from pretrain.ledger import Outcome, id_checksums
from tests.pretrain.ledger_runs import BATCH, Run, text_datasets


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text_datasets(folder)
    return folder


@pytest.fixture
def played(home: Path, tmp_path: Path) -> Run:
    """Ten steps of a mixture, killed after the eighth and gone on from the sixth, one of them skipped."""
    run = Run(tmp_path, [open_dataset(home / "a"), open_dataset(home / "b")], [2.0, 1.0])
    run.start()
    run.steps(2)
    run.steps(1, Outcome.LOSS_NOT_FINITE)
    run.writer.tell("loss_not_finite", step=3, batch=2, action="skip", reason="the loss is nan")
    run.steps(3)
    saved = run.checkpoint()
    run.steps(2)
    run.start(saved)
    run.steps(4)
    return run


def ask(run: Run, *options: str) -> Result:
    return CliRunner().invoke(app, ["ledger", str(run.run_dir), *options])


def answer(run: Run, *options: str, status: int = 0) -> Any:
    result = ask(run, *options, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def test_the_summary(played: Run) -> None:
    found = answer(played)
    assert (found["steps"], found["trained"], found["skipped"], found["passed_over"]) == (10, 9, 1, 0)
    assert (found["undone"], found["samples"], found["damaged"]) == (2, 80, 0)
    assert [(each["step"], each["last_step"], each["last_step_kept"]) for each in found["starts"]] == [
        (0, 8, 6),
        (6, 10, 10),
    ]
    assert sum(source["position"] for source in found["sources"]) == 80
    assert found["sources"][0]["epochs"] == found["sources"][0]["position"] / 37
    text = ask(played).stdout
    for words in ("10: 9 trained, 1 skipped; tries undone: 2", "80; batches passed over: 0", "the loss is nan", "skip"):
        assert words in text, text


def test_a_step(played: Run, home: Path) -> None:
    found = answer(played, "--step", "7")
    picked = played.sequence.batch(6)
    assert (found["batch"], found["outcome"], found["agrees"], found["start"]) == (6, "trained", True, 2)
    assert found["undone"] == [{"stretch": 1, "batch": 6, "outcome": "trained"}]
    assert [(each["source"], each["id"], each["epoch"]) for each in found["samples"]] == list(
        zip(picked.source.tolist(), picked.sample.tolist(), picked.epoch.tolist(), strict=True)
    )
    for each in found["samples"]:
        text = f"{'ab'[each['source']]} {each['id']}".encode()
        tar = (Path(each["dataset"]) / each["shard"]).read_bytes()
        assert tar[each["offset"] : each["offset"] + len(text)] == text and each["key"].endswith(f"-{each['id']:02d}")
    shown = ask(played, "--step", "3").output
    assert "step 3: batch 2, skipped: loss not finite" in shown and "agrees" in shown and "shards/a-" in shown


def test_a_clean_run_proves_itself(played: Run) -> None:
    assert answer(played, "--repeated") == [] and answer(played, "--unseen") == []
    assert answer(played, "--verify") == {"steps": 10, "samples": 80, "mismatched": []}
    assert set(answer(played, "--repeated", "--unseen", "--verify")) == {"repeated", "unseen", "verify"}
    text = ask(played, "--repeated", "--unseen", "--verify").stdout
    assert "no sample was consumed twice within an epoch (80 samples in 10 steps)" in text
    assert "every sample that was due so far was consumed" in text
    assert "the ranks consumed what the plan says: 80 samples in 10 steps" in text


def test_what_was_passed_over_is_unseen_and_no_fault(played: Run) -> None:
    saved = played.checkpoint()
    played.steps(1)
    played.roll_back(saved, [10])
    played.steps(1)
    found = answer(played, "--unseen")
    assert len(found) == BATCH and {(each["why"], each["batch"]) for each in found} == {("passed over", 10)}
    assert "8 samples never consumed: 8 passed over" in ask(played, "--unseen").stdout
    assert answer(played)["passed_over"] == 1


def test_a_run_that_is_not_exact_ends_with_1(played: Run) -> None:
    played.cursor.batch = 4
    played.steps(1)
    repeated = answer(played, "--repeated", status=1)
    assert len(repeated) == BATCH and {(each["step"], each["batch"]) for each in repeated} == {(11, 4)}
    assert {"key", "dataset", "shard", "offset", "epoch", "source", "id", "why"} < set(repeated[0])
    assert "8 samples consumed again" in ask(played, "--repeated").stdout
    assert answer(played, "--unseen") == []
    played.cursor.batch = 12
    played.steps(1)
    assert len(answer(played, "--unseen", status=1)) == 2 * BATCH


def test_other_samples_than_the_plans_are_told(played: Run) -> None:
    wrong = int(id_checksums(played.sequence.batch(3).index))
    played.writer.add(11, 10, wrong, Outcome.TRAINED)
    assert answer(played, "--verify", status=1)["mismatched"] == [{"step": 11, "batch": 10}]
    result = ask(played, "--step", "11")
    assert result.exit_code == 1 and "the ranks consumed other samples in step 11" in result.output
    assert ask(played, "--repeated").exit_code == 1, "what was consumed instead may be a repetition"


def test_bad_questions_are_one_line(played: Run, tmp_path: Path) -> None:
    for options, says in (
        (["--step", "99"], "the last one is 10"),
        (["--step", "3", "--repeated"], "--step lists one step"),
    ):
        result = ask(played, *options)
        assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1
    result = CliRunner().invoke(app, ["ledger", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "no such run directory" in result.stderr

"""`triptych eval`, `export` and `verify` as a shell sees them: exit status, standard output, standard error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.small_run import small_run, triptych

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(290)]


@pytest.fixture(scope="module")
def run() -> Path:
    return small_run(2)


@pytest.fixture(scope="module")
def export(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "export"
    done = triptych("export", str(run / "run"), "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["path"] == str(out) and answer["step"] == 4 and answer["verified"] is True
    assert "verified: " in done.stderr and "exporting" in done.stderr
    return out


def test_a_run_and_its_export_have_the_same_scores(run, export, tmp_path):
    data = str(run / "test")
    of_run = triptych("eval", str(run / "run"), "--data", data, "--json", "--out", str(tmp_path / "run.json"))
    of_export = triptych("eval", str(export), "--data", data, "--json")
    assert of_run.returncode == of_export.returncode == 0, of_run.stderr + of_export.stderr
    found, expected = json.loads(of_export.stdout), json.loads(of_run.stdout)
    assert json.loads((tmp_path / "run.json").read_text()) == expected
    assert found["zero_shot"] == expected["zero_shot"]
    assert found["retrieval"] == expected["retrieval"]
    assert found["caption"]["loss"] == pytest.approx(expected["caption"]["loss"], abs=1e-6)
    for key in ("image_top1", "audio_top1"):
        assert 0 <= found["zero_shot"][key] <= 1
    assert 0 <= found["retrieval"]["image_to_audio_class_p1"] <= 1
    assert found["step"] == 4 and expected["checkpoint"].endswith("step-00000004")


def test_people_get_a_table(export):
    done = triptych("eval", str(export))
    assert done.returncode == 0, done.stderr
    assert "Zero-shot classification, 3 classes" in done.stdout and "small-test" in done.stdout


def test_verify_says_yes_and_no(run, export, tmp_path):
    done = triptych("verify", str(export), "--data", str(run / "test"), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["verified"] is True
    broken = Path(shutil.copytree(export, tmp_path / "broken"))
    (broken / "config.json").unlink()
    done = triptych("verify", str(broken))
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["not verified: config.json is missing"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{nowhere}"], "no such folder"),
        (["eval", "{run}"], "neither a run directory nor an export"),
        (["eval", "{run}/run", "--data", "{nowhere}"], "no such dataset folder"),
        (["export", "{run}/run", "--out", "{run}"], "not empty"),
        (["export", "{run}/run", "--out", "{nowhere}/x", "--step", "7"], "no such checkpoint"),
        (["export", "{run}/train", "--out", "{nowhere}/x"], "not a run directory"),
        (["verify", "{run}"], "not an export of ours"),
        (["verify", "{nowhere}"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, arguments, message):
    filled = [argument.format(run=run, nowhere=tmp_path / "nowhere") for argument in arguments]
    done = triptych(*filled)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]

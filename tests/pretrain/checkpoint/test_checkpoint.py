"""A checkpoint is valid when every listed byte is right and nothing is unlisted; the newest valid one is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipelines.errors import BadInput
from pretrain import checkpoint
from pretrain.train import pass_over
from tests.faults.states import differences
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoints of steps 2, 4 and 6 (6 asked for by keep_last 3), written by two ranks."""
    folder = tmp_path_factory.mktemp("run")
    case = {"dealing": "even", "steps": 6, "checkpoint": {"every_steps": 2, "keep_last": 3}}
    run_ranks("tests.pretrain.zero_steps", [json.dumps(case), str(folder)])
    return folder / "run-0"


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return checkpoint.folder_of(run, 6)


def test_whole_checkpoints_are_valid_and_listed(run: Path) -> None:
    listed = checkpoint.list_checkpoints(run)
    assert [(found.step, found.reason) for found in listed] == [(2, None), (4, None), (6, None)]
    manifest = json.loads((newest(run) / "MANIFEST.json").read_text())
    assert manifest["step"] == 6 and manifest["world_size"] == 2 and manifest["zero_stage"] == 2
    on_disk = {str(p.relative_to(newest(run))) for p in newest(run).rglob("*") if p.is_file()} - {"MANIFEST.json"}
    assert set(manifest["files"]) == on_disk
    assert not [name for name in on_disk if name.endswith(".py")]
    assert not list((run / "checkpoints").glob(".*"))
    log = [json.loads(line) for line in (run / "checkpoints.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reason"]) for line in log] == [(2, None), (4, None), (6, None)]
    assert log[-1]["bytes"] == sum(entry["bytes"] for entry in manifest["files"].values())
    assert 0 < log[-1]["stall_seconds"] <= log[-1]["seconds"]


def damage(path: Path, how: str) -> None:
    weights = next(path.rglob("*optim_states.pt"))
    if how == "flipped bit":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "missing":
        next(path.glob("rng-rank-00001*")).unlink()
    elif how == "extra":
        (path / "deepspeed" / "more.pt").write_bytes(b"x")
    elif how == "no manifest":
        (path / "MANIFEST.json").unlink()
    elif how == "torn manifest":
        text = (path / "MANIFEST.json").read_text()
        (path / "MANIFEST.json").write_text(text[: len(text) // 2])
    elif how == "another step's file":
        other = checkpoint.folder_of(path.parent.parent, 4)
        shutil.copy(next(other.rglob("*optim_states.pt")), weights)


REASONS = {
    "flipped bit": "SHA-256",
    "truncated": "bytes instead of",
    "missing": "rng-rank-00001.safetensors is missing",
    "extra": "more.pt is not in the manifest",
    "no manifest": "MANIFEST.json is missing",
    "torn manifest": "does not parse",
    "another step's file": "SHA-256",
}


@pytest.mark.parametrize("how", REASONS)
def test_damage_is_named_and_the_one_before_is_taken(run: Path, how: str) -> None:
    damage(newest(run), how)
    assert REASONS[how] in (checkpoint.verify(newest(run)) or "valid")
    found, passed = checkpoint.find_latest(run)
    assert found is not None and found.step == 4
    assert [bad.step for bad in passed] == [6]


def test_ranks_share_the_reading_and_come_to_one_answer(run: Path) -> None:
    damage(newest(run), "flipped bit")
    said = [
        json.loads(out.splitlines()[-1]) for out in run_ranks("tests.pretrain.checkpoint.verifying_rank", [str(run)])
    ]
    for one in said:
        assert one["step"] == 4 and len(one["passed"]) == 1 and "optim_states.pt does not have" in one["passed"][0]
    read = [set(one["read"]) for one in said]
    assert all(read) and not read[0] & read[1]
    listed = [
        f"{checkpoint.folder_of(run, step).name}/{name}"
        for step in (4, 6)
        for name in json.loads((checkpoint.folder_of(run, step) / "MANIFEST.json").read_text())["files"]
    ]
    assert read[0] | read[1] == set(listed)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path) == (None, [])
    assert checkpoint.list_checkpoints(tmp_path) == []
    with pytest.raises(BadInput, match="missing"):
        checkpoint.read_manifest(tmp_path)


def test_a_run_whose_checkpoints_are_all_invalid_does_not_start_anew(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6):
        damage(checkpoint.folder_of(run, step), "no manifest")
    found, passed = checkpoint.find_latest(run)
    with pytest.raises(BadInput, match="no checkpoint in .* is valid"):
        pass_over(passed, found.path if found else None)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0][-8:] for line in said] == ["00000006", "00000004", "00000002"]
    pass_over(passed[:1], checkpoint.folder_of(run, 4))
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("engine", [{"zero_stage": 1}, {"zero_stage": 3, "precision": "bf16"}])
def test_nothing_that_was_never_written_reaches_a_checkpoint(tmp_path: Path, engine: dict) -> None:
    """Partitions of odd parameters are padded, and DeepSpeed leaves to chance what the padding holds."""
    for name in ("clean", "dirty"):
        case = {"dealing": "even", "steps": 2, "engine": engine, "dirty": name == "dirty"}
        case["checkpoint"] = {"every_steps": 2}
        run_ranks("tests.pretrain.zero_steps", [json.dumps(case), str(tmp_path / name)])
    found = differences(tmp_path / "clean" / "run-0", tmp_path / "dirty" / "run-0")
    assert not [name for name in found if name.startswith("deepspeed/")]

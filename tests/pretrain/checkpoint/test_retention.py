"""What stays, what goes, what is set aside; and the share of each rank in reading it all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import BadInput
from pretrain import checkpoint
from pretrain.checkpoint import retention
from pretrain.checkpoint.commit import commit, lack_of_room
from pretrain.checkpoint.manifest import FORMAT_VERSION, folder_of, looks_whole, read_manifest, seal
from pretrain.checkpoint.verification import share


def manifest_of(step: int, files: dict[str, bytes]) -> dict[str, Any]:
    entries = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rank": 0}
        for name, data in files.items()
    }
    whole = {"format_version": FORMAT_VERSION, "run_id": "r", "step": step, "world_size": 1, "zero_stage": 2}
    return seal(whole | {"files": entries})


def written(run: Path, step: int, name: str = ".tmp-x") -> tuple[Path, dict[str, Any]]:
    """A temporary folder with one file, and the manifest for it."""
    work = run / "checkpoints" / name
    work.mkdir(parents=True)
    data = f"step {step}".encode()
    (work / "file").write_bytes(data)
    return work, manifest_of(step, {"file": data})


def committed(run: Path, *steps: int) -> None:
    for step in steps:
        work, manifest = written(run, step)
        commit(work, run, manifest)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_committed_folder_is_a_valid_checkpoint(tmp_path: Path) -> None:
    committed(tmp_path, 4)
    assert checkpoint.list_checkpoints(tmp_path) == [checkpoint.Found(4, folder_of(tmp_path, 4), None)]
    assert names(tmp_path) == ["step-00000004"]


def test_the_last_ones_and_every_nth_stay(tmp_path: Path) -> None:
    committed(tmp_path, *range(2, 22, 2))
    steps = {path.name[-2:] for path in retention.outdated(tmp_path, keep_last=2, keep_every=6)}
    assert steps == {"02", "04", "08", "10", "14", "16"}
    assert len(retention.outdated(tmp_path, keep_last=3, keep_every=None)) == 7
    assert retention.outdated(tmp_path, keep_last=10, keep_every=None) == []


def test_a_damaged_one_does_not_count_among_those_that_stay(tmp_path: Path) -> None:
    committed(tmp_path, 2, 4, 6)
    (folder_of(tmp_path, 6) / "file").write_bytes(b"short")
    assert not looks_whole(folder_of(tmp_path, 6))
    assert [path.name for path in retention.outdated(tmp_path, 1, None)] == ["step-00000002"]
    assert retention.outdated(tmp_path, 2, None) == []


def test_what_was_cut_short_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    committed(tmp_path, 2, 4)
    retention.remove(folder_of(tmp_path, 2))
    assert names(tmp_path) == ["step-00000004"]
    parent = tmp_path / "checkpoints"
    for name in (".tmp-step-00000006.aa", ".old-step-00000002.bb"):
        (parent / name / "deepspeed").mkdir(parents=True)
        (parent / name / "deepspeed" / "file").write_text("x")
    (parent / ".tmp-latest.cc").write_text("x")
    aside = retention.set_aside(folder_of(tmp_path, 4))
    committed(tmp_path, 5)
    assert len(retention.clear_leftovers(tmp_path)) == 3
    assert names(tmp_path) == [aside.name, "step-00000005"]
    assert retention.clear_leftovers(tmp_path / "none") == []


def test_a_run_that_went_back_sets_what_it_left_behind_aside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    committed(tmp_path, 2, 4, 6)
    committed(tmp_path, 4)
    found, _ = checkpoint.find_latest(tmp_path)
    assert found is not None and found.step == 4
    assert [name.split(".")[1] for name in names(tmp_path)[:2]] == ["aside-step-00000004", "aside-step-00000006"]
    assert capsys.readouterr().err.count("is written anew") == 2


def test_a_file_that_rank_0_does_not_see_is_no_checkpoint(tmp_path: Path) -> None:
    work, manifest = written(tmp_path, 2)
    manifest["files"]["rng"] = {"bytes": 1, "sha256": "0", "rank": 3}
    with pytest.raises(RuntimeError, match="rng of rank 3 is not there .* all nodes share"):
        commit(work, tmp_path, manifest)
    assert checkpoint.find_latest(tmp_path) == (None, [])


def test_lack_of_room_names_both_numbers(tmp_path: Path) -> None:
    assert lack_of_room(tmp_path, 10) is None
    problem = lack_of_room(tmp_path, 1 << 60)
    assert problem is not None and "1,152,921,504,606,846,976 bytes needed, " in problem and "available at" in problem


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_ranks_share_the_reading_evenly_and_leave_nothing_out(world_size: int) -> None:
    files = {f"file-{i}": {"bytes": size} for i, size in enumerate([100, 90, 80, 20, 10, 5, 5, 0])}
    shares = [share(files, rank, world_size) for rank in range(world_size)]
    assert sorted(name for part in shares for name in part) == sorted(files)
    loads = [sum(files[name]["bytes"] for name in part) for part in shares]
    assert max(loads) <= max(100, 4 / 3 * sum(loads) / world_size)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"files": {"../../x": {"bytes": 1, "sha256": "0", "rank": 0}}}, "lists '../../x' wrongly"),
        ({"files": {"/etc/x": {"bytes": 1, "sha256": "0", "rank": 0}}}, "lists '/etc/x' wrongly"),
        ({"files": {"a/../b": {"bytes": 1, "sha256": "0", "rank": 0}}}, "lists 'a/../b' wrongly"),
        ({"files": {"a": {"bytes": "1", "sha256": "0", "rank": 0}}}, "lists 'a' wrongly"),
        ({"files": []}, "does not parse"),
        ({"step": "2"}, "does not parse"),
        ({"format_version": 1}, "has format version 1"),
    ],
)
def test_manifests_that_say_something_else_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    manifest = manifest_of(2, {})
    del manifest["sha256"]
    (tmp_path / "MANIFEST.json").write_text(json.dumps(seal(manifest | change)))
    with pytest.raises(BadInput, match=says):
        read_manifest(tmp_path)

"""A rank that is killed at any system call of a save leaves a valid checkpoint, and nothing that passes for one.

The whole sweep is `soak`; by default a few calls are drawn with a printed seed.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pretrain import checkpoint
from pretrain.checkpoint.manifest import checkpoints_folder, directories
from pretrain.checkpoint.retention import clear_leftovers
from tests.faults.tracing import Call, attached, calls_of, ready
from tests.ranks import started_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

SEED = 20261122
DRAWN = 4
PROGRAM = "tests.faults.saving_rank"


def clean_save(folder: Path, world_size: int = 1, **case: Any) -> list[list[Call]]:
    """What the checkpoint threads of all ranks do in a run that nothing disturbs, from its second checkpoint on."""
    run_dir = folder / "run"
    logs = [folder / f"strace-{rank}.log" for rank in range(world_size)]
    with started_ranks(PROGRAM, [str(run_dir), json.dumps({"steps": 4, **case})], world_size) as ranks:
        threads = ready(folder, ranks)
        contexts = [attached(thread, log=log) for thread, log in zip(threads, logs, strict=True)]
        for context in contexts:
            context.__enter__()
        try:
            (folder / "go").touch()
            for one in ranks:
                one.process.join(120)
                assert one.process.exitcode == 0, one.err.read_text()[-3000:]
        finally:
            for context in contexts:
                context.__exit__(None, None, None)
    return [calls_of(log) for log in logs]


def points(calls: list[Call]) -> list[tuple[str, int]]:
    """Every call of a save as the k-th of its kind."""
    seen: Counter[str] = Counter()
    found = []
    for call in calls:
        seen[call.name] += 1
        found.append((call.name, seen[call.name]))
    return found


def kill_at(folder: Path, name: str, number: int, world_size: int = 1, rank: int = 0, **case: Any) -> Path:
    """Kill `rank` at the `number`-th call `name` of its checkpoint thread after the first checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    run_dir = folder / "run"
    with started_ranks(PROGRAM, [str(run_dir), json.dumps({"steps": 12, **case})], world_size) as ranks:
        thread = ready(folder, ranks)[rank]
        with attached(thread, "-e", f"inject={name}:signal=KILL:when={number}"):
            (folder / "go").touch()
            ranks[rank].process.join(60)
        code = ranks[rank].process.exitcode
    assert code == -9, f"{name} {number} was not reached: exit status {code}"
    return run_dir


def assert_survived(run_dir: Path) -> None:
    """Something to resume from, at least what the run said it had; nothing invalid under a checkpoint's name."""
    log = [json.loads(line) for line in (run_dir / "checkpoints.jsonl").read_text().splitlines()]
    acknowledged = max(line["step"] for line in log if line["reason"] is None)
    listed = {found.step: found.reason for found in checkpoint.list_checkpoints(run_dir)}
    assert not [reason for reason in listed.values() if reason], listed
    found, passed = checkpoint.find_latest(run_dir)
    assert found is not None and not passed
    assert found.step >= acknowledged
    clear_leftovers(run_dir)
    left = {path.name for path in checkpoints_folder(run_dir).iterdir()}
    assert left - {"latest"} <= {path.name for _, path in directories(run_dir)}, left
    assert checkpoint.find_latest(run_dir)[0] == found


def test_a_kill_at_drawn_calls_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    (calls,) = clean_save(tmp_path / "clean")
    all_points = points(calls)
    drawn = random.Random(SEED).sample(all_points, DRAWN)
    print(f"seed {SEED}: {drawn} of {len(all_points)} calls")
    for name, number in drawn:
        assert_survived(kill_at(tmp_path / f"{name}-{number}", name, number))


def test_a_kill_of_one_of_two_ranks_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    for rank, name, number in ((1, "write", 1), (0, "rename", 1)):
        assert_survived(kill_at(tmp_path / f"{rank}-{name}", name, number, world_size=2, rank=rank))


def test_a_checkpoint_that_has_its_name_before_it_is_whole_would_be_seen(tmp_path: Path) -> None:
    run_dir = kill_at(tmp_path, "fsync", 2, mutation="name first")
    with pytest.raises(AssertionError, match="MANIFEST.json is missing"):
        assert_survived(run_dir)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_kill_at_every_call_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    (calls,) = clean_save(tmp_path / "clean")
    swept = points(calls)
    for name, number in swept:
        assert_survived(kill_at(tmp_path / f"{name}-{number}", name, number))
    print(f"{len(swept)} calls swept: {dict(Counter(name for name, _ in swept))}")


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_of_one_of_two_ranks_at_every_call_leaves_a_valid_checkpoint(tmp_path: Path, rank: int) -> None:
    calls = clean_save(tmp_path / "clean", world_size=2)[rank]
    for name, number in points(calls):
        assert_survived(kill_at(tmp_path / f"{name}-{number}", name, number, world_size=2, rank=rank))

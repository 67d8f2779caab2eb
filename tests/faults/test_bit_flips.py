"""One wrong bit anywhere in a checkpoint, or one file of another: refused, named, and the previous one is used."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.errors import BadInput
from pretrain import checkpoint
from pretrain.checkpoint import verification
from pretrain.checkpoint.manifest import MANIFEST, entries_below, folder_of, read_manifest
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

SEED = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoints of steps 2 and 4, written by two ranks under ZeRO 3."""
    folder = tmp_path_factory.mktemp("flips")
    case = {"dealing": "even", "steps": 4, "engine": {"zero_stage": 3}, "checkpoint": {"every_steps": 2}}
    run_ranks("tests.pretrain.zero_steps", [json.dumps(case), str(folder)])
    return folder / "run-0"


def assert_every_flip_is_refused(run: Path) -> None:
    draw = random.Random(SEED)
    newest = folder_of(run, 4)
    files = sorted(entries_below(newest))
    assert len(files) >= 8
    for name in files:
        path = newest / name
        before = path.read_bytes()
        position, bit = draw.randrange(len(before)), draw.randrange(8)
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([before[position] ^ (1 << bit)]))
        try:
            found, passed = checkpoint.find_latest(run)
            assert found is not None and found.step == 2, f"seed {SEED}: bit {bit} of byte {position} of {name}"
            assert [bad.step for bad in passed] == [4] and name in (passed[0].reason or "")
        finally:
            path.write_bytes(before)
    assert checkpoint.find_latest(run)[0] == checkpoint.Found(4, newest, None)


def test_one_flipped_bit_in_each_file_in_turn_is_refused_by_name(run: Path) -> None:
    assert_every_flip_is_refused(run)


def test_no_bit_of_the_manifest_can_flip_unseen(run: Path, tmp_path: Path) -> None:
    good = (folder_of(run, 4) / MANIFEST).read_bytes()
    bad = tmp_path / MANIFEST
    for position in range(0, len(good), 16):
        for bit in range(8):
            bad.write_bytes(good[:position] + bytes([good[position] ^ (1 << bit)]) + good[position + 1 :])
            with pytest.raises(BadInput):
                read_manifest(tmp_path)


def _nothing_read(path: Path, *arguments: object, **options: object) -> list[str]:
    return []


@pytest.mark.parametrize(
    ("part", "instead"), [("_wrong_hashes", _nothing_read), ("verify", lambda path, quiet=True: None)]
)
def test_verification_that_does_not_look_would_be_seen(
    run: Path, monkeypatch: pytest.MonkeyPatch, part: str, instead: Callable[..., object]
) -> None:
    monkeypatch.setattr(verification, part, instead)
    with pytest.raises(AssertionError, match=f"seed {SEED}"):
        assert_every_flip_is_refused(run)


def test_a_renamed_checkpoint_is_not_that_of_another_step(run: Path, tmp_path: Path) -> None:
    shutil.copytree(folder_of(run, 2), folder_of(tmp_path, 6))
    assert checkpoint.verify(folder_of(tmp_path, 6)) == "MANIFEST.json is of step 2"

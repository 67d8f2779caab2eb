"""A checkpoint from elsewhere: a program hidden in each of its files in turn is refused and does not run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.checkpoint.manifest import MANIFEST, entries_below, folder_of, seal
from pretrain.checkpoint.verification import sha256_of
from pretrain.consolidate import safe_unpickling
from pretrain.engine import Engine
from tests.ranks import started_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self._mark}'",)


def recompute(path: Path) -> None:
    """Give a checkpoint a manifest that fits its files as they are now."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    (path / MANIFEST).write_text(json.dumps(seal(manifest)))


def infect(path: Path, mark: Path, hidden: bool) -> None:
    """Put the payload into a file: as its whole content, or hidden in the state that it holds."""
    if not hidden:
        path.write_bytes(pickle.dumps(Payload(mark)))
        return
    with safe_unpickling():
        state = torch.load(path, weights_only=True)
    torch.save(state | {"more": Payload(mark)}, path)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every way to load said to every case; and the mark that a payload would leave."""
    folder = tmp_path_factory.mktemp("hostile")
    run, mark = folder / "run", folder / "payload-ran"
    with started_ranks("tests.faults.hostile_rank", [str(run)], 1) as (rank,):
        end = time.monotonic() + 120
        source = folder_of(run, 2)
        while not folder_of(run, 4).is_dir():
            assert rank.process.exitcode is None and time.monotonic() < end, rank.err.read_text()[-3000:]
            time.sleep(0.05)
        cases, files = folder / "preparing", sorted(entries_below(source))
        shutil.copytree(source, cases / "clean")
        for number, name in enumerate(files):
            for hidden in (False, True) if name.endswith(".pt") else (False,):
                for fits in (False, True) if name != MANIFEST else (False,):
                    path = cases / f"{number}-{'hidden' if hidden else 'whole'}-{'fits' if fits else 'listed'}"
                    shutil.copytree(source, path)
                    infect(path / name, mark, hidden)
                    if fits:
                        recompute(path)
        # A shard of the next checkpoint, with a manifest that fits it.
        shutil.copytree(source, cases / "swapped")
        shard = next(name for name in files if name.endswith("optim_states.pt"))
        shutil.copyfile(folder_of(run, 4) / shard, cases / "swapped" / shard)
        recompute(cases / "swapped")
        cases.rename(folder / "cases")
        rank.process.join(120)
        assert rank.process.exitcode == 0, rank.err.read_text()[-3000:]
        found = [json.loads(line) for line in rank.out.read_text().splitlines() if line.startswith('{"case"')]
    return {"files": files, "cases": {one.pop("case"): one for one in found}, "mark": mark}


def test_the_payload_would_run_without_the_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.save({}, tmp_path / "hidden")
    for name, hidden in (("whole", False), ("hidden", True)):
        infect(tmp_path / name, tmp_path / f"{name} ran", hidden)
        with contextlib.suppress(RuntimeError):
            # As DeepSpeed asks for it. What comes back need not be a checkpoint.
            torch.load(tmp_path / name, weights_only=False)
        assert (tmp_path / f"{name} ran").exists()


def test_the_engine_needs_no_environment_to_refuse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    infect(tmp_path / "whole", tmp_path / "ran", hidden=False)
    engine = object.__new__(Engine)

    def load_checkpoint(*arguments: Any, **options: Any) -> None:
        torch.load(tmp_path / "whole", weights_only=False)

    engine.module = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[]), load_checkpoint=load_checkpoint)
    with pytest.raises(pickle.UnpicklingError):
        engine.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_ours_loads_in_every_way(answers: dict[str, Any]) -> None:
    assert set(answers["cases"]["clean"].values()) == {"loaded"}


def test_a_shard_of_another_step_is_refused_by_name(answers: dict[str, Any]) -> None:
    said = answers["cases"]["swapped"]
    assert said["verify"] == "loaded"
    for way in ("resume", "weights"):
        assert "optim_states.pt is not of this checkpoint" in said[way] and "'step': 4" in said[way], said


def test_every_file_with_a_program_in_it_is_refused_by_name(answers: dict[str, Any]) -> None:
    cases, files = answers["cases"], answers["files"]
    assert not answers["mark"].exists()
    kinds = {name.rsplit("/", 1)[-1] for name in files}
    assert {MANIFEST, "trainer.json", "latest", "rng-rank-00000.safetensors"} < kinds
    assert sum(name.endswith(".pt") for name in files) == 2
    infected = {case: said for case, said in cases.items() if case not in ("clean", "swapped")}
    assert len(infected) == 1 + 3 * 2 + 2 * 2 * 2
    for case, said in infected.items():
        number, _, fits = case.split("-")
        name = files[int(number)]
        if fits == "listed":
            # Not even the bytes are right: nothing looks further.
            assert name in said["verify"], (case, said)
            continue
        assert said["verify"] == "loaded", "the manifest was to fit"
        for way in ("resume", "weights"):
            assert said[way].startswith("BadInput: ") and name in said[way], (way, said)
        if name.endswith(".pt"):
            assert "execute code" in said["resume"] or "not a file of a checkpoint" in said["resume"]
            assert said["universal"] != "loaded", said
        if name == "trainer.json":
            assert said["state"].startswith("BadInput: "), said

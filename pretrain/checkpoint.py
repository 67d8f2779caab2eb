"""Checkpoints that exist only when whole.

Ranks write into `.tmp-step-N.<id>` and fsync; after a barrier rank 0 writes `MANIFEST.json` with the size and SHA-256
of every file, fsyncs, renames to `step-N`, fsyncs the parent, and only then moves the `latest` hint and removes old
ones. Valid means: the manifest parses, every file that it lists is there with its size and hash, and nothing else is.
Resume takes the newest valid one and says which it passed over and why. Nothing in a checkpoint is unpickled: weights
load weights-only, generators are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from data_pipelines.atomic import atomic_file, fsync_folder
from data_pipelines.errors import BadInput
from pretrain import generators, resume
from pretrain.engine import Engine

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8})")
# What torch says of a file, and not of a lost rank or of memory.
_UNREADABLE = ("PytorchStreamReader", "loading state_dict")


@dataclass(frozen=True)
class Found:
    """One checkpoint directory and what is wrong with it, if anything."""

    step: int
    path: Path
    reason: str | None

    @property
    def valid(self) -> bool:
        """Whether it may be loaded."""
        return self.reason is None


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def verify(path: Path) -> str | None:
    """Why a checkpoint is invalid, or null. Reads every byte."""
    try:
        manifest = read_manifest(path)
    except BadInput as error:
        return str(error)
    files: dict[str, Any] = manifest["files"]
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    missing, extra = sorted(set(files) - there), sorted(there - set(files))
    if missing:
        return f"{missing[0]} is missing"
    if extra:
        return f"{extra[0]} is not in the manifest"
    for name, entry in files.items():
        size = (path / name).stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(_sha256, (path / name for name in files))
        for (name, entry), digest in zip(files.items(), hashes, strict=True):
            if digest != entry["sha256"]:
                return f"{name} does not have the SHA-256 of the manifest"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        BadInput: there is none, or it is not one.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["format_version"] != FORMAT_VERSION:
            raise BadInput(f"{path / MANIFEST} has format version {manifest['format_version']}, not {FORMAT_VERSION}")
        for name, entry in files.items():
            inside = (path / name).resolve().is_relative_to(path.resolve())
            if not inside or not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise BadInput(f"{path / MANIFEST} lists {name!r} wrongly")
        for key in ("run_id", "step", "world_size", "zero_stage"):
            manifest[key]
    except FileNotFoundError:
        raise BadInput(f"{MANIFEST} is missing") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise BadInput(f"{MANIFEST} does not parse ({type(error).__name__}: {error})") from None
    return dict(manifest)


def list_checkpoints(run_dir: Path) -> list[Found]:
    """Every checkpoint of a run, oldest first, each verified."""
    return [Found(step, path, verify(path)) for step, path in _directories(run_dir)]


def find_latest(run_dir: Path) -> tuple[Found | None, list[Found]]:
    """The newest valid checkpoint, and the newer invalid ones that were passed over."""
    passed: list[Found] = []
    for step, path in reversed(list(_directories(run_dir))):
        found = Found(step, path, verify(path))
        if found.valid:
            return found, passed
        passed.append(found)
    return None, passed


def save(engine: Engine, run_dir: Path, step: int, state: dict[str, Any], run_id: str, keep_last: int) -> Path:
    """Write the checkpoint of a step (all ranks call it) and remove what `keep_last` lets go.

    Args:
        engine: the run's engine.
        run_dir: run directory on a file system that all ranks share.
        step: completed optimizer steps.
        state: JSON-able trainer state, the same on every rank.
        run_id: id of the run, for the manifest.
        keep_last: valid checkpoints that stay.
    """
    parent = run_dir / "checkpoints"
    tag = engine.gather_objects(secrets.token_hex(4))[0]
    work = parent / f".tmp-step-{step:08d}.{tag}"
    if engine.is_main:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(".tmp-step-*"):
            shutil.rmtree(stale)
        work.mkdir()
        _write_json(work / "trainer.json", state)
    engine.barrier()
    engine.save(work / "deepspeed")
    save_file(_generators(engine.device), work / _generator_file(engine.rank))
    engine.barrier()
    mine = {name: _seal(work / name) for name in _share(work, engine.rank, engine.world_size)}
    entries = {name: entry for part in engine.gather_objects(mine) for name, entry in part.items()}
    final = folder_of(run_dir, step)
    if engine.is_main:
        manifest = {
            "format_version": FORMAT_VERSION,
            "run_id": run_id,
            "step": step,
            "world_size": engine.world_size,
            "zero_stage": engine.config.engine.zero_stage,
            "files": dict(sorted(entries.items())),
        }
        _write_json(work / MANIFEST, manifest)
        for folder in {file.parent for file in work.rglob("*")}:
            fsync_folder(folder)
        if final.exists():
            final.rename(parent / f".invalid-{final.name}.{tag}")
        work.rename(final)
        fsync_folder(parent)
        _write_json(parent / "latest", {"step": step})
        _remove_old(run_dir, final, keep_last)
    engine.barrier()
    return final


def read_state(path: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint."""
    return dict(json.loads((path / "trainer.json").read_text()))


def load(engine: Engine, path: Path, run_dir: Path, alive: Callable[[], None] = lambda: None) -> None:
    """Load a verified checkpoint into the engine, whatever ranks and ZeRO stage wrote it; all ranks call it.

    With the ranks, stage, precision and offload that wrote it everything comes back bit for bit. Otherwise it goes
    through `pretrain.universal`, whose form is kept below `run_dir`; a rank that was not there before draws its random
    generators from (seed, step, rank). `alive` is called now and then while that takes.

    Raises:
        BadInput: it is not of this model, or cannot be read here.
    """
    from pretrain import universal

    manifest = read_manifest(path)
    try:
        if universal.same_layout(engine, path):
            engine.load(path / "deepspeed")
        else:
            universal.load(engine, path, run_dir, alive)
    except (KeyError, AssertionError, pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _UNREADABLE):
            raise
        raise BadInput(resume.unreadable(path, error)) from error
    seed = engine.config.run.seed
    if engine.rank >= manifest["world_size"]:
        generators.derive(seed, manifest["step"], engine.rank, engine.device)
        return
    file = path / _generator_file(engine.rank)
    if not file.is_file():
        raise BadInput(f"{path.name}: {file.name}, the random generators of rank {engine.rank}, is missing")
    state = load_file(file)
    if engine.device.type == "cuda" and "cuda" not in state:
        generators.derive_device(seed, manifest["step"], engine.rank, engine.device)
    _restore_generators(state, engine.device)


def _directories(run_dir: Path) -> Iterator[tuple[int, Path]]:
    parent = run_dir / "checkpoints"
    if not parent.is_dir():
        return
    for path in sorted(parent.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path


def _share(work: Path, rank: int, world_size: int) -> list[str]:
    """The files that a rank seals: its own, and rank 0 those that name no rank."""
    names = sorted(str(file.relative_to(work)) for file in work.rglob("*") if file.is_file())

    def owner(name: str) -> int:
        match = re.search(r"(?:zero_pp_rank_|rng-rank-)(\d+)", name)
        return int(match[1]) % world_size if match else 0

    return [name for name in names if owner(name) == rank]


def _seal(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def _remove_old(run_dir: Path, newest: Path, keep_last: int) -> None:
    others = [path for _, path in _directories(run_dir) if path != newest]
    for path in others[: len(others) + 1 - keep_last]:
        gone = path.with_name(f".old-{path.name}")
        path.rename(gone)
        shutil.rmtree(gone)


def _generator_file(rank: int) -> str:
    return f"rng-rank-{rank:05d}.safetensors"


def _generators(device: torch.device) -> dict[str, torch.Tensor]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    if version != 3 or name != "MT19937":
        raise RuntimeError("unknown kind of random generator")
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_generators(state: dict[str, torch.Tensor], device: torch.device) -> None:
    gauss = float(state["python_gauss"])
    words = tuple(int(word) for word in state["python"])
    random.setstate((3, words, None if np.isnan(gauss) else gauss))
    position, has_gauss = (int(value) for value in state["numpy_position"])
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

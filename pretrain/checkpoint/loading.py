"""Going on from a checkpoint whose bytes have been verified: what it says it is, and its state in the engine."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from data_pipelines.errors import BadInput
from pretrain import resume
from pretrain.checkpoint.generators import (
    derive_device_generator,
    derive_generators,
    generator_file,
    restore_generators,
)
from pretrain.checkpoint.manifest import IDENTITY, TRAINER_STATE, ZERO_FOLDER, ZERO_TAG, ZERO_TAG_FILE, read_manifest
from pretrain.checkpoint.verification import share
from pretrain.consolidate import safe_unpickling

if TYPE_CHECKING:
    from pretrain.engine import Engine

# What torch says of a file, and not of a lost rank or of memory.
_UNREADABLE = ("PytorchStreamReader", "loading state_dict")


def read_state(path: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint.

    Raises:
        BadInput: it is not JSON.
    """
    file = path / TRAINER_STATE
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{file} does not parse ({type(error).__name__})") from None


def load(engine: Engine, path: Path, run_dir: Path, alive: Callable[[], None] = lambda: None) -> None:
    """Load a verified checkpoint into the engine, whatever ranks and ZeRO stage wrote it; all ranks call it.

    With the ranks, stage, precision and offload that wrote it everything comes back bit for bit. Otherwise it goes
    through `pretrain.universal`, whose form is kept below `run_dir`; a rank that was not there before draws its random
    generators from (seed, step, rank). `alive` is called now and then while that takes.

    Raises:
        BadInput: it is not of this model, cannot be read here, or a file of it is of another run, step or rank than the
            manifest says, or would execute code.
    """
    from pretrain import universal

    manifest = read_manifest(path)
    check_identities_together(engine, path, manifest)
    try:
        if universal.same_layout(engine, path):
            engine.load(path / ZERO_FOLDER)
        else:
            universal.load(engine, path, run_dir, alive)
    except (KeyError, AssertionError, pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _UNREADABLE):
            raise
        raise BadInput(resume.unreadable(path, error)) from error
    seed = engine.config.run.seed
    if engine.rank >= manifest["world_size"]:
        derive_generators(seed, manifest["step"], engine.rank, engine.device)
        return
    file = path / generator_file(engine.rank)
    if not file.is_file():
        raise BadInput(f"{path.name}: {file.name}, the random generators of rank {engine.rank}, is missing")
    state = load_file(file)
    if engine.device.type == "cuda" and "cuda" not in state:
        derive_device_generator(seed, manifest["step"], engine.rank, engine.device)
    restore_generators(state, engine.device)


def check_identities_together(engine: Engine, path: Path, manifest: dict[str, Any]) -> None:
    """`check_identities` with the files shared between the ranks, all of which call it and agree on the answer."""
    try:
        check_identities(path, manifest, share(manifest["files"], engine.rank, engine.world_size))
        problem = None
    except BadInput as error:
        problem = str(error)
    problems = [one for one in engine.gather_objects(problem) if one is not None]
    if problems:
        raise BadInput(problems[0])


def check_identities(path: Path, manifest: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Compare the run, step and rank that each shard of a checkpoint is of with the manifest. Maps files, reads little.

    Args:
        path: the checkpoint.
        manifest: its manifest.
        names: the files to look at; all by default.

    Raises:
        BadInput: one is of another run, step or rank, says nothing about it, or would execute code.
    """
    for name in sorted(manifest["files"] if names is None else names):
        if name.endswith(".pt"):
            found = _of_pt(path / name)
        elif name.endswith(".safetensors"):
            found = _of_safetensors(path / name)
        elif name == TRAINER_STATE:
            _check_state(path, manifest)
            continue
        elif name == ZERO_TAG_FILE:
            _check_tag(path / name)
            continue
        else:
            raise BadInput(f"{path / name}: no file of a checkpoint has such a name")
        expected = {"run_id": manifest["run_id"], "step": manifest["step"], "rank": manifest["files"][name]["rank"]}
        if found != expected:
            raise BadInput(f"{path / name} is not of this checkpoint: it says {found}, the manifest {expected}")


def _check_state(path: Path, manifest: dict[str, Any]) -> None:
    step = read_state(path).get("step")
    if step != manifest["step"]:
        raise BadInput(f"{path / TRAINER_STATE} is of step {step}, the manifest of step {manifest['step']}")


def _check_tag(path: Path) -> None:
    if path.read_bytes() != ZERO_TAG.encode():
        raise BadInput(f"{path}: does not say {ZERO_TAG}, as it does in a checkpoint")


def _of_pt(path: Path) -> Any:
    try:
        with safe_unpickling():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        first_line = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise BadInput(f"{path}: refused, it would execute code when loaded ({first_line})") from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: not a file of a checkpoint ({type(error).__name__})") from None
    return state.get(IDENTITY) if isinstance(state, dict) else None


def _of_safetensors(path: Path) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(IDENTITY, "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise BadInput(f"{path}: not a safetensors file ({type(error).__name__})") from None

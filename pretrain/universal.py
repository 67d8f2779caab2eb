"""Going on with another number of ranks or another ZeRO stage: a checkpoint in a form that knows neither.

Before such a resume rank 0 writes the checkpoint anew, one tensor at a time, into `RUN/universal/step-N-HASH`: per
parameter its master weights and moments whole, in safetensors, and a manifest with the size and SHA-256 of every file
and of the manifest of the checkpoint that it was made from. It appears under that name only when whole, serves later
starts too, and goes when its checkpoint goes. Then every rank takes its part of each tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipelines.atomic import atomic_file, fsync_folder
from data_pipelines.errors import BadInput
from data_pipelines.progress import Progress
from pretrain import checkpoint as checkpoints
from pretrain.engine import Engine
from pretrain.zero_reader import SavedModel, SavedParameter, open_saved

FOLDER = "universal"
MANIFEST = "FORM.json"
FORM_VERSION = 1
INDEX = "index.json"
_TEMPORARY = ".tmp-"
_FILE_BYTES = 64_000_000
_ELEMENT_BYTES = 4
_POLL_SECONDS = 0.2
_LAYOUT = ("zero_stage", "precision", "offload_optimizer", "offload_parameters")
"""Settings of the engine that DeepSpeed's own files depend on."""


def same_layout(engine: Engine, checkpoint: Path) -> bool:
    """Whether DeepSpeed itself can load a checkpoint, bit for bit: the same ranks, ZeRO stage, precision, offload."""
    manifest = checkpoints.read_manifest(checkpoint)
    old = checkpoints.read_state(checkpoint)["config"].get("engine", {})
    new = engine.config.engine.model_dump(mode="json")
    layout = all(old.get(name, new[name]) == new[name] for name in _LAYOUT)
    return layout and manifest["world_size"] == engine.world_size and manifest["zero_stage"] == new["zero_stage"]


def load(engine: Engine, checkpoint: Path, run_dir: Path, alive: Callable[[], None] = lambda: None) -> None:
    """Load a verified checkpoint of another layout into the engine, converting it first where that was not done yet.

    Args:
        engine: all ranks call this with theirs, the model prepared and untouched.
        checkpoint: `checkpoints/step-N`, of this run or of another.
        run_dir: this run's directory, for the converted form.
        alive: called now and then on every rank while a conversion goes on.

    Raises:
        BadInput: the checkpoint is not of this model, or there is no room for the form.
    """
    form = _converted(engine, checkpoint, run_dir, alive)
    index = json.loads((form / INDEX).read_text())
    parameters = index["parameters"]
    _check_model(engine, parameters, checkpoint)

    def read(name: str, kind: str) -> Tensor:
        with safe_open(form / parameters[name]["files"][kind], framework="pt") as file:
            tensor: Tensor = file.get_tensor(f"{name}/{kind}")
            return tensor

    buffers = {}
    if index["buffers"]:
        with safe_open(form / index["buffers"], framework="pt") as file:
            buffers = {name: file.get_tensor(name) for name in file.keys()}
    engine.fill(read, {name: entry["steps"] for name, entry in parameters.items()}, buffers)


def convert(checkpoint: Path, run_dir: Path, progress: Progress, advanced: Callable[[], None] = lambda: None) -> Path:
    """Write the form of a verified checkpoint, about one tensor in memory at a time, and return its folder.

    Raises:
        BadInput: the checkpoint's files cannot be read, or the disk has no room.
    """
    manifest = checkpoints.read_manifest(checkpoint)
    model = open_saved(checkpoint / "deepspeed", manifest["world_size"])
    final = folder_of(checkpoint, run_dir)
    final.parent.mkdir(parents=True, exist_ok=True)
    total = sum(_bytes(parameter) * len(parameter.kinds) for parameter in model.parameters)
    free = shutil.disk_usage(final.parent).free
    if free < total:
        raise BadInput(f"{final.parent}: converting {checkpoint.name} needs {total:,} bytes, and {free:,} are free")
    work = final.with_name(f"{_TEMPORARY}{final.name}.{secrets.token_hex(4)}")
    work.mkdir()
    progress.start(total // 1_000_000)
    try:
        files = _write(model, work, progress, advanced)
        source = {"path": str(checkpoint.resolve()), "manifest_sha256": _sha256(checkpoint / checkpoints.MANIFEST)}
        entries = {"form_version": FORM_VERSION, "step": manifest["step"], "source": source, "files": files}
        _write_json(work / MANIFEST, entries)
        fsync_folder(work)
        if final.exists():
            shutil.rmtree(final)
        work.rename(final)
        fsync_folder(final.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return final


def folder_of(checkpoint: Path, run_dir: Path) -> Path:
    """Where the form of a checkpoint lies in a run; its name changes with the checkpoint's content."""
    return run_dir / FOLDER / f"{checkpoint.name}-{_sha256(checkpoint / checkpoints.MANIFEST)[:12]}"


def why_not(form: Path, checkpoint: Path) -> str | None:
    """Why a converted form is not to be used for a checkpoint, or null. Reads every byte."""
    try:
        manifest = json.loads((form / MANIFEST).read_text())
        version, files, source = manifest["form_version"], dict(manifest["files"]), manifest["source"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        made_from = source["manifest_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if version != FORM_VERSION:
        return f"form version {version}, not {FORM_VERSION}"
    if made_from != _sha256(checkpoint / checkpoints.MANIFEST):
        return f"it was made from another {checkpoint.name}"
    there = {entry.name for entry in form.iterdir()} - {MANIFEST}
    for name in sorted(there ^ expected.keys()):
        return f"{name} is {'not listed' if name in there else 'missing'}"
    for name, (size, digest) in expected.items():
        if (form / name).stat().st_size != size:
            return f"{name} has {(form / name).stat().st_size} bytes instead of {size}"
        if _sha256(form / name) != digest:
            return f"{name} does not have the SHA-256 of {MANIFEST}"
    return None


def prune(run_dir: Path) -> None:
    """Remove forms whose checkpoint is gone, and what an interrupted conversion left. One process a run calls it."""
    for form in sorted((run_dir / FOLDER).glob("*")) + sorted((run_dir / FOLDER).glob(f"{_TEMPORARY}*")):
        try:
            source = json.loads((form / MANIFEST).read_text())["source"]
            manifest = Path(source["path"]) / checkpoints.MANIFEST
            wanted = not form.name.startswith(_TEMPORARY) and source["manifest_sha256"] == _sha256(manifest)
        except (OSError, ValueError, KeyError, TypeError):
            wanted = False
        if not wanted:
            shutil.rmtree(form, ignore_errors=True)


def _converted(engine: Engine, checkpoint: Path, run_dir: Path, alive: Callable[[], None]) -> Path:
    """The folder of a checkpoint's form, made by rank 0 where it is not there yet.

    The others wait in short collectives, not in one that a large model's conversion would outlast.
    """
    work = _Background(lambda advanced: _find_or_convert(checkpoint, run_dir, advanced)) if engine.is_main else None
    seen = -1
    while True:
        beats, done, problem, fault = engine.gather_objects(work.state() if work is not None else None)[0]
        if beats != seen:
            seen = beats
            alive()
        if done:
            break
        time.sleep(_POLL_SECONDS)
    if fault:
        raise RuntimeError(f"{checkpoint.name} was not converted: {problem}") from (work.error if work else None)
    if problem:
        raise BadInput(problem)
    return folder_of(checkpoint, run_dir)


def _find_or_convert(checkpoint: Path, run_dir: Path, advanced: Callable[[], None]) -> None:
    prune(run_dir)
    form = folder_of(checkpoint, run_dir)
    with Progress(f"converting {checkpoint.name} for another layout", "MB") as progress:
        if form.exists():
            reason = why_not(form, checkpoint)
            if reason is None:
                return
            progress.say(f"converting {checkpoint.name} again: {form}: {reason}")
        convert(checkpoint, run_dir, progress, advanced)
        progress.say(f"converted {checkpoint.name} into {form}")


class _Background:
    """A piece of work in a thread of its own, so that the ranks can go on telling each other that they live."""

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._beats = 0
        self._work = work
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="conversion", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work(self._advance)
        except BaseException as error:
            self.error = error

    def _advance(self) -> None:
        self._beats += 1

    def state(self) -> tuple[int, bool, str, bool]:
        """How often it advanced, whether it ended, what went wrong, and whether that is a fault of ours."""
        done = not self._thread.is_alive()
        problem = "" if self.error is None else str(self.error) or type(self.error).__name__
        return self._beats, done, problem, bool(problem) and not isinstance(self.error, BadInput)


def _write(
    model: SavedModel, work: Path, progress: Progress, advanced: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Write tensors, buffers and the index; returns the manifest's entries."""
    files: dict[str, dict[str, Any]] = {}
    parameters: dict[str, dict[str, Any]] = {
        each.name: {"shape": list(each.shape), "steps": each.steps, "files": {}} for each in model.parameters
    }
    done = 0
    for number, batch in enumerate(_batches(model.parameters)):
        name = f"tensors-{number:05d}.safetensors"
        save_file({f"{each.name}/{kind}": each.tensor(kind) for each, kind in batch}, work / name)
        files[name] = _seal(work / name)
        for each, kind in batch:
            parameters[each.name]["files"][kind] = name
            before, done = done, done + _bytes(each)
            progress.advance(done // 1_000_000 - before // 1_000_000)
        advanced()
    buffers = "buffers.safetensors" if model.buffers else None
    if buffers is not None:
        save_file({name: buffer.contiguous().clone() for name, buffer in model.buffers.items()}, work / buffers)
        files[buffers] = _seal(work / buffers)
    _write_json(work / INDEX, {"parameters": parameters, "buffers": buffers})
    files[INDEX] = _seal(work / INDEX)
    return files


def _batches(parameters: list[SavedParameter]) -> Iterator[list[tuple[SavedParameter, str]]]:
    """Tensors, as parameter and kind, by the file: small ones together, a large one alone."""
    batch: list[tuple[SavedParameter, str]] = []
    size = 0
    for parameter in parameters:
        for kind in parameter.kinds:
            if batch and size + _bytes(parameter) > _FILE_BYTES:
                yield batch
                batch, size = [], 0
            batch.append((parameter, kind))
            size += _bytes(parameter)
    if batch:
        yield batch


def _bytes(parameter: SavedParameter) -> int:
    """Bytes of one of its tensors."""
    return _ELEMENT_BYTES * parameter.numel


def _check_model(engine: Engine, parameters: dict[str, Any], checkpoint: Path) -> None:
    shapes = engine.parameter_shapes()
    for name in sorted(shapes.keys() ^ parameters.keys()):
        raise BadInput(f"{checkpoint.name} has {'no' if name in shapes else 'the unknown'} parameter {name}")
    for name, shape in shapes.items():
        if list(shape) != parameters[name]["shape"]:
            raise BadInput(f"{checkpoint.name}: {name} has shape {parameters[name]['shape']}, here {list(shape)}")


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

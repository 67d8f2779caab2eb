"""What a checkpoint is made of: its name, its manifest, and whether its files are those that the manifest lists.

Nothing here reads a file's content beyond the manifest, and nothing imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput

FORMAT_VERSION = 2
"""2: every shard says in itself which run, step and rank it is of."""
MANIFEST = "MANIFEST.json"
IDENTITY = "triptych"
"""Key of the identity in a `.pt` file, and of its JSON in the header of a `.safetensors` file."""
TRAINER_STATE = "trainer.json"
ZERO_FOLDER, ZERO_TAG = "deepspeed", "state"
"""Where DeepSpeed's files lie, and the name of the folder in it that its own programs look for."""
ZERO_TAG_FILE = f"{ZERO_FOLDER}/latest"
_NAME = re.compile(r"step-(\d{8})")


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


def checkpoints_folder(run_dir: Path) -> Path:
    """The folder of all of a run's checkpoints."""
    return run_dir / "checkpoints"


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints_folder(run_dir) / f"step-{step:08d}"


def directories(run_dir: Path) -> Iterator[tuple[int, Path]]:
    """Steps and directories of a run's checkpoints, valid or not, oldest first."""
    parent = checkpoints_folder(run_dir)
    if not parent.is_dir():
        return
    for path in sorted(parent.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match[1]), path


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its own SHA-256, so that damage to it shows as damage to the files does."""
    return manifest | {"sha256": _digest(manifest)}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        BadInput: there is none, or it is not one.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            raise BadInput(f"{path / MANIFEST} has format version {manifest['format_version']}, not {FORMAT_VERSION}")
        if manifest.pop("sha256") != _digest(manifest):
            raise BadInput(f"{MANIFEST} does not have the SHA-256 that it names itself")
        for key, kind in (("run_id", str), ("step", int), ("world_size", int), ("zero_stage", int), ("files", dict)):
            if not isinstance(manifest[key], kind):
                raise TypeError(f"{key} is {manifest[key]!r}")
        for name, entry in manifest["files"].items():
            kinds = (("bytes", int), ("sha256", str), ("rank", int))
            if not _inside(name) or not all(isinstance(entry.get(key), kind) for key, kind in kinds):
                raise BadInput(f"{path / MANIFEST} lists {name!r} wrongly")
    except FileNotFoundError:
        raise BadInput(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise BadInput(f"{MANIFEST} cannot be read ({error})") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise BadInput(f"{MANIFEST} does not parse ({type(error).__name__}: {error})") from None
    return dict(manifest)


def wrong_file(path: Path, manifest: dict[str, Any]) -> str | None:
    """The first file that is missing, unlisted or of another size, or null. Reads no file."""
    files: dict[str, Any] = manifest["files"]
    named = _NAME.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        return f"{MANIFEST} is of step {manifest['step']}"
    try:
        there = entries_below(path)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    missing, extra = sorted(files.keys() - there.keys()), sorted(there.keys() - files.keys() - {MANIFEST})
    if missing:
        return f"{missing[0]} is missing"
    if extra:
        return f"{extra[0]} is not in the manifest"
    for name, entry in files.items():
        if there[name] != entry["bytes"]:
            size = "is no plain file" if there[name] is None else f"has {there[name]} bytes"
            return f"{name} {size} instead of {entry['bytes']}"
    return None


def looks_whole(path: Path) -> bool:
    """Whether all files of a checkpoint are there at their size, unread: what is cheap to know of an old one."""
    try:
        return wrong_file(path, read_manifest(path)) is None
    except BadInput:
        return False


def bytes_of(path: Path) -> int:
    """Size of all files of a checkpoint together, valid or not."""
    try:
        return sum(size or 0 for size in entries_below(path).values())
    except OSError:
        return 0


def entries_below(path: Path) -> dict[str, int | None]:
    """Names of all that is below a folder, with its size where it is a plain file; no link is followed."""
    found: dict[str, int | None] = {}
    for folder, below, names in os.walk(path):
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        for name in names + links:
            file = os.path.join(folder, name)
            about = os.lstat(file)
            found[os.path.relpath(file, path)] = about.st_size if stat.S_ISREG(about.st_mode) else None
    return found


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _inside(name: str) -> bool:
    """Whether a name from a manifest is a path below the checkpoint, as we write them."""
    return bool(name) and os.path.normpath(name) == name and not os.path.isabs(name) and not name.startswith("..")

"""What rank 0 alone does: ask for room before a checkpoint is written, and give it its name once it is.

The order is what makes a checkpoint exist only when whole: all files are on the disk, then the manifest, then the
folders that name them, then the rename, then the folder that holds the name.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.atomic import atomic_file, fsync_folder
from pretrain.checkpoint import retention
from pretrain.checkpoint.manifest import MANIFEST, checkpoints_folder, directories, entries_below, folder_of
from pretrain.checkpoint.writer import Bytes, write_files

# The run's logs and metrics lie on the same file system and must be able to grow.
_RESERVE_BYTES = 1 << 20


def temporary_folder(run_dir: Path, step: int) -> Path:
    """A new name to write the checkpoint of a step under."""
    name = f"{retention.TEMPORARY}{folder_of(run_dir, step).name}.{secrets.token_hex(4)}"
    return checkpoints_folder(run_dir) / name


def lack_of_room(run_dir: Path, needed: int) -> str | None:
    """Why `needed` bytes, and a little for the run's logs, do not fit where checkpoints go, or null."""
    needed += _RESERVE_BYTES
    folder = checkpoints_folder(run_dir)
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(run_dir)
        available = available_bytes(folder)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if available >= needed:
        return None
    return f"no room for it: {needed:,} bytes needed, {available:,} bytes available at {folder}"


def available_bytes(folder: Path) -> int:
    """What may still be written to the file system of a folder."""
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize


def commit(work: Path, run_dir: Path, manifest: Mapping[str, Any]) -> Path:
    """Make the files in `work`, all of them on the disk, the checkpoint of their step.

    Args:
        work: the temporary folder that all ranks have written into.
        run_dir: the run directory.
        manifest: the manifest, whose `files` are what all ranks say to have written.

    Returns:
        The checkpoint.

    Raises:
        OSError: it could not be written.
        RuntimeError: rank 0 does not see what another rank wrote.
    """
    files = manifest["files"]
    seen = entries_below(work)
    for name, entry in files.items():
        if seen.get(name) != entry["bytes"]:
            raise RuntimeError(
                f"{name} of rank {entry['rank']} is not there as that rank wrote it; "
                f"is {run_dir} on a file system that all nodes share?"
            )
    write_files(work, {MANIFEST: Bytes(json.dumps(manifest, indent=1).encode())}, rank=0)
    for folder, _, _ in os.walk(work, topdown=False):
        fsync_folder(Path(folder))
    final = folder_of(run_dir, manifest["step"])
    for step, path in directories(run_dir):
        if step >= manifest["step"]:
            # Either it is not valid, or the run went back behind it: the next resume must not take it.
            aside = retention.set_aside(path)
            print(f"set {path} aside as {aside.name}: step {manifest['step']} is written anew", file=sys.stderr)
    work.rename(final)
    fsync_folder(final.parent)
    return final


def write_hint(run_dir: Path, step: int) -> None:
    """Name the newest checkpoint in `latest`, for people and other programs; nothing of ours relies on it."""
    with atomic_file(checkpoints_folder(run_dir) / "latest") as file:
        file.write(json.dumps({"step": step}).encode())


def discard(work: Path) -> None:
    """Remove what was written of a checkpoint that is not to be; what cannot be removed, the next start clears."""
    shutil.rmtree(work, ignore_errors=True)

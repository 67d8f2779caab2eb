"""Which checkpoints stay, and how others go: under a hidden name first, so that half of one is never taken for one."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from data_pipelines.atomic import fsync_folder
from pretrain.checkpoint.manifest import checkpoints_folder, directories, looks_whole

TEMPORARY, GOING, ASIDE = ".tmp-", ".old-", ".aside-"


def outdated(run_dir: Path, keep_last: int, keep_every: int | None) -> list[Path]:
    """The checkpoints that may go, oldest first.

    The newest `keep_last` whole ones stay, whole as far as can be seen without reading them, and those of every
    `keep_every`-th step for ever.
    """
    found = list(directories(run_dir))
    whole = [step for step, path in found if looks_whole(path)]
    if len(whole) <= keep_last:
        return []
    oldest_kept = whole[-keep_last]
    return [path for step, path in found if step < oldest_kept and not (keep_every and step % keep_every == 0)]


def remove(path: Path) -> None:
    """Remove a checkpoint, so that a crash at any moment leaves it whole or not there at all."""
    gone = path.with_name(f"{GOING}{path.name}.{secrets.token_hex(4)}")
    path.rename(gone)
    fsync_folder(path.parent)
    shutil.rmtree(gone)


def set_aside(path: Path) -> Path:
    """Give a checkpoint that is in the way a hidden name, under which nothing looks for it and nothing removes it."""
    aside = path.with_name(f"{ASIDE}{path.name}.{secrets.token_hex(4)}")
    path.rename(aside)
    return aside


def clear_leftovers(run_dir: Path) -> list[str]:
    """Remove what saves and removals that were cut short have left, and return its names. No other run may be writing.

    A leftover that cannot be removed stays; nothing takes it for a checkpoint.
    """
    parent = checkpoints_folder(run_dir)
    left = [path for prefix in (TEMPORARY, GOING) for path in sorted(parent.glob(f"{prefix}*"))]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in left]

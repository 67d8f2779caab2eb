"""Checks of what one config needs: its run directory and the room there, its owner, its data."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

from data_pipelines.atomic import fsync_folder
from data_pipelines.errors import BadInput
from launch.doctor.finding import Finding, error, ok, size, warning
from launch.doctor.machine import num_parameters
from launch.incident import last_checkpoint
from pretrain.checkpoint.manifest import bytes_of, directories
from pretrain.config import Config
from pretrain.owner import OWNER_FILE, is_ending, is_gone, read_owner

_SLOW_SECONDS = 2.0
# Weights, their fp32 master copies and two moments, in fp32.
_BYTES_A_PARAMETER = 16


def run_directory(config: Config) -> Finding:
    """Whether files there can be written, flushed, renamed and linked, as checkpoints and the owner's file are."""
    folder = _existing(Path(config.run.dir))
    if not folder.is_dir():
        return error("run directory", f"{folder} is no folder", "use another run.dir")
    probe = folder / f".doctor-{secrets.token_hex(4)}"
    other = probe.with_name(probe.name + "-renamed")
    start, doing = time.monotonic(), "written"
    try:
        with probe.open("xb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            doing = "flushed to disk"
            os.fsync(file.fileno())
        doing = "renamed"
        os.rename(probe, other)
        doing = "linked"
        os.link(other, probe)
        doing = "flushed with their folder"
        fsync_folder(folder)
    except OSError as refused:
        found = f"in {folder} files cannot be {doing} ({refused.strerror})"
        return error("run directory", found, "use a run.dir on a file system that can, and that you may write to")
    finally:
        probe.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
    seconds = time.monotonic() - start
    if seconds > _SLOW_SECONDS:
        return warning(
            "run directory", f"{folder}: writing 4 KB took {seconds:.1f} s", "checkpoints will be slow there"
        )
    return ok("run directory", f"{config.run.dir} can be written, flushed, renamed and linked in")


def owner(config: Config) -> Finding:
    """Whether another run writes there."""
    file = Path(config.run.dir) / OWNER_FILE
    found = read_owner(file.parent)
    if found is None and file.exists():
        return error("owner", f"{file} is no record of an owner", "if no other run writes there, remove it")
    if found is None:
        return ok("owner", "none")
    gone = is_gone(found)
    if gone is None:
        wait = max(config.supervisor.owner_seconds, 3 * found.beat_seconds)
        return warning(
            "owner", str(found), f"a start watches its heartbeat for {wait:.0f} s, and goes on if it is gone"
        )
    if gone:
        return ok("owner", f"{found}: its process has ended, the next start follows it")
    if is_ending(found):
        return warning("owner", f"{found}: has lost its launcher or supervisor", "a start waits for it to save and end")
    return error("owner", f"a run that is going on ({found})", "stop that one first, or use another run.dir")


def room(config: Config) -> Finding:
    """Room for the checkpoints that stay, and the one that is written before the oldest goes."""
    run_dir = Path(config.run.dir)
    free = shutil.disk_usage(_existing(run_dir)).free
    newest = last_checkpoint(run_dir)
    about = "" if newest else "about "
    each = bytes_of(newest[1]) if newest else num_parameters(config) * _BYTES_A_PARAMETER
    wanted = config.checkpoint.keep_last + 1
    found = f"{size(free)} free, a checkpoint takes {about}{size(each)}, up to {wanted} are there at a time"
    if newest and free < each:
        return error("room", found, "make room, or use another run.dir")
    there = len(list(directories(run_dir)))
    if free < each * max(1, wanted - there):
        return warning("room", found, "make room, lower checkpoint.keep_last, or use another run.dir")
    return ok("room", found)


def data(config: Config) -> list[Finding]:
    """Whether each dataset can be opened."""
    from data_pipelines import open_dataset

    built = {Path(wanted.out).resolve() for wanted in config.data.build}
    findings = []
    for source in [*config.data.train_sources, *config.data.eval_sources]:
        try:
            dataset = open_dataset(source.path, config.data.remote)
            findings.append(ok("data", f"{source.path}: {len(dataset)} samples"))
        except BadInput as refused:
            if Path(source.path).resolve() in built:
                findings.append(ok("data", f"{source.path}: is built at the start"))
            else:
                findings.append(error("data", str(refused), "mend data.train or data.eval"))
        except OSError as refused:
            findings.append(error("data", f"{source.path}: {refused}", "look at the network and the address"))
    return findings


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists() and folder.parent != folder:
        folder = folder.parent
    return folder

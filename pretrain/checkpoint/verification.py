"""Reading every byte of a checkpoint before it is trusted: files in parallel, and at resume shared between ranks."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import BadInput
from data_pipelines.progress import Progress
from pretrain.checkpoint.manifest import Found, directories, read_manifest, wrong_file

if TYPE_CHECKING:
    from pretrain.engine import Engine

_BLOCK_BYTES = 4 << 20
_MEGABYTE = 1_000_000


def verify(path: Path, quiet: bool = True) -> str | None:
    """Why a checkpoint is invalid, or null. Reads every byte; says how far it is unless `quiet`."""
    try:
        manifest = read_manifest(path)
    except BadInput as error:
        return str(error)
    return wrong_file(path, manifest) or _first(_wrong_hashes(path, manifest["files"], manifest["files"], quiet))


def list_checkpoints(run_dir: Path, quiet: bool = True) -> list[Found]:
    """Every checkpoint of a run, oldest first, each verified."""
    return [Found(step, path, verify(path, quiet)) for step, path in directories(run_dir)]


def find_latest(run_dir: Path, quiet: bool = True) -> tuple[Found | None, list[Found]]:
    """The newest valid checkpoint, and the newer invalid ones that were passed over."""
    return _newest_valid(list(directories(run_dir)), lambda path: verify(path, quiet))


def verify_together(engine: Engine, path: Path) -> str | None:
    """`verify` with the bytes shared between the ranks, all of which call it and get the same answer."""
    manifest: dict[str, Any] | None = None
    reason: str | None = None
    if engine.is_main:
        try:
            manifest = read_manifest(path)
            reason = wrong_file(path, manifest)
        except BadInput as error:
            reason = str(error)
    # Rank 0's view decides: another node may still cache an older one of a shared folder.
    manifest, reason = engine.gather_objects((manifest, reason))[0]
    if manifest is None or reason is not None:
        return reason
    files: dict[str, Any] = manifest["files"]
    mine = share(files, engine.rank, engine.world_size)
    wrong = engine.gather_objects(_wrong_hashes(path, files, mine, quiet=not engine.is_main))
    return _first(message for part in wrong for message in part)


def find_latest_together(engine: Engine, run_dir: Path) -> tuple[Found | None, list[Found]]:
    """`find_latest` with the bytes shared between the ranks, all of which call it and get the same answer."""
    candidates = engine.gather_objects(list(directories(run_dir)) if engine.is_main else None)[0]
    return _newest_valid(candidates, lambda path: verify_together(engine, path))


def share(files: dict[str, Any], rank: int, world_size: int) -> list[str]:
    """The files that a rank reads, so that all ranks read about as many bytes: the largest first, to whom has least."""
    load = [0] * world_size
    mine = []
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        least = load.index(min(load))
        load[least] += files[name]["bytes"]
        if least == rank:
            mine.append(name)
    return mine


def sha256_of(path: Path, count: Callable[[int], None] = lambda number: None) -> str:
    """SHA-256 of a file in hex; `count` gets the bytes as they are read."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            count(size)
    return digest.hexdigest()


def _newest_valid(
    candidates: list[tuple[int, Path]], check: Callable[[Path], str | None]
) -> tuple[Found | None, list[Found]]:
    passed: list[Found] = []
    for step, path in reversed(candidates):
        found = Found(step, path, check(path))
        if found.valid:
            return found, passed
        passed.append(found)
    return None, passed


def _wrong_hashes(path: Path, files: dict[str, Any], names: Iterable[str], quiet: bool) -> list[str]:
    """What is wrong with the content of those of the files that `names` names."""
    names = sorted(names)
    total = sum(files[name]["bytes"] for name in names)
    with Progress(f"verifying {path.name}", "MB", quiet) as progress, ThreadPoolExecutor(_num_threads()) as pool:
        progress.start(total // _MEGABYTE)
        counter = _Megabytes(progress)

        def judge(name: str) -> str | None:
            try:
                found = sha256_of(path / name, counter.add)
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
            return None if found == files[name]["sha256"] else f"{name} does not have the SHA-256 of the manifest"

        return [wrong for wrong in pool.map(judge, names) if wrong is not None]


class _Megabytes:
    """Counts bytes of several threads and advances a bar by whole megabytes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        with self._lock:
            before = self._bytes // _MEGABYTE
            self._bytes += number
            self._progress.advance(self._bytes // _MEGABYTE - before)


def _num_threads() -> int:
    # Shared file systems answer several readers faster than one; more than a few only contend for the cores.
    return max(2, min(8, len(os.sched_getaffinity(0))))


def _first(messages: Iterable[str]) -> str | None:
    return next(iter(sorted(messages)), None)

"""One shard from a remote folder into an open file: resumed where it ended, and verified."""

from __future__ import annotations

import hashlib
import os
import threading

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import BadInput
from data_pipelines.remote.folder import CHUNK_BYTES, Attempts, Broken, RemoteFolder, WrongSize

# A first part from an earlier run may be damaged, and a file may be replaced while it is read; more is no accident.
_MOST_MISMATCHES = 2


def download(
    folder: RemoteFolder,
    path: str,
    descriptor: int,
    num_bytes: int,
    sha256: str,
    settings: RemoteConfig,
    stop: threading.Event | None = None,
) -> None:
    """Complete the file behind `descriptor`, which may hold its first bytes already.

    Raises `BadInput` when the attempts are used up (what came stays in the file), and when size or SHA-256 are wrong
    time and again (the file is then empty). Raises `Stopped` once `stop` is set.
    """
    where = f"{folder.location}/{path}"
    attempts = Attempts(where, settings, stop)
    if os.fstat(descriptor).st_size > num_bytes:
        os.ftruncate(descriptor, 0)
    digest, place = _hash(descriptor)
    mismatches = 0
    while True:
        wrong = ""
        try:
            if place < num_bytes:
                for chunk in folder.stream(path, place, num_bytes):
                    attempts.progress()
                    if place + len(chunk) > num_bytes:
                        raise WrongSize("more bytes at the server")
                    _write(descriptor, chunk, place)
                    digest.update(chunk)
                    place += len(chunk)
                if place < num_bytes:
                    raise Broken(f"cut at byte {place:,} of {num_bytes:,}")
            if digest.hexdigest() == sha256:
                return
            wrong = f"SHA-256 {digest.hexdigest()[:12]}..., in dataset.json {sha256[:12]}..."
        except Broken as error:
            attempts.failed(error)
            continue
        except WrongSize as error:
            wrong = f"{error}, in dataset.json {num_bytes:,}"
        os.ftruncate(descriptor, 0)
        digest, place = hashlib.sha256(), 0
        mismatches += 1
        if mismatches > _MOST_MISMATCHES:
            raise BadInput(f"{where}: not the shard of this dataset, in {mismatches} downloads: {wrong}")
        attempts.failed(Broken(wrong))


def _hash(descriptor: int) -> tuple[hashlib._Hash, int]:
    """The hash of what is there, and how much that is."""
    digest, place = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, CHUNK_BYTES, place):
        digest.update(chunk)
        place += len(chunk)
    return digest, place


def _write(descriptor: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written

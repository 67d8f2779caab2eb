"""One rank's files of a checkpoint, written, hashed and flushed to the disk by a thread while training goes on."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

_NICENESS = 10


class Content(Protocol):
    """What a file is to hold."""

    num_bytes: int

    def write(self, file: Any) -> None:
        """Write it all into `file`."""


class Bytes:
    """Content that is known as it will lie in the file."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.num_bytes = len(data)

    def write(self, file: Any) -> None:
        file.write(self._data)


class HashedFile:
    """A new file that is hashed as it is written, and on the disk when it is closed without an error."""

    def __init__(self, path: Path, count: Callable[[int], None] = lambda number: None) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._digest = hashlib.sha256()
        self._count = count
        self.num_bytes = 0
        self.error: OSError | None = None
        """The first error of a write, which torch's writer hides behind one of its own."""

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        if self.error is not None and error is not self.error:
            raise self.error from error

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        written = 0
        try:
            while written < len(view):
                step = os.write(self._descriptor, view[written : written + (64 << 20)])
                written += step
                self._count(step)
        except OSError as error:
            self.error = self.error or error
            raise
        self.num_bytes += written
        return written

    def flush(self) -> None:
        """Nothing is held back; torch's writer asks for it."""

    def entry(self, rank: int) -> dict[str, Any]:
        """The file's line in the manifest."""
        return {"bytes": self.num_bytes, "sha256": self._digest.hexdigest(), "rank": rank}


class Work:
    """A thread that does one thing, and what came of it."""

    def __init__(self, what: Callable[[Callable[[int], None]], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.progress = 0
        """A number that grows while something happens."""
        self._what = what
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has come to an end, good or bad."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait until it is done, or for so long."""
        self._thread.join(seconds)

    def _run(self) -> None:
        if sys.platform == "linux":
            # Here a thread has a niceness of its own, and where cores are few, training goes first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            self.result = self._what(self._count)
        except BaseException as error:
            self.error = error

    def _count(self, number: int) -> None:
        self.progress += number


def write_files(
    folder: Path, files: Mapping[str, Content], rank: int, count: Callable[[int], None] = lambda number: None
) -> dict[str, dict[str, Any]]:
    """Write new files below `folder` and flush them to the disk.

    Args:
        folder: the checkpoint's temporary folder, made where it is not there.
        files: content of each file by its path below `folder`.
        rank: who writes.
        count: gets bytes as they are written.

    Returns:
        The files' entries in the manifest, by path.

    Raises:
        OSError: a file could not be written; `filename` names it.
    """
    entries = {}
    for name, content in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with HashedFile(path, count) as file:
                content.write(file)
        except OSError as error:
            error.filename = str(path)
            raise
        entries[name] = file.entry(rank)
    return entries

"""One rank's files of a checkpoint, written, hashed and flushed to the disk by a thread while training goes on."""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

_NICENESS = 5
_BLOCK_BYTES = 8 << 20


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
        self._small = bytearray()
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
                self._write_small()
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        if self.error is not None and error is not None and error is not self.error:
            raise self.error from error

    def write(self, data: Any) -> int:
        """Append bytes. What is small waits for more, since torch writes many headers of a few bytes."""
        view = memoryview(data).cast("B")
        if len(self._small) + len(view) <= _BLOCK_BYTES:
            self._small += view
        else:
            self._write_small()
            self._write_out(view)
        return len(view)

    def flush(self) -> None:
        """Torch's writer asks for it at its end; `__exit__` does more."""

    def entry(self, rank: int) -> dict[str, Any]:
        """The file's line in the manifest, once it is closed."""
        return {"bytes": self.num_bytes, "sha256": self._digest.hexdigest(), "rank": rank}

    def _write_small(self) -> None:
        small, self._small = self._small, bytearray()
        self._write_out(memoryview(small))

    def _write_out(self, view: memoryview) -> None:
        try:
            for start in range(0, len(view), _BLOCK_BYTES):
                block = view[start : start + _BLOCK_BYTES]
                self._digest.update(block)
                while block:
                    written = os.write(self._descriptor, block)
                    block = block[written:]
                    self.num_bytes += written
                    self._count(written)
        except OSError as error:
            self.error = self.error or error
            raise


class Work:
    """One thing that the thread has to do, and what came of it."""

    def __init__(self, what: Callable[[Callable[[int], None]], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self.progress = 0
        """A number that grows while something happens."""
        self._what = what
        self._ended = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it has come to an end, good or bad."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> None:
        """Wait until it is done, or for so long."""
        self._ended.wait(seconds)

    def do(self) -> None:
        """Do it, in the thread."""
        try:
            self.result = self._what(self._count)
        except BaseException as error:
            self.error = error
        finally:
            self._ended.set()

    def _count(self, number: int) -> None:
        self.progress += number


class WriterThread:
    """A rank's one thread for checkpoints; it ends with the process, whatever it is waiting for."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Work] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def start(self, what: Callable[[Callable[[int], None]], Any]) -> Work:
        """Have something done; it is called with a function that counts its progress."""
        work = Work(what)
        self._waiting.put(work)
        return work

    def _run(self) -> None:
        if sys.platform == "linux":
            # Here a thread has a niceness of its own, and where cores are few, training goes first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            self._waiting.get().do()


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

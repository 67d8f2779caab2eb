"""A folder of whole, verified files that the processes of a node share, never larger than its cap.

Everything is said by files and `flock`, so that a process may be killed at any moment: the kernel lets go of its locks.
`.lock` is held for the milliseconds in which room is made or a file gets its name. A file that is being fetched is
called `.part-...-BYTES`: it counts with the bytes that it will have, its fetcher holds an exclusive lock on it, and
what is left of it without a lock is gone on with by whoever wants it next. A reader holds a shared lock on the file
itself; what is locked is never evicted.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from data_pipelines.atomic import fsync_folder
from data_pipelines.errors import BadInput

# File name -> the coming step that needs it first. Evaluated only when something has to go.
NextUse = Callable[[], Mapping[str, int]]

_PART = re.compile(r"^\.part-(.+)-(\d+)$")
_LOCK = ".lock"
_POLL_SECONDS = 0.05
_NEVER = sys.maxsize
_random = random.SystemRandom()


class _File(NamedTuple):
    name: str
    path: Path
    num_bytes: int
    used: float
    is_part: bool


class CachedFile:
    """An open file of the cache. It stays there until this is closed."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    def close(self) -> None:
        """Let it go; more than once does nothing."""
        if self.descriptor >= 0:
            # A fork may hold a copy of the descriptor, and closing ours alone would keep the lock.
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> CachedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileCache:
    """Files by name. Processes and threads may share the folder; an instance has no state of its own.

    Args:
        folder: made when it is absent; on a disk of the node.
        max_bytes: what its files may take together, half-fetched ones with their whole size.
        names: pattern of its files' names; whatever else lies in the folder is neither counted nor touched.
        keep: the end of the names of files that go only when nothing else is left.
    """

    def __init__(self, folder: Path, max_bytes: int, names: str, keep: str) -> None:
        self.folder, self.max_bytes, self._names, self._keep = folder, max_bytes, re.compile(names), keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"data.remote.cache_dir: {folder} cannot be made ({error.strerror})") from None

    def obtain(
        self, name: str, num_bytes: int, fetch: Callable[[int], None], next_use: NextUse | None = None
    ) -> CachedFile:
        """Open the file, fetching it first unless it is there or another process is at it; waits as long as it takes.

        `fetch(descriptor)` completes a file that may hold a first part already; raising leaves that part for the next
        attempt, unless it is empty. Raises `BadInput` when the cap is too small for this file.
        """
        while True:
            found = self.open(name) or self._fetch(name, num_bytes, fetch, next_use, None)
            if found is not None:
                return found
            _pause()

    def prefetch(self, name: str, num_bytes: int, fetch: Callable[[int], None], next_use: NextUse, step: int) -> bool:
        """Fetch a file that step `step` needs; True once it is there.

        False, at once, when another process is at it, or when it has no room beside what is needed up to that step.
        """
        if self._path(name).exists():
            return True
        found = self._fetch(name, num_bytes, fetch, next_use, step)
        if found is not None:
            found.close()
        return found is not None

    def obtain_small(self, name: str, read: Callable[[], bytes], next_use: NextUse | None = None) -> CachedFile:
        """As `obtain`, for a file whose size is only known once `read` has it in memory."""

        def write(descriptor: int) -> None:
            data = read()
            os.ftruncate(descriptor, 0)
            while True:
                with self._locked():
                    if self._make_room(len(data), name, len(data), next_use, None):
                        place = 0
                        while place < len(data):
                            place += os.pwrite(descriptor, memoryview(data)[place:], place)
                        return
                _pause()

        return self.obtain(name, 0, write, next_use)

    def open(self, name: str) -> CachedFile | None:
        """Open the file if it is there whole."""
        path = self._path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        file = CachedFile(path, descriptor)
        if not _lock(descriptor, fcntl.LOCK_SH) or not os.fstat(descriptor).st_nlink:
            # It is just being evicted.
            file.close()
            return None
        with suppress(OSError):
            os.utime(descriptor)
        return file

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _fetch(
        self, name: str, num_bytes: int, fetch: Callable[[int], None], next_use: NextUse | None, step: int | None
    ) -> CachedFile | None:
        try:
            part = self._claim(name, num_bytes, next_use, step)
            if part is None:
                return None
            try:
                fetch(part.descriptor)
                os.fsync(part.descriptor)
                with self._locked():
                    os.rename(part.path, self._path(name))
                    # Under the lock, for a lock is let go of for a moment when it changes its kind.
                    fcntl.flock(part.descriptor, fcntl.LOCK_SH)
            except BaseException:
                with self._locked():
                    if os.fstat(part.descriptor).st_size == 0:
                        part.path.unlink(missing_ok=True)
                    part.close()
                raise
            fsync_folder(self.folder)
        except OSError as error:
            raise BadInput(f"data.remote.cache_dir: {self.folder}: {error.strerror or error}") from error
        return CachedFile(self._path(name), part.descriptor)

    def _claim(self, name: str, num_bytes: int, next_use: NextUse | None, step: int | None) -> CachedFile | None:
        """The unfinished file under an exclusive lock, with room made for all of it; None: not now."""
        path = self.folder / f".part-{name}-{num_bytes}"
        with self._locked():
            if self._path(name).exists():
                return None
            fresh = not path.exists()
            if fresh and not self._make_room(num_bytes, name, num_bytes, next_use, step):
                return None
            part = CachedFile(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
            try:
                if _lock(part.descriptor, fcntl.LOCK_EX) and (
                    fresh or self._make_room(0, name, num_bytes, next_use, step)
                ):
                    return part
            except BaseException:
                part.close()
                raise
            part.close()
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._path(_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _make_room(self, needed: int, name: str, num_bytes: int, next_use: NextUse | None, step: int | None) -> bool:
        """Evict until `needed` bytes more fit; nothing is evicted unless enough of it can be."""
        files = list(self._files())
        excess = sum(file.num_bytes for file in files) + needed - self.max_bytes
        if excess <= 0:
            return True
        if num_bytes > self.max_bytes:
            raise self._too_small(num_bytes)
        held: list[tuple[_File, int]] = []
        busy = False
        try:
            for file in self._victims(files, next_use() if next_use is not None else {}, step):
                if file.is_part and file.name == name:
                    continue
                try:
                    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    excess -= file.num_bytes
                    continue
                if not _lock(descriptor, fcntl.LOCK_EX):
                    os.close(descriptor)
                    busy = True
                    continue
                held.append((file, descriptor))
                excess -= file.num_bytes
                if excess <= 0:
                    for victim, _ in held:
                        victim.path.unlink(missing_ok=True)
                    return True
        finally:
            for _, descriptor in held:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)
        if step is None and not busy:
            raise self._too_small(num_bytes)
        return False

    def _too_small(self, num_bytes: int) -> BadInput:
        return BadInput(
            f"data.remote.max_cache_gb: the cap of {self.max_bytes / 1e9:g} GB on {self.folder} has no room for a file "
            f"of {num_bytes / 1e9:g} GB"
        )

    def _victims(self, files: Sequence[_File], uses: Mapping[str, int], step: int | None) -> list[_File]:
        """What may go, in order: no known use, least recently used first; then the latest use first."""
        allowed = [
            file
            for file in files
            if step is None or (uses.get(file.name, _NEVER) > step and not file.name.endswith(self._keep))
        ]
        return sorted(allowed, key=lambda f: (f.name.endswith(self._keep), -uses.get(f.name, _NEVER), f.used))

    def _files(self) -> Iterator[_File]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.is_file(follow_symlinks=False):
                    continue
                try:
                    state = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                part = _PART.match(entry.name)
                name, announced = (part[1], int(part[2])) if part else (entry.name, 0)
                if not self._names.fullmatch(name):
                    continue
                num_bytes = max(state.st_size, announced)
                yield _File(name, Path(entry.path), num_bytes, state.st_mtime, part is not None)


def _pause() -> None:
    time.sleep(_POLL_SECONDS * _random.uniform(0.5, 1.5))


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

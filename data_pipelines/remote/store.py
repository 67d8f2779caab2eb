"""The store of a dataset behind a URL: whole shards through a cache, or each sample's bytes by a range.

dataset.json is fetched at every opening, so that a changed dataset is seen; indexes and shards go to the cache. A
shard's name there is its SHA-256, verified before it gets it, so datasets and mirrors share shards. Nobody vouches for
an index: its name has the URL in it, and its offsets are checked against the shard's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import BadInput
from data_pipelines.index import ShardIndex
from data_pipelines.remote.cache import CachedFile, FileCache, NextUse
from data_pipelines.remote.download import download
from data_pipelines.remote.folder import Attempts, RemoteFolder, WrongSize, open_folder, read_all
from data_pipelines.store import MemberReader, check_index

if TYPE_CHECKING:
    from data_pipelines.dataset import ShardEntry

_MOST_DATASET_BYTES = 1 << 30
_MOST_INDEX_BYTES = 1 << 30
_INDEX_SUFFIX = ".arrow"
_NAMES = r"[0-9a-f]{64}\.(tar|arrow)"


class Reading(threading.local):
    """What this thread is at: the step, and the seconds that it has waited for remote bytes since the step began."""

    step = 0
    waited_seconds = 0.0

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step, self.waited_seconds = step, 0.0

    @contextlib.contextmanager
    def waits(self) -> Iterator[None]:
        """Count the time that this takes as waiting."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited_seconds += time.perf_counter() - started


reading = Reading()


def cache_folder(settings: RemoteConfig) -> Path:
    """Where the cache lies."""
    if settings.cache_dir is not None:
        return Path(settings.cache_dir)
    if os.environ.get("TRIPTYCH_CACHE_DIR"):
        return Path(os.environ["TRIPTYCH_CACHE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych"


def open_store(url: str, settings: RemoteConfig) -> tuple[RemoteStore, bytes]:
    """The store of the dataset behind a URL, and its dataset.json. Raises `BadInput`."""
    folder = open_folder(url, settings)
    raw = read_all(folder, "dataset.json", _MOST_DATASET_BYTES, settings)
    return RemoteStore(folder, settings), raw


class RemoteStore:
    """A `ShardStore` whose files are fetched. `next_use` is told by a loader, which knows what comes."""

    keeps_open = False

    def __init__(self, folder: RemoteFolder, settings: RemoteConfig) -> None:
        self.location = folder.location
        self.settings = settings
        self.next_use: NextUse | None = None
        self._folder = folder
        self._cache = FileCache(cache_folder(settings), int(settings.max_cache_gb * 1e9), _NAMES, keep=_INDEX_SUFFIX)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "next_use": None}

    def index(self, entry: ShardEntry) -> ShardIndex:
        """The shard's index, from the cache, or fetched into it."""
        name = hashlib.sha256(f"{self.location}\n{entry.index}\n{entry.sha256}".encode()).hexdigest() + _INDEX_SUFFIX
        file = self._cache.open(name)
        if file is None:
            with reading.waits():
                file = self._cache.obtain_small(name, lambda: self._fetch_index(entry), self.next_use)
        with file:
            index = ShardIndex.load(file.path)
        check_index(index, entry, self.location)
        return index

    def _fetch_index(self, entry: ShardEntry) -> bytes:
        """The index, looked at before it is stored: what is wrong at the server may be put right there."""
        data = read_all(self._folder, entry.index, _MOST_INDEX_BYTES, self.settings)
        check_index(ShardIndex.parse(data, f"{self.location}/{entry.index}"), entry, self.location)
        return data

    def open(self, entry: ShardEntry) -> MemberReader:
        """The shard: in the cache, fetched into it first if need be, or as ranges of the remote file."""
        if self.settings.mode == "range":
            return _RangeReader(self._folder, entry, self.settings)
        file = self._cache.open(shard_name(entry))
        if file is None:
            with reading.waits():
                file = self._cache.obtain(
                    shard_name(entry), entry.bytes, lambda part: self._download(entry, part), self.next_use
                )
        return _CachedReader(file, f"{self.location}/{entry.path}", entry.bytes)

    def prefetch(self, entry: ShardEntry, step: int, next_use: NextUse, stop: threading.Event) -> bool:
        """Fetch the shard, which step `step` needs, into the cache if that is possible now; see `FileCache`."""
        return self._cache.prefetch(
            shard_name(entry), entry.bytes, lambda part: self._download(entry, part, stop), next_use, step
        )

    def _download(self, entry: ShardEntry, part: int, stop: threading.Event | None = None) -> None:
        download(self._folder, entry.path, part, entry.bytes, entry.sha256, self.settings, stop)


def shard_name(entry: ShardEntry) -> str:
    """The shard's name in a cache."""
    return f"{entry.sha256}.tar"


class _CachedReader:
    def __init__(self, file: CachedFile, where: str, num_bytes: int) -> None:
        self._file, self._where = file, where
        if os.fstat(file.descriptor).st_size != num_bytes:
            file.close()
            raise BadInput(f"{where}: dataset.json says {num_bytes:,} bytes, which is not the size of that shard")

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file.descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self._file.descriptor, size - len(data), offset + len(data))
            if not more:
                raise BadInput(f"{self._where}: ends before byte {offset + size}")
            data += more
        return data

    def close(self) -> None:
        self._file.close()


class _RangeReader:
    def __init__(self, folder: RemoteFolder, entry: ShardEntry, settings: RemoteConfig) -> None:
        self._folder, self._path, self._settings = folder, entry.path, settings

    def read(self, offset: int, size: int) -> bytes:
        where = f"{self._folder.location}/{self._path}"
        if not size:
            # There is no range of no bytes: a server would send the whole shard.
            return b""
        with reading.waits():
            try:
                return Attempts(where, self._settings).run(lambda: self._folder.read(self._path, offset, size))
            except WrongSize as error:
                raise BadInput(f"{where}: {error}; it changed since it was indexed") from None

    def close(self) -> None:
        pass

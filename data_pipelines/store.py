"""Where a dataset's shards and indexes come from: the one seam between `Dataset` and disks or networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from data_pipelines.errors import BadInput
from data_pipelines.index import MEMBERS, ShardIndex
from data_pipelines.shard import ShardReader

if TYPE_CHECKING:
    from data_pipelines.dataset import ShardEntry


class MemberReader(Protocol):
    """An open shard. Threads may share it."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. Raises `BadInput` when they cannot be had."""

    def close(self) -> None:
        """Let the shard go."""


class ShardStore(Protocol):
    """The files of one dataset. May be pickled, forked and shared between threads."""

    @property
    def location(self) -> str:
        """The folder or URL, fit to be shown."""

    @property
    def keeps_open(self) -> bool:
        """Whether a reader may stay open; otherwise it is closed after each use."""

    def index(self, entry: ShardEntry) -> ShardIndex:
        """The shard's index. Raises `BadInput` when it cannot be had or does not fit the shard."""

    def open(self, entry: ShardEntry) -> MemberReader:
        """The shard. Raises `BadInput` when it is gone, or has another size than dataset.json says."""


def check_index(index: ShardIndex, entry: ShardEntry, location: str) -> None:
    """Raise `BadInput` unless the index is of the shard in the dataset.json at `location`, and points into it."""
    where = f"{location}/{entry.index}"
    if index.sha256 != entry.sha256 or len(index) != entry.num_samples:
        raise BadInput(f"{where}: the index is of another tar; run `triptych data index` again")
    for member in MEMBERS:
        if (np.maximum(index[f"{member}_size"], 0) > entry.bytes - index[f"{member}_offset"]).any():
            raise BadInput(f"{where}: offsets lie outside the shard; run `triptych data index` again")


class LocalStore:
    """A folder of this machine."""

    keeps_open = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def index(self, entry: ShardEntry) -> ShardIndex:
        """Memory-map the index."""
        index = ShardIndex.load(self.folder / entry.index)
        check_index(index, entry, self.location)
        return index

    def open(self, entry: ShardEntry) -> ShardReader:
        """Open the tar."""
        reader = ShardReader(self.folder / entry.path)
        if reader.num_bytes != entry.bytes:
            raise BadInput(
                f"{reader.path}: {reader.num_bytes} bytes, but dataset.json says {entry.bytes}; "
                "build it again, or keep what is whole with `triptych data index`"
            )
        return reader

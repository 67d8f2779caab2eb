"""Fetching shards before they are wanted, in the order that is known.

Every rank fetches what its own coming steps read, step by step; the cache sees to it that ranks of one node share a
download. Nothing depends on it: a reader that comes first fetches for itself, and meets whatever went wrong here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import BadInput
from data_pipelines.remote.folder import Stopped
from data_pipelines.remote.store import RemoteStore, reading, shard_name

if TYPE_CHECKING:
    from data_pipelines.dataset import Dataset

# (dataset's number, shard's number) of the shards that a step reads, in the order of reading.
Shards = Callable[[int], Sequence[tuple[int, int]]]

_POLL_SECONDS = 0.1
_THREADS = "triptych-prefetch"


class Upcoming:
    """The coming use of every shard: a function of the order, the same in all ranks and workers.

    Args:
        datasets: the sources, by number; those on local disks are left out.
        shards: what a step reads, in whatever rank.
        end: the step after the last one.
        horizon: how many steps are looked at.
    """

    def __init__(self, datasets: Sequence[Dataset], shards: Shards, end: int, horizon: int) -> None:
        self._datasets, self._shards, self._end, self._horizon = datasets, shards, end, horizon
        self._names: dict[int, list[str]] = {}

    def __call__(self) -> dict[str, int]:
        """Name in the cache -> first step, from this thread's step on, that reads the shard."""
        first = reading.step
        uses: dict[str, int] = {}
        for step in range(first, min(first + self._horizon, self._end)):
            for name in self._of(step):
                uses.setdefault(name, step)
        for step in [step for step in list(self._names) if step < first]:
            self._names.pop(step, None)
        return uses

    def _of(self, step: int) -> list[str]:
        names = self._names.get(step)
        if names is None:
            names = [
                shard_name(self._datasets[source].shards[shard])
                for source, shard in self._shards(step)
                if isinstance(self._datasets[source].store, RemoteStore)
            ]
            self._names[step] = names
        return names


def fetch_ahead(
    datasets: Sequence[Dataset], mine: Shards, all_ranks: Shards, numbers: range, settings: RemoteConfig
) -> Prefetcher:
    """A prefetcher for the steps `numbers` of this rank; their order is what the caches evict by from now on."""
    upcoming = Upcoming(datasets, all_ranks, numbers.stop, settings.ahead_steps)
    for dataset in datasets:
        if isinstance(dataset.store, RemoteStore):
            dataset.store.next_use = upcoming
    return Prefetcher(datasets, mine, numbers, upcoming, settings)


def is_fetching() -> bool:
    """Whether threads of this process are fetching, those of closed prefetchers that are about to end included."""
    return any(thread.name == _THREADS for thread in threading.enumerate())


def _is_cached(dataset: Dataset) -> bool:
    return isinstance(dataset.store, RemoteStore) and dataset.store.settings.mode == "cache"


class Prefetcher:
    """Threads that fetch the shards of the steps `numbers`, at most `ahead_steps` beyond the one that was reached.

    `shards` gives what this rank reads in a step. Start it after workers are forked, and close it.
    """

    def __init__(
        self, datasets: Sequence[Dataset], shards: Shards, numbers: range, upcoming: Upcoming, settings: RemoteConfig
    ) -> None:
        self._datasets, self._shards, self._numbers = datasets, shards, numbers
        self._upcoming, self._settings = upcoming, settings
        self._reached = self._planned = numbers.start
        self._wanted: deque[tuple[int, int, int]] = deque()
        self._planning = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=_THREADS, daemon=True)
            for _ in range(settings.downloads if any(_is_cached(dataset) for dataset in datasets) else 0)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def advance(self, step: int) -> None:
        """Steps before this one are done."""
        self._reached = step

    def close(self) -> None:
        """Stop; what is half-fetched stays for the next one."""
        self._stop.set()

    def _work(self) -> None:
        while not self._stop.is_set():
            # What has to go for an index goes by the steps that come, too.
            reading.begin(self._reached)
            try:
                wanted = self._next()
                if wanted is None:
                    self._stop.wait(_POLL_SECONDS)
                else:
                    self._fetch(*wanted)
            except Stopped:
                return
            except BadInput:
                # The reader will meet it too, and say so.
                continue

    def _next(self) -> tuple[int, int, int] | None:
        """(step, dataset's number, shard's number), or None as long as nothing more is wanted."""
        with self._planning:
            while not self._wanted:
                step = self._planned
                if step >= min(self._reached + self._settings.ahead_steps, self._numbers.stop):
                    return None
                self._planned += 1
                self._wanted.extend((step, *shard) for shard in self._shards(step))
            return self._wanted.popleft()

    def _fetch(self, step: int, source: int, shard: int) -> None:
        store, entry = self._datasets[source].store, self._datasets[source].shards[shard]
        while isinstance(store, RemoteStore) and step >= self._reached and not self._stop.is_set():
            reading.begin(self._reached)
            if store.prefetch(entry, step, self._upcoming, self._stop):
                return
            self._stop.wait(_POLL_SECONDS)

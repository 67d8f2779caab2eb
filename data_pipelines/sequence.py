"""The endless sequence of training samples, and the state that says where a run is in it.

Sources are interleaved by a fixed mixture; each goes through its own epochs, each epoch in an order of its own. So
which samples make global batch `s` is a function of the data and the settings, never of ranks, workers or restarts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import BadInput
from data_pipelines.mixture import Mixture, MixtureHistory
from data_pipelines.order import Order, splitmix64, stream_count

IntArray = npt.NDArray[np.int64]

STATE_VERSION = 1
_MASK = (1 << 64) - 1
# Compared on resume, in this order: the first that differs is the one that is named.
_FIXED_FIELDS = ("version", "fingerprint", "mixture", "seed", "global_batch", "tail", "num_streams", "shuffle_block")


class Source(Protocol):
    """What the sequence needs to know of a dataset."""

    @property
    def shard_sizes(self) -> IntArray: ...

    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Picked:
    """Samples in sequence order: five int64 arrays of one length.

    `source` is the source's number, `sample` the id within it, `index` the id over all sources, `epoch` the source's,
    `seed` what makes a sample's random numbers its own.
    """

    source: IntArray
    sample: IntArray
    index: IntArray
    epoch: IntArray
    seed: IntArray

    def __getitem__(self, places: IntArray) -> Picked:
        return Picked(*(getattr(self, name)[places] for name in ("source", "sample", "index", "epoch", "seed")))


def sample_seeds(run_seed: int, epoch: IntArray, index: IntArray) -> IntArray:
    """Seed of each sample, a hash of (run seed, epoch, index): int64 in 0..2**63-1, of the arrays' shape."""
    mixed = splitmix64(splitmix64(np.full(index.shape, run_seed & _MASK, dtype=np.uint64)) ^ epoch.astype(np.uint64))
    return (splitmix64(mixed ^ index.astype(np.uint64)) >> np.uint64(1)).astype(np.int64)


def touched_shards(picked: Picked, shard_ends: Sequence[IntArray]) -> list[tuple[int, int]]:
    """(source, shard number) of these samples, each once, in the order of reading: by source, then by shard.

    `shard_ends` has, for each source, the cumulated numbers of samples of its shards: int64.
    """
    touched: list[tuple[int, int]] = []
    for source in np.unique(picked.source).tolist():
        shards = np.searchsorted(shard_ends[source], picked.sample[picked.source == source], side="right")
        touched += [(source, shard) for shard in np.unique(shards).tolist()]
    return touched


class SampleSequence:
    """Global batch `s` covers positions [s * global_batch, (s + 1) * global_batch) of the sequence.

    With `tail` "wrap" a batch goes on into the next epoch; with "drop" every epoch is cut to whole batches, which needs
    a single source. Raises `BadInput` for settings that the data cannot meet.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        seed: int,
        global_batch: int,
        num_streams: int,
        shuffle_block: int,
        tail: Literal["wrap", "drop"],
    ) -> None:
        self._sizes = [source.shard_sizes for source in sources]
        self._shard_ends: list[IntArray] = [np.cumsum(sizes) for sizes in self._sizes]
        self._counts = [int(sizes.sum()) for sizes in self._sizes]
        self._offsets: IntArray = np.concatenate([[0], np.cumsum(self._counts)[:-1]]).astype(np.int64)
        self._fingerprint = "+".join(source.fingerprint[:16] for source in sources)
        self._seed, self._streams, self._block, self._tail = seed, num_streams, shuffle_block, tail
        self.global_batch = global_batch
        # The epochs that a batch may touch: of each source the present one and the next.
        self._order = functools.lru_cache(maxsize=2 * len(sources) + 1)(self._make_order)
        try:
            self.mixture = Mixture(weights)
        except ValueError as error:
            raise BadInput(f"data.train: {error}") from error
        self._history = MixtureHistory(self.mixture)
        if tail == "drop" and len(sources) > 1:
            raise BadInput("data.tail: drop needs a single training dataset; with a mixture epochs end at no batch")
        if tail == "drop" and self._counts[0] < global_batch:
            raise BadInput(
                f"data.tail: drop leaves nothing of {self._counts[0]} samples in batches of {global_batch}; "
                "lower data.global_batch or use wrap"
            )
        # Samples that each source gives before its next epoch begins.
        self._used = [count - count % global_batch if tail == "drop" else count for count in self._counts]

    @property
    def samples_an_epoch(self) -> int:
        """Samples of all sources together, as many of them as an epoch gives."""
        return sum(self._used)

    @property
    def epoch_sizes(self) -> list[int]:
        """Samples that each source gives before its next epoch begins."""
        return list(self._used)

    @property
    def num_first_sources(self) -> int:
        """Sources that the run began with, before any were added."""
        return len(self._history.changes[0][1] if self._history.changes else self.mixture.counts)

    def _make_order(self, source: int, epoch: int) -> Order:
        # Equal datasets that are listed twice must not go in step.
        return Order(self._sizes[source], self._seed + source, epoch, self._streams, self._block)

    def batch(self, step: int) -> Picked:
        """The samples of global batch `step`, in order."""
        return self.at(np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64))

    def at(self, positions: IntArray) -> Picked:
        """The samples at these positions of the sequence: int64 [n], from 0 on."""
        source, within = self._history.at(positions)
        epoch, place = np.divmod(within, np.array(self._used, dtype=np.int64)[source])
        sample = np.empty_like(place)
        turns = int(epoch.max(initial=0)) + 1
        for number, turn in map(divmod, np.unique(source * turns + epoch).tolist(), itertools.repeat(turns)):
            here = (source == number) & (epoch == turn)
            sample[here] = self._order(number, turn).at(place[here])
        index = self._offsets[source] + sample
        return Picked(source, sample, index, epoch, sample_seeds(self._seed, epoch, index))

    def shards(self, picked: Picked) -> list[tuple[int, int]]:
        """(source, shard number) of these samples, each once, in the order of reading."""
        return touched_shards(picked, self._shard_ends)

    def state(self, step: int) -> dict[str, Any]:
        """Where the run is once `step` global batches are consumed: the same on every rank, for JSON."""
        consumed = step * self.global_batch
        cursors = self._history.consumed(consumed)
        state = {
            "version": STATE_VERSION,
            "seed": self._seed,
            "epoch": consumed // self.samples_an_epoch,
            "samples": consumed,
            "cursors": cursors.tolist(),
            "epochs": (cursors // np.array(self._used, dtype=np.int64)).tolist(),
            "num_streams": [stream_count(count, self._streams) for count in self._counts],
            "fingerprint": self._fingerprint,
            "mixture": self.mixture.counts.tolist(),
            "global_batch": self.global_batch,
            "shuffle_block": self._block,
            "tail": self._tail,
        }
        if self._history.changes:
            state["changes"] = [[end, counts] for end, counts in self._history.changes]
        return state

    def resume(self, old: dict[str, Any], allow_change: bool = False) -> None:
        """Go on from a checkpoint's state; call it before the first batch.

        Mixtures that the run had before are taken over from it. With `allow_change` sources may have been added after
        the old ones, and weights may be others: up to the next end of a block the sequence is the old one, and the new
        one from there; each source goes on where it was. Raises `BadInput`, naming the field, for any other difference.
        """
        changed = check_state(old, self.state(0), allow_change)
        try:
            history = MixtureHistory(Mixture.of_counts(old["mixture"]), old.get("changes", []))
            self._history = history.changed(self.mixture, int(old["samples"])) if changed else history
        except (TypeError, ValueError, KeyError) as error:
            raise BadInput(f"the checkpoint's data state cannot be read ({error})") from error


def check_state(old: dict[str, Any], new: dict[str, Any], allow_change: bool = False) -> bool:
    """Whether sources were added or weights changed between two states, with `allow_change` alone.

    Raises `BadInput`, naming the field, when the states belong to different sequences otherwise.
    """
    sources, streams = old.get("fingerprint"), old.get("num_streams")
    kept = (
        isinstance(sources, str)
        and isinstance(streams, list)
        and new["fingerprint"].split("+")[: len(streams)] == sources.split("+")
        and new["num_streams"][: len(streams)] == streams
    )
    may_change = ("fingerprint", "mixture", "num_streams") if kept else ()
    differing = [name for name in _FIXED_FIELDS if old.get(name) != new[name]]
    for name in differing:
        if name in may_change and allow_change:
            continue
        advice = "put the data and settings back, or start a new run.dir"
        if set(differing) <= set(may_change):
            advice = "put them back, go on with the new mixture by --allow-change, or start a new run.dir"
        elif allow_change and name in ("fingerprint", "mixture", "num_streams"):
            advice = "--allow-change takes other weights, and new sources after the old ones, and nothing else"
        raise BadInput(f"the checkpoint is of other data: {name} was {old.get(name)} and is {new[name]} now; {advice}")
    return bool(differing)

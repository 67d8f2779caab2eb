"""Which samples a run consumed: its ledger (batch numbers and checksums) against the order of its data.

The samples of a batch are derived from what each start wrote down (the data state, the datasets' fingerprints) and from
the datasets' own indexes; the checksum says whether they are the samples that the ranks really had. A step's samples
cost no more than a step's plan. The proof of exactly-once goes over every sample once, with one bit a sample of each
epoch that is under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.config import RemoteConfig
from data_pipelines.dataset import Dataset, open_dataset
from data_pipelines.errors import BadInput
from data_pipelines.progress import Progress
from data_pipelines.sequence import Picked, SampleSequence
from pretrain.ledger import Ledger, Outcome, Records, Stretch, id_checksums

IntArray = npt.NDArray[np.int64]

_CHUNK_SAMPLES = 1 << 18


class Consumed(NamedTuple):
    """One sample of a step, or a finding about one: where it lies, and its turn.

    `shard` is the tar's path within the dataset, `offset` the first byte of its first member there.
    """

    key: str
    dataset: str
    shard: str
    offset: int
    source: int
    id: int
    epoch: int


def data_facts(datasets: Sequence[Dataset], state: dict[str, Any], num_streams: int) -> dict[str, Any]:
    """What a start writes down of its data, for `DataPlans` to derive every batch from: JSON of some 500 bytes."""
    sources = [
        {
            # A relative path means something else in another folder.
            "path": str(dataset.path.resolve()) if dataset.is_local else dataset.location,
            "fingerprint": dataset.fingerprint,
            "samples": len(dataset),
        }
        for dataset in datasets
    ]
    return {"sources": sources, "num_streams": num_streams, "state": state}


class DataPlans:
    """The order of the data as each start of a run had it.

    Args:
        ledger: the run's.
        places: where else datasets may lie by now; they are known by their fingerprints.
        remote: how to read those behind a URL.
    """

    def __init__(self, ledger: Ledger, places: Iterable[str] = (), remote: RemoteConfig | None = None) -> None:
        self._ledger = ledger
        self._places = list(places)
        self._remote = remote
        self._opened: dict[str, Dataset] = {}
        self._sequences: dict[int, SampleSequence] = {}

    def sequence(self, stretch: int) -> SampleSequence:
        """The sequence that a stretch took its batches from. Raises `BadInput` when its data are gone or others."""
        start = self._ledger.start_of(stretch)
        if start.number not in self._sequences:
            self._sequences[start.number] = self._derive(start)
        return self._sequences[start.number]

    def datasets(self, stretch: int) -> list[Dataset]:
        """The datasets of a stretch, in the order of its sources."""
        return [self._open(source) for source in self._ledger.start_of(stretch).facts["data"]["sources"]]

    def _derive(self, start: Stretch) -> SampleSequence:
        data = start.facts["data"]
        state = data["state"]
        sequence = SampleSequence(
            self.datasets(start.number),
            state["mixture"],
            state["seed"],
            state["global_batch"],
            data["num_streams"],
            state["shuffle_block"],
            state["tail"],
        )
        sequence.resume(state)
        return sequence

    def _open(self, source: dict[str, Any]) -> Dataset:
        wanted = source["fingerprint"]
        if wanted not in self._opened:
            for place in (source["path"], *self._places):
                try:
                    dataset = open_dataset(place, self._remote)
                except BadInput:
                    continue
                if dataset.fingerprint == wanted:
                    self._opened[wanted] = dataset
                    break
            else:
                tried = ", ".join(dict.fromkeys((source["path"], *self._places)))
                raise BadInput(
                    f"no dataset with fingerprint {wanted[:16]} ({source['samples']} samples) at {tried}; "
                    "say where it lies now with --data"
                )
        return self._opened[wanted]

    def locate(self, stretch: int, picked: Picked) -> list[Consumed]:
        """The samples themselves, from the datasets' indexes, in their order."""
        datasets = self.datasets(stretch) if len(picked.sample) else []
        found: list[Consumed] = []
        for source, sample, epoch in zip(
            picked.source.tolist(), picked.sample.tolist(), picked.epoch.tolist(), strict=True
        ):
            dataset = datasets[source]
            shards, rows = dataset.locate(sample)
            shard, row = int(shards[0]), int(rows[0])
            index = dataset.index(shard)
            offset = min((start for _, start, size in index.spans(row) if size >= 0), default=-1)
            path = dataset.shards[shard].path
            found.append(Consumed(index.key(row), dataset.location, path, offset, source, sample, epoch))
        return found


class Checked(NamedTuple):
    """Batches beside what the order says of them. `agrees` bool [n], `picked` has n * global_batch samples."""

    records: Records
    picked: Picked
    agrees: npt.NDArray[np.bool_]


def check_batches(plans: DataPlans, records: Records) -> Iterator[Checked]:
    """Derive the samples of these records' batches, some at a time, and compare the checksums of those consumed.

    Records come out in their order. Batches that were passed over have no checksum, and agree.
    """
    at = 0
    while at < len(records):
        stretch = int(records["stretch"][at])
        sequence = plans.sequence(stretch)
        size = sequence.global_batch
        end = min(len(records), at + max(1, _CHUNK_SAMPLES // size))
        others = np.flatnonzero(records["stretch"][at:end] != stretch)
        end = at + int(others[0]) if len(others) else end
        here = records[at:end]
        picked = sequence.at(_positions(here["batch"], size))
        agrees = id_checksums(picked.index.reshape(-1, size)) == here["checksum"].astype(np.int64)
        yield Checked(here, picked, agrees | (here["outcome"] == Outcome.PASSED_OVER))
        at = end


def _positions(batches: npt.NDArray[Any], size: int) -> IntArray:
    return (batches.astype(np.int64)[:, None] * size + np.arange(size)).reshape(-1)


class Finding(NamedTuple):
    """A sample that was not consumed exactly once in an epoch, and why as far as the ledger knows."""

    sample: Consumed
    step: int | None
    """The step of the second time, or at which it was passed over."""
    batch: int
    why: str

    def as_json(self) -> dict[str, Any]:
        """One flat object."""
        return {**self.sample._asdict(), "step": self.step, "batch": self.batch, "why": self.why}


MISSING, PASSED_OVER = "no step consumed its batch", "passed over"
OTHERS = "the step consumed other samples than its batch's"


@dataclass
class Proof:
    """What came out of going over all that a run consumed."""

    repeated: list[Finding]
    """Samples consumed again within an epoch of their source."""
    unseen: list[Finding]
    """Samples of the stretch of data gone through so far that no step consumed."""
    mismatched: list[tuple[int, int]]
    """(step, batch) whose checksum is not that of the batch."""
    num_batches: int = 0
    num_samples: int = 0
    first_batch: int = 0
    """Where the ledger begins: not 0 where the run is older than its ledger."""

    @property
    def exact(self) -> bool:
        """Whether every sample was consumed exactly once an epoch, but for those passed over on purpose."""
        return not self.repeated and not self.mismatched and all(each.why == PASSED_OVER for each in self.unseen)


def prove(ledger: Ledger, plans: DataPlans, progress: Progress) -> Proof:
    """Go over everything that a run consumed, as far as it was not undone.

    Every sample of every batch sets its bit of its source's epoch: one that is set already is a repetition. What the
    order has between the first and the last batch and no step consumed is unseen.
    """
    records = ledger.effective
    proof = Proof([], [], [], first_batch=min((each.batch for each in ledger.stretches), default=0))
    if not len(records):
        return proof
    bits = _Seen()
    progress.start(len(records))
    for part in check_batches(plans, records):
        _go_over(part, plans, bits, proof)
        progress.advance(len(part.records))

    # What the order has and nobody consumed: batches that no record names, passed over, or of other samples.
    last = int(records["batch"].max())
    named = np.zeros(last + 1 - proof.first_batch, dtype=bool)
    named[records["batch"].astype(np.int64) - proof.first_batch] = True
    stretch = int(records["stretch"][-1])
    for batch in (np.flatnonzero(~named) + proof.first_batch).tolist():
        picked = plans.sequence(stretch).batch(batch)
        _add_unseen(proof, plans, bits, stretch, picked, None, batch, MISSING)
    mismatched = set(proof.mismatched)
    for record in records[(records["outcome"] == Outcome.PASSED_OVER) | _among(records, mismatched)]:
        step, batch, stretch = (int(record[name]) for name in ("step", "batch", "stretch"))
        why = PASSED_OVER if record["outcome"] == Outcome.PASSED_OVER else OTHERS
        _add_unseen(proof, plans, bits, stretch, plans.sequence(stretch).batch(batch), step, batch, why)
    return proof


def _go_over(part: Checked, plans: DataPlans, bits: _Seen, proof: Proof) -> None:
    records, picked, agrees = part
    stretch = int(records["stretch"][0])
    sequence = plans.sequence(stretch)
    size = sequence.global_batch
    proof.mismatched += [(int(one["step"]), int(one["batch"])) for one in records[~agrees]]
    consumed = agrees & (records["outcome"] != Outcome.PASSED_OVER)
    places = np.flatnonzero(np.repeat(consumed, size))
    again = places[bits.see(picked[places], sequence.epoch_sizes)]
    for place, sample in zip(again.tolist(), plans.locate(stretch, picked[again]), strict=True):
        record = records[place // size]
        proof.repeated.append(Finding(sample, int(record["step"]), int(record["batch"]), "consumed before"))
    proof.num_batches += int(np.count_nonzero(consumed))
    proof.num_samples += len(places)


def _among(records: Records, wanted: set[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    if not wanted:
        return np.zeros(len(records), dtype=bool)
    pairs = zip(records["step"].tolist(), records["batch"].tolist(), strict=True)
    return np.array([pair in wanted for pair in pairs], dtype=bool)


def _add_unseen(
    proof: Proof, plans: DataPlans, bits: _Seen, stretch: int, picked: Picked, step: int | None, batch: int, why: str
) -> None:
    never = np.flatnonzero(~bits.has(picked))
    proof.unseen += [Finding(sample, step, batch, why) for sample in plans.locate(stretch, picked[never])]


class _Seen:
    """One bit for each sample of each source's epoch; an epoch that is whole needs none of them any more."""

    def __init__(self) -> None:
        self._bits: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._whole: set[tuple[int, int]] = set()

    def see(self, picked: Picked, epoch_sizes: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Set the bits of these samples; bool [n], true for those whose bit was set before."""
        again = np.zeros(len(picked.sample), dtype=bool)
        for turn, here in _turns(picked):
            ids = picked.sample[here]
            if turn in self._whole:
                again[here] = True
                continue
            _, first = np.unique(ids, return_index=True)
            fresh = np.zeros(len(ids), dtype=bool)
            fresh[first] = True
            bits = self._grown(turn, int(ids.max()))
            fresh &= bits[ids >> 3] >> (ids & 7).astype(np.uint8) & 1 == 0
            np.bitwise_or.at(bits, ids >> 3, np.left_shift(1, ids & 7).astype(np.uint8))
            again[here] = ~fresh
            self._counts[turn] = self._counts.get(turn, 0) + int(np.count_nonzero(fresh))
            if self._counts[turn] == epoch_sizes[turn[0]]:
                self._whole.add(turn)
                del self._bits[turn]
        return again

    def has(self, picked: Picked) -> npt.NDArray[np.bool_]:
        """Which of these samples have their bit set: bool [n]."""
        found = np.zeros(len(picked.sample), dtype=bool)
        for turn, here in _turns(picked):
            ids = picked.sample[here]
            bits = self._grown(turn, int(ids.max())) if turn not in self._whole else None
            found[here] = True if bits is None else (bits[ids >> 3] >> (ids & 7).astype(np.uint8) & 1).astype(bool)
        return found

    def _grown(self, turn: tuple[int, int], last: int) -> npt.NDArray[np.uint8]:
        bits = self._bits.get(turn, np.zeros(0, dtype=np.uint8))
        if len(bits) <= last >> 3:
            bits = np.concatenate([bits, np.zeros(max((last >> 3) + 1 - len(bits), len(bits)), dtype=np.uint8)])
            self._bits[turn] = bits
        return bits


def _turns(picked: Picked) -> Iterator[tuple[tuple[int, int], IntArray]]:
    """(source, epoch) of these samples, each once, and the places that have it."""
    turns = int(picked.epoch.max(initial=0)) + 1
    codes = picked.source * turns + picked.epoch
    for code in np.unique(codes).tolist():
        yield divmod(code, turns), np.flatnonzero(codes == code)

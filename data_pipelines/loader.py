"""Batches for one rank.

A map-style reader under torch's own DataLoader: the sampler counts steps, and a worker turns a step's number into the
rank's share of that global batch, decoded and stacked. Torch returns them in order, so no worker has a state, and
resuming is counting from another step. Which samples make a batch depends on neither ranks nor workers; which of them a
rank takes is dealt by costs that the index knows.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from data_pipelines.balance import deal
from data_pipelines.collate import Collated, Collator
from data_pipelines.config import DataConfig
from data_pipelines.costs import sample_costs
from data_pipelines.dataset import Dataset, RawSample, open_dataset
from data_pipelines.errors import BadInput
from data_pipelines.index import Quarantined
from data_pipelines.mixture import source_weights
from data_pipelines.quarantine import BadSampleLimit, QuarantineLog
from data_pipelines.remote.ahead import fetch_ahead, is_fetching
from data_pipelines.remote.store import reading
from data_pipelines.sequence import Picked, SampleSequence, sample_seeds
from data_pipelines.tokenizer import TextEncoder, make_tokenizer
from data_pipelines.workers import forked_processes, ordered_threads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IntArray = npt.NDArray[np.int64]
Batch = dict[str, Any]


class _RunConfig(Protocol):
    @property
    def dir(self) -> str: ...

    @property
    def seed(self) -> int: ...


class _TrainConfig(Protocol):
    @property
    def max_steps(self) -> int: ...


class _EvalConfig(Protocol):
    @property
    def max_samples(self) -> int | None: ...


class LoaderConfig(Protocol):
    """The part of a run's config that the loaders read (`pretrain.config.Config` has it)."""

    @property
    def run(self) -> _RunConfig: ...

    @property
    def data(self) -> DataConfig: ...

    @property
    def train(self) -> _TrainConfig: ...

    @property
    def evaluation(self) -> _EvalConfig: ...


@dataclass(frozen=True)
class _Loaded:
    """What a worker hands over: a batch and its bad samples by place.

    `waited_seconds` is how long the worker waited for remote shards.
    """

    collated: Collated
    index: IntArray
    seeds: IntArray
    step: int
    epoch: int
    bad: dict[int, Quarantined]
    waited_seconds: float

    def batch(self) -> Batch:
        """As `build_loader` says."""
        numbers = {"index": torch.from_numpy(self.index), "seed": torch.from_numpy(self.seeds)}
        tensors = self.collated.block.tensors()
        return {"keys": self.collated.keys, **numbers, **tensors, "step": self.step, "epoch": self.epoch}


@dataclass(frozen=True)
class _Stop:
    """What a worker hands over when the run cannot go on; torch would wrap an exception in the worker's traceback."""

    reason: str


class _Reader:
    """Reads and collates samples of several datasets. Shared by threads, copied to worker processes."""

    def __init__(self, datasets: Sequence[Dataset], collator: Collator) -> None:
        self.datasets = datasets
        self._collator = collator

    def read(self, source: IntArray, sample: IntArray, seeds: IntArray) -> Collated:
        """Collate the samples with these ids in these datasets, in this order."""
        folders = [self.datasets[number].location for number in source.tolist()]
        return self._collator.collate(self._samples(source, sample), seeds.tolist(), folders)

    def _samples(self, source: IntArray, sample: IntArray) -> Iterator[tuple[int, RawSample]]:
        for number in np.unique(source).tolist():
            places = np.flatnonzero(source == number)
            for place, raw in self.datasets[number].iter_read(sample[places], limits=self._collator.limits):
                yield int(places[place]), raw
                # Or this sample's bytes would be held while the next one's are read.
                del raw


class _TrainSteps:
    """Step number -> this rank's share of that global batch."""

    def __init__(
        self, reader: _Reader, sequence: SampleSequence, config: DataConfig, rank: int, world_size: int
    ) -> None:
        self._reader, self._sequence, self._config = reader, sequence, config
        self._rank, self._world_size = rank, world_size
        self.datasets = reader.datasets

    def __getitem__(self, step: int) -> _Loaded | _Stop:
        reading.begin(step)
        try:
            picked = self._sequence.batch(step)
            first_epoch = int(picked.epoch[0])
            picked = self._share(picked)
            collated = self._reader.read(picked.source, picked.sample, picked.seed)
        except BadInput as error:
            return _Stop(str(error))
        waited = reading.waited_seconds
        return _Loaded(collated, picked.index, picked.seed, step, first_epoch, collated.bad, waited)

    def _share(self, picked: Picked) -> Picked:
        if self._world_size == 1:
            return picked
        return picked[deal(self._costs(picked.source, picked.sample), self._world_size)[self._rank]]

    def shards(self, step: int) -> list[tuple[int, int]]:
        """(source, shard) that this rank reads in a step."""
        return self._sequence.shards(self._share(self._sequence.batch(step)))

    def all_shards(self, step: int) -> list[tuple[int, int]]:
        """(source, shard) that all ranks together read in a step."""
        return self._sequence.shards(self._sequence.batch(step))

    def _costs(self, source: IntArray, sample: IntArray) -> npt.NDArray[np.float64]:
        costs = np.zeros(len(sample))
        for number in np.unique(source).tolist():
            here = source == number
            costs[here] = sample_costs(self._reader.datasets[number].costs(sample[here]), self._config)
        return costs


class _EvalSteps:
    """Batch number -> this rank's part of it, in dataset order, filled up with copies of weight 0."""

    def __init__(self, reader: _Reader, ids: IntArray, seed: int, rank: int, world_size: int, batch_size: int) -> None:
        self._reader, self._ids, self._seed = reader, ids, seed
        self._rank, self._world_size, self._size = rank, world_size, batch_size
        self.datasets = reader.datasets

    def __len__(self) -> int:
        return -(-len(self._ids) // (self._size * self._world_size))

    def shards(self, number: int) -> list[tuple[int, int]]:
        """(source, shard) that this rank reads in a batch."""
        shards, _ = self.datasets[0].locate(self._sample(number)[0])
        return [(0, shard) for shard in np.unique(shards).tolist()]

    # Ranks read neighbouring samples, so what one of them reads next is what the others do.
    all_shards = shards

    def _sample(self, number: int) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Sample ids of this rank's part, and which of them are no filling."""
        start = (number * self._world_size + self._rank) * self._size
        places = np.arange(start, start + self._size)
        return self._ids[np.minimum(places, len(self._ids) - 1)], places < len(self._ids)

    def __getitem__(self, number: int) -> _Loaded | _Stop:
        reading.begin(number)
        sample, real = self._sample(number)
        seeds = sample_seeds(self._seed, np.zeros_like(sample), sample)
        try:
            collated = self._reader.read(np.zeros_like(sample), sample, seeds)
        except BadInput as error:
            return _Stop(str(error))
        collated.block.arrays()["weight"][~real] = 0
        bad = {place: line for place, line in collated.bad.items() if real[place]}
        return _Loaded(collated, sample, seeds, number, 0, bad, reading.waited_seconds)


def _stream(steps: _TrainSteps | _EvalSteps, numbers: range, config: DataConfig) -> Iterator[_Loaded]:
    """Load the steps with these numbers, in order, in the workers that the config asks for."""
    ahead = fetch_ahead(steps.datasets, steps.shards, steps.all_shards, numbers, config.remote)
    loading = _load(steps, numbers, config, ahead.start)
    try:
        for number, loaded in enumerate(loading):
            if number == 0:
                # Registered after torch's own hook, which would wait five seconds for workers that nobody told to end.
                atexit.register(loading.close)
            ahead.advance(numbers.start + number + 1)
            if isinstance(loaded, _Stop):
                raise BadInput(loaded.reason)
            yield loaded
    finally:
        ahead.close()
        atexit.unregister(loading.close)
        loading.close()


def _load(
    steps: _TrainSteps | _EvalSteps, numbers: range, config: DataConfig, forked: Callable[[], None]
) -> Generator[_Loaded | _Stop, None, None]:
    """The steps, loaded. `forked` is called as soon as there are the workers that there will be."""
    count, forks = config.num_workers, config.worker_type == "process"
    # A fork beside threads that fetch could inherit a lock of the resolver or of OpenSSL that nobody will let go of.
    if not count or not forks or (is_fetching() and not all(dataset.is_local for dataset in steps.datasets)):
        forked()
        if count:
            yield from ordered_threads(steps.__getitem__, numbers, count, count * config.prefetch)
        else:
            yield from (steps[number] for number in numbers)
    else:
        yield from forked_processes(steps, numbers, count, config.prefetch, forked)


class TrainLoader:
    """The rank's batches from `start_step` to `train.max_steps`; make one with `build_loader`.

    Iterating it again starts again at `start_step`. `tokenizer` is the run's. `remote_wait_seconds` is how long the
    workers waited for remote shards in the batches yielded so far; training waits for the part that the batches kept
    ready do not cover.
    """

    def __init__(
        self,
        config: LoaderConfig,
        sequence: SampleSequence,
        steps: _TrainSteps,
        tokenizer: PreTrainedTokenizerFast,
        start_step: int,
    ) -> None:
        self._config, self._sequence, self._steps, self._start = config, sequence, steps, start_step
        self.tokenizer = tokenizer
        self._log = Path(config.run.dir) / "quarantine.jsonl"
        self.samples_an_epoch = sequence.samples_an_epoch
        self.remote_wait_seconds = 0.0

    @property
    def datasets(self) -> Sequence[Dataset]:
        """The sources, in order."""
        return self._steps.datasets

    def __len__(self) -> int:
        return max(0, self._config.train.max_steps - self._start)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(range(self._start, self._config.train.max_steps))

    def batches(self, numbers: range) -> Iterator[Batch]:
        """The rank's share of the global batches with these numbers, in order."""
        data = self._config.data
        log = QuarantineLog(self._log)
        limit = BadSampleLimit(data.max_bad_rate, data.max_bad_run, self._log)
        for loaded in _stream(self._steps, numbers, data):
            for line in loaded.bad.values():
                log.append(line)
            flags = [place in loaded.bad for place in range(len(loaded.collated.keys))]
            limit.see(flags, next(iter(loaded.bad.values()), None))
            self.remote_wait_seconds += loaded.waited_seconds
            yield loaded.batch()

    def state(self, batch: int) -> dict[str, Any]:
        """The data's part of a checkpoint once the batches before `batch` are consumed, for JSON.

        It is the same on every rank.
        """
        return self._sequence.state(batch)


class EvalLoader:
    """The rank's evaluation batches; make one with `build_eval_loader`."""

    def __init__(self, config: LoaderConfig, steps: _EvalSteps) -> None:
        self._config, self._steps = config, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        log = QuarantineLog(Path(self._config.run.dir) / "quarantine.jsonl")
        for loaded in _stream(self._steps, range(len(self._steps)), self._config.data):
            for line in loaded.bad.values():
                log.append(line)
            yield loaded.batch()


def build_loader(
    config: LoaderConfig,
    rank: int,
    world_size: int,
    start_step: int = 0,
    state: dict[str, Any] | None = None,
    allow_change: bool = False,
) -> TrainLoader:
    """The training batches of one rank; needs no process group and no earlier run.

    Args:
        config: the run's.
        rank: 0 to world_size - 1.
        world_size: ranks that share each global batch.
        start_step: the first step to yield.
        state: the data state of the checkpoint that is gone on from; other data are refused before anything is written.
        allow_change: let the mixture change against `state`, as `SampleSequence.resume` says.

    Yields one dict a step with the rank's share, B = global_batch / world_size samples: the arrays of
    `collate.Collator` as tensors, `keys` list[str], `index` int64 [B] (id over all sources), `seed` int64 [B], and the
    ints `step` and `epoch` (of the global batch's first sample). Raises `BadInput` for data that cannot be opened or
    are not those of `state`, for a global batch that the ranks cannot share, and, while iterating, past the limits on
    bad samples.
    """
    data = config.data
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    if data.global_batch % world_size:
        raise BadInput(
            f"data.global_batch: {data.global_batch} samples do not divide evenly among {world_size} ranks; "
            f"use a multiple of {world_size}"
        )
    datasets = [open_dataset(source.path, data.remote) for source in data.train_sources]
    try:
        weights = source_weights(
            [len(dataset) for dataset in datasets],
            [source.weight for source in data.train_sources],
            [source.epochs for source in data.train_sources],
            data.temperature,
        )
    except ValueError as error:
        raise BadInput(f"data.train: {error}") from error
    sequence = SampleSequence(
        datasets, weights, config.run.seed, data.global_batch, data.num_streams, data.shuffle_block, data.tail
    )
    if state is not None:
        sequence.resume(state, allow_change)
    # The weights know the tokens of the sources that the run began with.
    tokenizer = make_tokenizer(config, datasets[: sequence.num_first_sources])
    reader = _Reader(datasets, Collator(data, TextEncoder.of(tokenizer), data.augment))
    return TrainLoader(config, sequence, _TrainSteps(reader, sequence, data, rank, world_size), tokenizer, start_step)


def build_eval_loader(
    config: LoaderConfig,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    rank: int,
    world_size: int,
    batch_size: int,
) -> EvalLoader:
    """Batches of `batch_size` for one rank, in dataset order and without augmentation; the same number on every rank.

    The last ones are filled up with copies of weight 0. With `evaluation.max_samples` fewer samples are taken, spread
    evenly over the dataset. The batches hold what `build_loader`'s do; `index` is the id in the dataset.
    """
    count = min(len(dataset), config.evaluation.max_samples or len(dataset))
    ids = np.arange(count, dtype=np.int64) * len(dataset) // count
    reader = _Reader([dataset], Collator(config.data, TextEncoder.of(tokenizer), None))
    return EvalLoader(config, _EvalSteps(reader, ids, config.run.seed, rank, world_size, batch_size))

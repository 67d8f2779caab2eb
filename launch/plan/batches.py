"""The micro-batches that a run will train on, as far as they are known before it: sizes and numbers of tokens.

Which samples make a batch is a pure function of the config, so their rows of the index say how many patches, seconds of
sound and bytes of text the ranks will get; texts are read and counted where the dataset lies on a disk. Where there is
no dataset yet, every sample is as large as the config lets it be.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from data_pipelines import augment, open_dataset
from data_pipelines.balance import deal
from data_pipelines.config import DataConfig
from data_pipelines.costs import num_patches, sample_costs, soft_tokens
from data_pipelines.dataset import Costs, Dataset
from data_pipelines.decode import DecodeError, decode_text, max_samples, patch_positions, target_size
from data_pipelines.errors import BadInput
from data_pipelines.mixture import source_weights
from data_pipelines.sequence import Picked, SampleSequence
from data_pipelines.tokenizer import EXTRA_TOKENS, NAMED_TOKENS, SPECIAL_TOKENS, TextEncoder, make_tokenizer
from pretrain.config import Config
from pretrain.features import FRAME_MULTIPLE, num_frames

IntArray = npt.NDArray[np.int64]
MOST_STEPS = 8
"""Steps that are looked at, spread over the first epoch."""
MOST_RANKS = 8
"""Ranks that are looked at in each."""
_MOST_TRAINED = 50_000
"""Samples up to which the run's tokenizer is made; in larger datasets a token is taken to be four bytes."""
_FULL_SIDE = 1 << 12


@dataclass(frozen=True)
class Sizes:
    """Samples by what they cost: int64 arrays of one length, 0 where the modality is missing."""

    width: IntArray
    """Pixels, as is `height`."""
    height: IntArray
    audio_samples: IntArray
    text_tokens: IntArray
    seed: IntArray

    def take(self, places: slice | list[int]) -> Sizes:
        """Some of them."""
        return Sizes(*(getattr(self, column.name)[places] for column in fields(self)))


@dataclass(frozen=True)
class DataTotals:
    """What an epoch of the training data holds; counted in the index, scaled up from a part of it where it is large."""

    samples: int
    text_tokens: float
    """Without BOS and EOS."""
    soft_tokens: float
    """Language-model tokens of images and sounds."""
    audio_hours: float
    bytes: int


class Expected:
    """Batches to come of a run of `world_size` ranks."""

    def __init__(self, config: Config, world_size: int) -> None:
        self.config = config
        self._world_size = world_size
        self.datasets = _open(config)
        """The training datasets; empty where one of them is still to be built."""
        self.tokenizer, self._counts_tokens = _tokenizer(config, self.datasets)
        self._encoder = TextEncoder.of(self.tokenizer)
        self._sequence = _sequence(config, self.datasets) if self.datasets else None

    @property
    def is_known(self) -> bool:
        """Whether there is data to look at."""
        return self._sequence is not None

    @property
    def samples_an_epoch(self) -> int | None:
        """Samples that an epoch trains on; None where there is no data yet."""
        return self._sequence.samples_an_epoch if self._sequence is not None else None

    def shares(self) -> Iterator[list[Sizes]]:
        """Of some steps, what some ranks get: one list a step, one entry a rank."""
        ranks = np.unique(np.linspace(0, self._world_size - 1, min(MOST_RANKS, self._world_size)).astype(int))
        if self._sequence is None:
            share = self.config.data.global_batch // self._world_size
            yield [_full(self.config.data, share)]
            return
        batch = self.config.data.global_batch
        epoch = max(1, self._sequence.samples_an_epoch // batch)
        steps = min(self.config.train.max_steps, epoch)
        for step in np.unique(np.linspace(0, steps - 1, min(steps, self._most_steps)).astype(int)).tolist():
            picked = self._sequence.batch(step)
            hands = deal(self._costs(picked), self._world_size)
            yield [self._sizes(picked[hands[rank]]) for rank in ranks.tolist()]

    @property
    def _most_steps(self) -> int:
        # Each shard behind a URL has an index to be fetched.
        return MOST_STEPS if all(dataset.is_local for dataset in self.datasets) else 1

    def totals(self) -> DataTotals | None:
        """What an epoch holds; None where there is no data yet."""
        if self._sequence is None:
            return None
        found = np.zeros(4)
        for dataset in self.datasets:
            ids = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), 4096)).astype(np.int64))
            if not dataset.is_local:
                ids = ids[ids < int(dataset.shard_sizes[0])]
            costs = dataset.costs(ids)
            image, audio, text = soft_tokens(costs, self.config.data)
            if self._counts_tokens:
                text = np.minimum(self._tokens(dataset, ids[:1024]), self.config.data.text.max_tokens)
            part = [text.mean(), image.mean() + audio.mean(), costs.audio_seconds.mean() / 3600]
            found += np.array([len(dataset), *(len(dataset) * each for each in part)])
        scale = self._sequence.samples_an_epoch / found[0]
        size = sum(shard.bytes for dataset in self.datasets for shard in dataset.shards)
        text_tokens, other_tokens, audio_hours = (found[1:] * scale).tolist()
        return DataTotals(self._sequence.samples_an_epoch, text_tokens, other_tokens, audio_hours, size)

    def _costs(self, picked: Picked) -> npt.NDArray[np.float64]:
        """As the loader deals them."""
        costs = np.zeros(len(picked.sample))
        for number, here in _by_source(picked):
            costs[here] = sample_costs(self.datasets[number].costs(picked.sample[here]), self.config.data)
        return costs

    def _sizes(self, picked: Picked) -> Sizes:
        width, height, audio, text = (np.zeros(len(picked.sample), dtype=np.int64) for _ in range(4))
        made = Sizes(width, height, audio, text, picked.seed)
        for number, here in _by_source(picked):
            dataset, ids = self.datasets[number], picked.sample[here]
            costs = dataset.costs(ids)
            made.width[here], made.height[here] = costs.width, costs.height
            made.audio_samples[here] = _audio_samples(costs, picked.seed[here], self.config.data)
            made.text_tokens[here] = (
                np.minimum(self._tokens(dataset, ids), self.config.data.text.max_tokens)
                if self._counts_tokens
                else soft_tokens(costs, self.config.data)[2]
            )
        return made

    def _tokens(self, dataset: Dataset, ids: IntArray) -> IntArray:
        """Tokens of these samples' texts."""
        most = self.config.data.text.max_bytes
        found = np.zeros(len(ids), dtype=np.int64)
        for place, raw in dataset.iter_read(ids, ("text",), {"text": most}):
            try:
                text = None if raw.text is None else decode_text(raw.text, most)
            except DecodeError:
                continue
            found[place] = len(self._encoder(text)) if text else 0
        return found


def micro_batches(sizes: Sizes, size: int, config: DataConfig) -> Iterator[tuple[dict[str, Any], int]]:
    """Cut a rank's share into micro-batches: each as the loader makes it, without pixels and sound, and its mel frames.

    Images are padded to the largest of the whole share, as the loader stacks them.
    """
    grids = [_grid(int(w), int(h), config) for w, h in zip(sizes.width, sizes.height, strict=True)]
    smallest = config.image.max_patches if config.image.size is not None else config.image.pooling**2
    patches = max([smallest, *(columns * rows for columns, rows in grids)])
    for start in range(0, len(grids), size):
        part = sizes.take(slice(start, start + size))
        position = np.full((len(part.seed), patches, 2), -1, dtype=np.int64)
        for place, (columns, rows) in enumerate(grids[start : start + size]):
            position[place, : columns * rows] = patch_positions(columns, rows)
        tokens = max(1, int(part.text_tokens.max()))
        audio_length = torch.from_numpy(part.audio_samples.copy())
        batch: dict[str, Any] = {
            "keys": [""] * len(part.seed),
            "seed": torch.from_numpy(part.seed.copy()),
            "weight": torch.ones(len(part.seed)),
            "image_position": torch.from_numpy(position),
            "audio_length": audio_length,
            # No special token: what is counted is how many there are.
            "text": torch.full((len(part.seed), tokens), len(SPECIAL_TOKENS), dtype=torch.int64),
            "text_length": torch.from_numpy(part.text_tokens.copy()),
        }
        frames = int(num_frames(audio_length, config.audio).max())
        yield batch, max(1, math.ceil(frames / FRAME_MULTIPLE)) * FRAME_MULTIPLE


def _by_source(picked: Picked) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    for number in np.unique(picked.source).tolist():
        yield number, picked.source == number


def _open(config: Config) -> list[Dataset]:
    data = config.data
    to_build = {Path(wanted.out).resolve() for wanted in data.build}
    found = []
    for source in data.train_sources:
        if Path(source.path).resolve() in to_build and not (Path(source.path) / "dataset.json").exists():
            return []
        found.append(open_dataset(source.path, data.remote))
    return found


def _sequence(config: Config, datasets: Sequence[Dataset]) -> SampleSequence:
    data, sources = config.data, config.data.train_sources
    try:
        weights = source_weights(
            [len(dataset) for dataset in datasets],
            [source.weight for source in sources],
            [source.epochs for source in sources],
            data.temperature,
        )
    except ValueError as error:
        raise BadInput(f"data.train: {error}") from error
    return SampleSequence(
        datasets, weights, config.run.seed, data.global_batch, data.num_streams, data.shuffle_block, data.tail
    )


def _tokenizer(config: Config, datasets: Sequence[Dataset]) -> tuple[PreTrainedTokenizerFast, bool]:
    """The run's tokenizer and true, or one with as many tokens and false where making it would take long."""
    made = Path(config.run.dir) / "tokenizer"
    few = sum(len(dataset) for dataset in datasets) <= _MOST_TRAINED and all(each.is_local for each in datasets)
    if not datasets or not (few or config.data.text.tokenizer or made.is_dir()):
        return _stand_in(config.data.text.vocab_size), False
    # In a folder of its own: planning writes nothing into the run directory.
    with tempfile.TemporaryDirectory(prefix="triptych-plan-") as folder:
        if made.is_dir():
            shutil.copytree(made, Path(folder) / "tokenizer")
        elsewhere = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
        return make_tokenizer(elsewhere, datasets), all(each.is_local for each in datasets)


def _stand_in(vocab_size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = [*SPECIAL_TOKENS, *(f"w{number}" for number in range(max(1, vocab_size - len(SPECIAL_TOKENS))))]
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")),
        **NAMED_TOKENS,
        extra_special_tokens=EXTRA_TOKENS,
    )


def _audio_samples(costs: Costs, seeds: IntArray, config: DataConfig) -> IntArray:
    """Samples of sound after decoding and augmentation."""
    rate = config.audio.sampling_rate
    found = np.floor(np.minimum(costs.audio_seconds.astype(np.float64), config.audio.max_seconds) * rate)
    if config.augment.audio_speed or config.augment.audio_shift_seconds:
        for place in np.flatnonzero(found).tolist():
            random = augment.generator(int(seeds[place]), augment.AUDIO_STREAM)
            found[place] = augment.augmented_samples(int(found[place]), rate, config.augment, random)
    cut: IntArray = np.minimum(found, max_samples(config.audio)).astype(np.int64)
    return cut


def _grid(width: int, height: int, config: DataConfig) -> tuple[int, int]:
    """Columns and rows of patches of an image."""
    if not int(num_patches(width, height, config.image)):
        return 0, 0
    try:
        wide, high = target_size(width, height, config.image)
    except DecodeError:
        return 0, 0
    return wide // config.image.patch_size, high // config.image.patch_size


def _full(config: DataConfig, size: int) -> Sizes:
    """Samples that are as large as the config lets them be."""

    def all_of(value: int) -> IntArray:
        return np.full(size, value, dtype=np.int64)

    audio = int(config.audio.max_seconds * config.audio.sampling_rate)
    # The budget of soft tokens in the squarest grid that fills it.
    rows = max(
        d for d in range(1, math.isqrt(config.image.max_soft_tokens) + 1) if config.image.max_soft_tokens % d == 0
    )
    columns = config.image.max_soft_tokens // rows
    return Sizes(
        all_of(_FULL_SIDE * columns),
        all_of(_FULL_SIDE * rows),
        all_of(audio),
        all_of(config.text.max_tokens),
        np.arange(size, dtype=np.int64),
    )

"""What it costs a core to make samples ready: measured on the data itself, or reckoned from the index."""

from __future__ import annotations

import time

import numpy as np

from data_pipelines.collate import Collator
from data_pipelines.dataset import Dataset
from data_pipelines.shard import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from data_pipelines.tokenizer import TextEncoder
from launch.plan.batches import Expected
from pretrain.config import Config

_MEASURED_SAMPLES = 48
_MEASURED_SECONDS = 3.0

# Where nothing can be decoded: CPU seconds measured on one core for JPEGs of 256 x 256 pixels and two seconds of sound.
_PIXEL_SECONDS = 1 / 2012 / 256**2
_SECOND_SECONDS = {"wav": 1 / 8170 / 2, "flac": 1 / 2140 / 2, "mp3": 1 / 1780 / 2, "ogg": 1 / 239 / 2}
_SAMPLE_SECONDS = 0.7e-3
"""Resizing, cutting into patches and stacking one sample."""
_ASSUMED_PIXELS = 512 * 512


def decode_seconds(config: Config, expected: Expected) -> tuple[float, str]:
    """CPU seconds a sample, and how that is known: `measured`, `index` or `assumed`."""
    local = [dataset for dataset in expected.datasets if dataset.is_local]
    if local and len(local) == len(expected.datasets):
        return _measure(config, expected, max(local, key=len)), "measured"
    if expected.datasets:
        return _from_index(expected.datasets[0]), "index"
    audio = config.data.audio.max_seconds * _SECOND_SECONDS["flac"]
    return _ASSUMED_PIXELS * _PIXEL_SECONDS + audio + _SAMPLE_SECONDS, "assumed"


def _measure(config: Config, expected: Expected, dataset: Dataset) -> float:
    """Decode samples spread over the dataset in this process, as a loader's worker does."""
    collator = Collator(config.data, TextEncoder.of(expected.tokenizer), config.data.augment)
    ids = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _MEASURED_SAMPLES)).astype(np.int64))
    seconds, done, started = 0.0, 0, time.monotonic()
    for place, part in enumerate(np.array_split(ids, max(1, len(ids) // 8))):
        before = time.process_time()
        samples = [raw for _, raw in dataset.iter_read(part, limits=collator.limits)]
        collator(samples, part.tolist(), [dataset.location] * len(samples))
        # The first ones pay for imports and tables.
        if place:
            seconds += time.process_time() - before
            done += len(part)
        if time.monotonic() - started > _MEASURED_SECONDS and done:
            break
    return seconds / done if done else _from_index(dataset)


def _from_index(dataset: Dataset) -> float:
    index = dataset.index(0)
    pixels = np.where(index["image_size"] >= 0, index["width"].astype(np.int64) * index["height"], 0)
    image = np.array([_PIXEL_SECONDS * (1 if name in ("jpg", "jpeg") else 2) for name in IMAGE_EXTENSIONS])
    audio = np.array([_SECOND_SECONDS.get(name, _SECOND_SECONDS["flac"]) for name in AUDIO_EXTENSIONS])
    cost = pixels * image[index["image_extension"]] + index["audio_seconds"] * audio[index["audio_extension"]]
    return float(cost.mean()) + _SAMPLE_SECONDS

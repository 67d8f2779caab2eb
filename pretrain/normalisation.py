"""Mean and standard deviation of what a model gets from a dataset: pixels and log-mel values.

Everything passes through the code that training uses: `data_pipelines.decode` and `pretrain.features.log_mel`, with the
run's own image and mel settings and without augmentation. Samples are taken in chunks whose borders do not depend on
the number of workers, and merged in order: the same numbers on any machine with the same libraries.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data_pipelines.config import AudioConfig, DataConfig, ImageConfig
from data_pipelines.dataset import Dataset
from data_pipelines.decode import (
    MAX_AUDIO_BYTES,
    MAX_IMAGE_BYTES,
    DecodeError,
    load_audio,
    load_image,
    resize_image,
    to_int16,
)
from data_pipelines.errors import BadInput
from data_pipelines.moments import Moments
from data_pipelines.progress import Progress
from pretrain.features import log_mel

_CHUNK = 64
_LIMITS = {"image": MAX_IMAGE_BYTES, "audio": MAX_AUDIO_BYTES}
_MEL_SETTINGS = (
    "sampling_rate",
    "max_seconds",
    "mel_bins",
    "frame_ms",
    "hop_ms",
    "min_frequency",
    "max_frequency",
)


@dataclass
class Constants:
    """What `measure` found in `num_samples` samples.

    `pixels` are moments of red, green and blue in 0..1 over the resized images, `mel` of every mel bin over all whole
    frames, before any normalisation. `num_images` and `num_sounds` were used; `left_out` counts members that do not
    decode, by reason.
    """

    audio: AudioConfig
    num_samples: int = 0
    num_images: int = 0
    num_sounds: int = 0
    pixels: Moments = field(default_factory=lambda: Moments.none(3))
    mel: Moments = field(default_factory=lambda: Moments.none(0))
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, other: Constants) -> None:
        """Merge the next chunk into this."""
        self.num_samples += other.num_samples
        self.num_images += other.num_images
        self.num_sounds += other.num_sounds
        self.pixels = self.pixels.merged(other.pixels)
        self.mel = self.mel.merged(other.mel)
        self.left_out += other.left_out

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold; `image` or `audio` is null where the dataset has none."""
        image = {"mean": _rounded(self.pixels.mean), "std": _rounded(self.pixels.std), "num_images": self.num_images}
        overall = self.mel.pooled() if self.mel.count else None
        audio = overall and {
            "mel_mean": _rounded(overall.mean)[0],
            "mel_std": _rounded(overall.std)[0],
            "per_bin_mean": _rounded(self.mel.mean),
            "per_bin_std": _rounded(self.mel.std),
            "num_sounds": self.num_sounds,
            "num_frames": self.mel.count,
            "settings": {name: getattr(self.audio, name) for name in _MEL_SETTINGS},
        }
        return {
            "num_samples": self.num_samples,
            "left_out": dict(sorted(self.left_out.items())),
            "image": image if self.pixels.count else None,
            "audio": audio,
        }

    def as_yaml(self) -> str:
        """Lines to paste into a config; whatever no setting takes is in comments."""
        found = self.as_json()
        left_out = sum(self.left_out.values())
        lines = [
            f"# {self.num_samples} samples: {self.num_images} images, {self.num_sounds} sounds, {left_out} left out"
        ]
        if found["audio"]:
            settings = ", ".join(f"{name} {json.dumps(value)}" for name, value in found["audio"]["settings"].items())
            lines += _comment(f"for {settings}; with other settings they are others")
            lines += ["data:", "  audio:"]
            lines += [f"    {name}: {found['audio'][name]!r}" for name in ("mel_mean", "mel_std")]
            for name in ("mean", "std"):
                lines += _comment(f"{name} of each mel bin: {found['audio'][f'per_bin_{name}']}")
        if found["image"]:
            image = f"mean {found['image']['mean']}, std {found['image']['std']}"
            lines += _comment(f"red, green, blue in 0..1: {image} (no setting: the model takes pixels as they are)")
        return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)


def _rounded(values: np.ndarray) -> list[float]:
    # Six digits: far finer than the data is known, coarser than the last bits that libraries differ in.
    return [float(f"{value:.6g}") for value in values.tolist()]


def measure(
    dataset: Dataset,
    data: DataConfig,
    *,
    samples: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Constants:
    """Measure a dataset with the image and audio settings of `data`.

    Args:
        dataset: what to measure.
        data: `image` and `audio` are used, but for `mel_mean` and `mel_std`.
        samples: take this many, spread evenly; by default all.
        workers: threads; by default one a core. The result does not depend on it.
        progress: tell on standard error how far the work is.

    Raises:
        BadInput: there is neither a picture nor a sound that decodes; a tar is gone.
    """
    audio = data.audio.model_copy(update={"mel_mean": 0.0, "mel_std": 1.0})
    wanted = len(dataset) if samples is None else min(samples, len(dataset))
    if wanted < 1 or (workers is not None and workers < 1):
        raise BadInput("samples and workers: give 1 or more")
    ids = np.unique(np.linspace(0, len(dataset) - 1, wanted).astype(np.int64))
    total = Constants(audio, mel=Moments.none(audio.mel_bins))
    chunks = (ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK))
    num_threads = workers or len(os.sched_getaffinity(0))
    with Progress(f"measuring {dataset.path}", "samples", quiet=not progress) as shown, _one_torch_thread():
        shown.start(len(ids))
        with ThreadPoolExecutor(num_threads) as pool:
            waiting: deque[Future[Constants]] = deque()
            for chunk in chunks:
                waiting.append(pool.submit(_measure_chunk, dataset, chunk, data.image, audio))
                if len(waiting) > 2 * num_threads:
                    _take(waiting, total, shown)
            while waiting:
                _take(waiting, total, shown)
    if not total.pixels.count and not total.mel.count:
        why = ", ".join(f"{count} x {reason}" for reason, count in total.left_out.items())
        raise BadInput(f"{dataset.path}: neither a picture nor a sound to measure" + (f" ({why})" if why else ""))
    return total


def _take(waiting: deque[Future[Constants]], total: Constants, shown: Progress) -> None:
    chunk = waiting.popleft().result()
    total.add(chunk)
    shown.advance(chunk.num_samples)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """One thread inside each of ours: more would fight for the cores, and sums could depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure_chunk(dataset: Dataset, ids: np.ndarray, image: ImageConfig, audio: AudioConfig) -> Constants:
    found = Constants(audio, num_samples=len(ids), mel=Moments.none(audio.mel_bins))
    # In the order of the ids, which ascend; one sample's bytes are held at a time.
    for _, raw in dataset.iter_read(ids, ("image", "audio"), _LIMITS):
        if raw.too_large is not None:
            found.left_out[f"{raw.too_large} size"] += 1
            continue
        if raw.image is not None:
            try:
                pixels = np.asarray(resize_image(load_image(raw.image, image.max_pixels), image))
                found.pixels = found.pixels.merged(Moments.of(pixels.reshape(-1, 3) / np.float64(255)))
                found.num_images += 1
            except DecodeError as error:
                found.left_out[f"image {error.reason}"] += 1
        if raw.audio is not None:
            try:
                found.mel = found.mel.merged(Moments.of(_frames(raw.audio, audio)))
                found.num_sounds += 1
            except DecodeError as error:
                found.left_out[f"audio {error.reason}"] += 1
    return found


def _frames(data: bytes, audio: AudioConfig) -> np.ndarray:
    """Log-mel values of a sound's whole frames: float32 [F, mel_bins]."""
    wave = torch.from_numpy(to_int16(load_audio(data, audio)))[None]
    mel, mask = log_mel(wave, torch.tensor([wave.shape[1]]), audio)
    return mel[0][mask[0]].numpy()

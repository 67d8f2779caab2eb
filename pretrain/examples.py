"""Samples for a page to show: picture, spectrogram and sound inside it, and texts below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipelines.config import AudioConfig
from data_pipelines.dataset import Dataset
from data_pipelines.decode import DecodeError, load_audio
from data_pipelines.headers import image_size
from data_pipelines.pictures import data_uri, mel_levels, spectrogram_png
from data_pipelines.shard import Sample

_IMAGE_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_AUDIO_TYPES = {"flac": "audio/flac", "wav": "audio/wav", "mp3": "audio/mpeg", "ogg": "audio/ogg"}


@dataclass(frozen=True)
class Example:
    """One sample as the page shows it. Addresses hold the data itself; None is a missing modality."""

    key: str
    picture: str | None
    picture_small: bool
    spectrogram: str | None
    audio: str | None
    texts: list[tuple[str, str]]
    absent: str = "no"
    """What stands before `picture` or `sound` in the place of one that is not there."""


@dataclass(frozen=True)
class Group:
    """A titled row of examples."""

    title: str
    note: str
    examples: list[Example]


def spread(dataset: Dataset, number: int, need: Sequence[str] = ()) -> list[int]:
    """Ids of samples spread evenly over a dataset, among those that have the modalities in `need`."""
    ids = np.arange(len(dataset))
    for modality in need:
        ids = ids[dataset.sizes(modality, ids) > 0]
    return ids[np.unique(np.linspace(0, len(ids) - 1, number).astype(int))].tolist() if len(ids) else []


def example(
    sample: Sample, audio: AudioConfig, texts: Sequence[tuple[str, str | None]], only: str | None = None
) -> Example:
    """A sample for the page, with its picture, spectrogram and sound inside.

    Args:
        sample: what to show; a picture or sound that does not decode is shown as missing.
        audio: how the run reads sounds: rate and longest.
        texts: labels and texts to put below; None is left out.
        only: `image` or `audio` shows that member alone; None shows what there is.
    """
    if only is not None:
        sample = replace(sample, **{"audio" if only == "image" else "image": None})
    picture, small, spectrogram, sound = None, False, None, None
    header = image_size(sample.image) if sample.image is not None else None
    if sample.image is not None and header is not None:
        picture, small = data_uri(sample.image, _IMAGE_TYPES[header[0]]), max(header[1:]) <= 64
    if sample.audio is not None:
        try:
            wave = load_audio(sample.audio, audio)
        except DecodeError:
            pass
        else:
            if len(wave):
                spectrogram = data_uri(spectrogram_png(mel_levels(wave, audio.sampling_rate)), "image/png")
            sound = data_uri(sample.audio, _AUDIO_TYPES[sample.audio_extension])
    shown = [(label, text) for label, text in texts if text is not None]
    return Example(sample.key, picture, small, spectrogram, sound, shown, "no" if only is None else "without the")

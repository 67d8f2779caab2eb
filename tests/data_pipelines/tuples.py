"""Small real samples: PNG and JPEG by Pillow, FLAC and WAV by soundfile."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from data_pipelines.shard import Sample


def encode_image(pixels: np.ndarray, image_format: str = "PNG", **options: Any) -> bytes:
    """Encode a uint8 or uint16 array [H, W] or [H, W, C]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()


def encode_sound(wave: np.ndarray, rate: int = 8000, sound_format: str = "FLAC") -> bytes:
    """Encode float samples [T] or [T, channels] in -1..1."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=sound_format)
    return file.getvalue()


def tuple_sample(number: int, *, missing: str = "", label: int | None = None) -> Sample:
    """A 28 x 28 PNG, half a second of 8 kHz FLAC and a caption, all functions of the number."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (28, 28), dtype=np.uint8)
    wave = 0.4 * np.sin(2 * np.pi * (200 + 10 * (number % 50)) * np.arange(3000 + 40 * (number % 20)) / 8000)
    return Sample(
        key=f"sample-{number:05d}",
        image=None if missing == "image" else encode_image(pixels),
        text=None if missing == "text" else f"the number {number} é",
        audio=None if missing == "audio" else encode_sound(wave + 0.01 * random.standard_normal(len(wave))),
        metadata={"label": number % 10 if label is None else label},
        image_extension="png",
        audio_extension="flac",
    )

"""Thumbnails and spectrograms show what is there."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.pictures import data_uri, mel_levels, spectrogram_png, thumbnail


def test_a_spectrogram_shows_where_the_sound_is() -> None:
    mel = np.zeros((30, 20))
    mel[:, 2] = 9.0
    pixels = np.asarray(Image.open(io.BytesIO(spectrogram_png(mel, height=20, width=30))).convert("L")).astype(int)
    assert pixels.shape == (20, 30)
    assert pixels[17].mean() > 150 > 60 > pixels[:14].mean(), "low bins are at the bottom"


@pytest.mark.parametrize("rate", [8_000, 24_000])
@pytest.mark.parametrize("hertz", [300, 1_000, 3_000])
def test_a_tone_lies_in_its_mel_band(rate: int, hertz: int) -> None:
    tone = np.sin(2 * np.pi * hertz * np.arange(rate // 2) / rate).astype(np.float32)
    mel = mel_levels(tone, rate, bins=64)
    assert mel.dtype == np.float32 and np.isfinite(mel).all()
    bands = 2595 * np.log10(1 + np.array([hertz, rate / 2]) / 700)
    assert mel[10:-10].mean(axis=0).argmax() == pytest.approx(bands[0] / bands[1] * 65 - 1, abs=1)


@pytest.mark.parametrize("length", [1, 2, 100, 200_001])
def test_any_sound_gives_a_spectrogram_of_bounded_length(length: int) -> None:
    mel = mel_levels(np.zeros(length, dtype=np.float32), 8_000)
    assert 1 <= len(mel) <= 602 and np.ptp(mel) == 0
    assert Image.open(io.BytesIO(spectrogram_png(mel))).size == (240, 96)


def test_a_thumbnail_is_small_and_tiny_pictures_stay_as_they_are() -> None:
    wide = Image.new("RGB", (900, 300), (10, 200, 30))
    data, kind = thumbnail(wide, 320)
    assert (Image.open(io.BytesIO(data)).size, kind) == ((320, 107), "image/jpeg")
    assert wide.size == (900, 300)
    tiny = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 20, 3), dtype=np.uint8))
    data, kind = thumbnail(tiny, 320)
    assert kind == "image/png" and np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(tiny))


def test_an_address_holds_its_data() -> None:
    assert data_uri(b"abc", "image/png") == "data:image/png;base64,YWJj"

"""Members written anew: what they become, what is left as it is, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipelines.config import AudioConfig
from data_pipelines.decode import DecodeError, load_audio, load_image
from data_pipelines.reencode import library_versions, reencode_audio, reencode_image
from tests.data_pipelines.tuples import encode_image, encode_sound


def tone(rate: int, seconds: float, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    return wave if channels == 1 else np.stack([wave * (c + 1) / channels for c in range(channels)], axis=1)


@pytest.mark.parametrize(
    ("rate", "channels", "kind"),
    [
        (44_100, 2, "WAV"),
        (8_000, 1, "FLAC"),
        (16_000, 2, "FLAC"),
        (16_000, 1, "WAV"),
        (48_000, 1, "OGG"),
        (22_050, 1, "MP3"),
    ],
)
def test_sounds_become_mono_flac(rate: int, channels: int, kind: str) -> None:
    data = encode_sound(tone(rate, 1.3, channels), rate, kind)
    made = reencode_audio(data, 16_000)
    info = soundfile.info(io.BytesIO(made))
    assert (info.format, info.subtype, info.channels, info.samplerate) == ("FLAC", "PCM_16", 1, 16_000)
    assert made == reencode_audio(data, 16_000)
    # The loader, which resamples in one piece, hears the same from both.
    config = AudioConfig()
    one, two = load_audio(data, config), load_audio(made, config)
    assert abs(len(one) - len(two)) <= 1
    assert np.abs(one[: len(two)] - two[: len(one)]).max() < 2e-3


def test_long_sounds_go_through_in_blocks() -> None:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 1_300_000)
    made = reencode_audio(encode_sound(wave, 32_000, "WAV"), 16_000)
    assert soundfile.info(io.BytesIO(made)).frames == pytest.approx(650_000, abs=1)


def test_sounds_that_are_so_already_keep_their_bytes() -> None:
    data = encode_sound(tone(16_000, 0.2), 16_000, "FLAC")
    assert reencode_audio(data, 16_000) is data


def test_sounds_that_are_refused() -> None:
    nan = io.BytesIO()
    soundfile.write(nan, np.array([0.0, np.nan]), 8000, format="WAV", subtype="FLOAT")
    whole = encode_sound(tone(8000, 1), 8000, "FLAC")
    for data, reason in (
        (b"nothing", "decode"),
        (nan.getvalue(), "decode"),
        (encode_sound(np.zeros(0), 8000, "WAV"), "empty"),
    ):
        with pytest.raises(DecodeError) as caught:
            reencode_audio(data, 16_000)
        assert caught.value.reason == reason
    with pytest.raises(DecodeError):
        reencode_audio(whole[: len(whole) // 2], 16_000)


def pixels(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2).astype(np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_capped_in_their_own_format(kind: str) -> None:
    data = encode_image(pixels(60, 90), kind)
    made, extension = reencode_image(data, 45, None)
    image = Image.open(io.BytesIO(made))
    assert (image.format, image.size) == (kind, (45, 30)) and extension == {"JPEG": "jpg"}.get(kind, kind.lower())
    expected = Image.fromarray(pixels(60, 90)).resize((45, 30), Image.Resampling.LANCZOS)
    difference = np.asarray(load_image(made, 10**6), np.int16) - np.asarray(expected, np.int16)
    assert np.abs(difference).mean() < 4
    assert reencode_image(data, 90, None) == (data, extension)
    assert reencode_image(data, 45, None)[0] == made


def test_images_are_converted() -> None:
    png = encode_image(pixels(8, 8))
    for wanted, kind in (("jpeg", "JPEG"), ("webp", "WEBP")):
        made, extension = reencode_image(png, None, wanted)  # type: ignore[arg-type]
        assert Image.open(io.BytesIO(made)).format == kind and extension == {"JPEG": "jpg"}.get(kind, "webp")
    assert reencode_image(png, None, "png") == (png, "png")


def test_odd_images() -> None:
    gray = encode_image((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16))
    made, _ = reencode_image(gray, 4, None)
    assert Image.open(io.BytesIO(made)).mode == "L"
    line = encode_image(pixels(1, 400))
    assert Image.open(io.BytesIO(reencode_image(line, 20, None)[0])).size == (20, 1)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(20, 40)).save(turned, "JPEG", exif=exif)
    upright = Image.open(io.BytesIO(reencode_image(turned.getvalue(), 20, None)[0]))
    assert upright.size == (10, 20) and not upright.getexif()


def test_images_that_are_refused() -> None:
    jpeg = encode_image(pixels(60, 90), "JPEG")
    for data in (b"GIF89a", jpeg[: len(jpeg) // 2]):
        with pytest.raises(DecodeError):
            reencode_image(data, 10, None)
    with pytest.raises(DecodeError, match="do not go into WEBP"):
        reencode_image(encode_image(np.zeros((1, 20_000), np.uint8)), None, "webp")


def test_versions_are_known() -> None:
    assert set(library_versions()) >= {"pillow", "libsndfile", "libsoxr"} and all(library_versions().values())

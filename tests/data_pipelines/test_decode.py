"""Decoding: equal to the exported processor on good files, and nothing but a `DecodeError` on bad ones.

What strangers may send, case by case, is in test_hostile.py.
"""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.config import AudioConfig, ImageConfig
from data_pipelines.decode import (
    DecodeError,
    decode_metadata,
    decode_text,
    load_audio,
    load_image,
    max_samples,
    patch_positions,
    patchify,
    resize_image,
    target_size,
    to_int16,
)
from tests.data_pipelines.tuples import encode_image, encode_sound, tuple_sample

MAX_PIXELS = 1_000_000
RANDOM = np.random.default_rng(0)
NATIVE = ImageConfig()
# Place in the file, as a share of it, and what the byte there is changed by.
FLIPS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=8)
SOUND = AudioConfig(sampling_rate=16_000, max_seconds=2.0)


def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    noise = RANDOM.integers(0, 256, (height // 8 + 1, width // 8 + 1, channels), dtype=np.uint8)
    smooth = Image.fromarray(noise.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def palette_with_transparency() -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels(60, 80)).quantize(16)
    image.save(file, "PNG", transparency=3)
    return file.getvalue()


@functools.cache
def files_of_every_kind() -> dict[str, bytes]:
    cmyk = io.BytesIO()
    Image.fromarray(pixels(90, 70)).convert("CMYK").save(cmyk, "JPEG")
    return {
        "rgb png": encode_image(pixels(300, 200)),
        "rgb jpeg": encode_image(pixels(123, 457), "JPEG"),
        "rgb webp": encode_image(pixels(97, 31), "WEBP"),
        "gray png": encode_image(pixels(28, 28, 1)),
        "gray jpeg": encode_image(pixels(48, 48, 1), "JPEG"),
        "rgba png": encode_image(pixels(50, 60, 4)),
        "rgba webp": encode_image(pixels(50, 60, 4), "WEBP", lossless=True),
        "palette png": palette_with_transparency(),
        "cmyk jpeg": cmyk.getvalue(),
        "one bit png": encode_image(pixels(64, 64, 1) > 128),
        "long png": encode_image(pixels(40, 1000)),
        "exact png": encode_image(pixels(384, 384)),
    }


@pytest.mark.parametrize("name", files_of_every_kind())
def test_patches_equal_those_of_the_exported_processor(name: str) -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    data = files_of_every_kind()[name]
    processor = Gemma4ImageProcessorPil(patch_size=16, max_soft_tokens=70, pooling_kernel_size=3)
    theirs = processor([Image.open(io.BytesIO(data))], return_tensors="np")
    image = resize_image(load_image(data, MAX_PIXELS), NATIVE)
    patches = patchify(np.asarray(image), NATIVE.patch_size)
    positions = patch_positions(image.width // 16, image.height // 16)
    valid = (theirs["image_position_ids"][0] >= 0).all(-1)
    np.testing.assert_array_equal(positions, theirs["image_position_ids"][0][valid])
    np.testing.assert_array_equal(patches, np.rint(theirs["pixel_values"][0][valid] * 255).astype(np.uint8))
    np.testing.assert_allclose(patches.astype(np.float32) / 255, theirs["pixel_values"][0][valid], atol=1e-7)


def test_a_fixed_size_is_a_bicubic_square() -> None:
    config = ImageConfig(size=32, patch_size=4, pooling=2)
    image = load_image(encode_image(pixels(28, 40)), MAX_PIXELS)
    small = resize_image(image, config)
    np.testing.assert_array_equal(small, image.resize((32, 32), Image.Resampling.BICUBIC))
    assert resize_image(small, config) is small
    patches = patchify(np.asarray(small), 4)
    assert patches.shape == (64, 48) and patches.dtype == np.uint8
    np.testing.assert_array_equal(patches[9].reshape(4, 4, 3), np.asarray(small)[4:8, 4:8])
    assert patch_positions(8, 8)[9].tolist() == [1, 1] and patch_positions(3, 2)[4].tolist() == [1, 1]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    wide = np.linspace(0, 65_535, 256 * 4).astype(np.uint16).reshape(32, 32)
    found = np.asarray(load_image(encode_image(wide), MAX_PIXELS))
    np.testing.assert_array_equal(found[..., 0], np.rint(wide / 257))
    assert (found[..., 0] == found[..., 2]).all() and found.max() == 255


def test_every_exif_orientation_is_made_upright() -> None:
    upright = pixels(40, 60)
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = np.ascontiguousarray(turn(upright))
        for image_format in ("PNG", "WEBP"):
            data = encode_image(stored, image_format, exif=exif, lossless=True)
            np.testing.assert_array_equal(
                load_image(data, MAX_PIXELS), upright, err_msg=f"{orientation} {image_format}"
            )


def test_broken_exif_costs_only_the_orientation() -> None:
    data = encode_image(pixels(20, 30), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + bytes(20))
    assert load_image(data, MAX_PIXELS).size == (30, 20)


def test_the_first_frame_of_an_animation() -> None:
    first, second = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    for image_format in ("PNG", "WEBP"):
        file = io.BytesIO()
        first.save(file, image_format, save_all=True, append_images=[second], lossless=True)
        assert load_image(file.getvalue(), MAX_PIXELS).getpixel((5, 5)) == (255, 0, 0)


def test_the_limit_on_pixels_is_the_settings_own() -> None:
    data = encode_image(pixels(100, 100))
    assert load_image(data, 10_000).size == (100, 100)
    with pytest.raises(DecodeError, match="100 x 100"):
        load_image(data, 9_999)


@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 1), (1, 1), (3, 7), (480, 640), (1000, 1)])
def test_native_sizes_fit_the_budget(shape: tuple[int, int]) -> None:
    wide, high = target_size(shape[1], shape[0], NATIVE)
    assert wide % 48 == 0 and high % 48 == 0 and 0 < wide * high <= NATIVE.max_patches * 256


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(files_of_every_kind())), FLIPS, st.floats(0, 1))
def test_damaged_images_raise_nothing_else(name: str, flips: list[tuple[float, int]], cut: float) -> None:
    data = bytearray(files_of_every_kind()[name])
    for place, change in flips:
        data[int(place * (len(data) - 1))] ^= change
    try:
        image = load_image(bytes(data[: int(len(data) * (1 - cut / 3))]), MAX_PIXELS)
    except DecodeError:
        return
    assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS


def wave(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * t)
    return tone if channels == 1 else np.stack([tone * (n + 1) / channels for n in range(channels)], axis=1)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_every_format_and_rate(kind: str, rate: int) -> None:
    found = load_audio(encode_sound(wave(0.5, rate), rate, kind), SOUND)
    assert found.dtype == np.float32 and abs(len(found) - 8000) <= (2500 if kind == "MP3" else 2)
    spectrum = np.abs(np.fft.rfft(found))
    assert abs(spectrum.argmax() * 16_000 / len(found) - 440) < 8


def test_channels_are_averaged_and_long_sounds_cut() -> None:
    found = load_audio(encode_sound(wave(1.0, 16_000, 3), 16_000), SOUND)
    np.testing.assert_allclose(found, wave(1.0, 16_000) * 2 / 3, atol=1e-4)
    assert len(load_audio(encode_sound(wave(5.0, 44_100), 44_100), SOUND)) == max_samples(SOUND) == 32_000


def test_sixteen_bit_samples_come_back_unchanged() -> None:
    samples = RANDOM.integers(-32_768, 32_768, 5000).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV")
    np.testing.assert_array_equal(to_int16(load_audio(file.getvalue(), SOUND)), samples)
    assert to_int16(np.array([2.0, -2.0], dtype=np.float32)).tolist() == [32_767, -32_768]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(["WAV", "FLAC", "OGG", "MP3"]), FLIPS)
def test_damaged_sounds_raise_nothing_else(kind: str, flips: list[tuple[float, int]]) -> None:
    data = bytearray(encode_sound(wave(0.2, 8000), 8000, kind))
    for place, change in flips:
        data[int(place**2 * (len(data) - 1))] ^= change
    try:
        found = load_audio(bytes(data), SOUND)
    except DecodeError:
        return
    assert 0 < len(found) <= max_samples(SOUND) and np.isfinite(found).all()


def test_text_rules() -> None:
    assert decode_text("\ufeff grüße \n".encode(), 100) == "grüße"
    assert decode_text(b" \t\n", 100) is None and decode_text(b"", 100) is None
    for data, reason in (
        (b"\xff\xfe", "encoding"),
        (b"a\0b", "encoding"),
        (b"x" * 101, "size"),
        (b"\xed\xa0\x80", "encoding"),
    ):
        with pytest.raises(DecodeError) as caught:
            decode_text(data, 100)
        assert caught.value.reason == reason


def test_metadata_rules() -> None:
    assert decode_metadata(b'\xef\xbb\xbf{"label": 3}', 100) == {"label": 3}
    for data in (b"", b"[1]", b"{", b"\xff", b"[" * 90, b'"' + b"x" * 101):
        with pytest.raises(DecodeError):
            decode_metadata(data, 100)
    with pytest.raises(DecodeError, match="JSON"):
        decode_metadata(b"[" * 100_000, 1_000_000)


def test_a_decode_error_survives_a_process_boundary() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(DecodeError("size", "too large")))
    assert (error.reason, error.detail) == ("size", "too large")
    assert tuple_sample(0).image is not None

"""Augmentation does what each setting says, within its bounds, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_pipelines.augment import IMAGE_STREAM, ImageAugment, augment_audio, changes_audio, generator
from data_pipelines.config import AugmentConfig

RATE = 8000
TONE = (0.3 * np.sin(2 * np.pi * 500 * np.arange(4000) / RATE)).astype(np.float32)


def blob(x: int = 16, y: int = 16) -> Image.Image:
    pixels = np.full((32, 32, 3), 40, dtype=np.uint8)
    pixels[y - 2 : y + 3, x - 2 : x + 3] = 240
    return Image.fromarray(pixels)


def centre(pixels: np.ndarray) -> tuple[float, float]:
    weight = pixels[..., 0].astype(float) - 40
    y, x = np.mgrid[:32, :32]
    return (x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum()


def changed(config: AugmentConfig, seed: int, image: Image.Image | None = None) -> np.ndarray:
    return ImageAugment(config, generator(seed, IMAGE_STREAM)).apply(image or blob())


def test_nothing_set_changes_nothing() -> None:
    config = AugmentConfig()
    assert not ImageAugment.is_active(config) and not changes_audio(config)
    np.testing.assert_array_equal(changed(config, 1), blob())
    assert ImageAugment(config, generator(1, 0)).crop_box(10, 10) is None
    np.testing.assert_array_equal(augment_audio(TONE, RATE, config, generator(1, 1)), TONE)


@pytest.mark.parametrize(
    "setting",
    ["image_shift", "image_scale", "image_rotate", "image_crop", "image_flip", "image_noise"],
)
def test_each_image_setting_counts_as_active(setting: str) -> None:
    assert ImageAugment.is_active(AugmentConfig(**{setting: 0.5}))


def test_equal_seeds_equal_changes() -> None:
    config = AugmentConfig(image_shift=0.2, image_rotate=30, image_noise=0.1, audio_speed=0.1, audio_noise=0.2)
    np.testing.assert_array_equal(changed(config, 5), changed(config, 5))
    assert (changed(config, 5) != changed(config, 6)).any()
    one, other = (augment_audio(TONE, RATE, config, generator(seed, 1)) for seed in (5, 6))
    np.testing.assert_array_equal(one, augment_audio(TONE, RATE, config, generator(5, 1)))
    assert len(one) != len(other) or (one != other).any()


def test_switching_one_setting_does_not_move_the_others() -> None:
    plain, noisy = AugmentConfig(image_shift=0.2), AugmentConfig(image_shift=0.2, image_noise=0.02)
    difference = changed(plain, 3).astype(int) - changed(noisy, 3)
    assert 0 < np.abs(difference).mean() < 8


def test_shift_moves_by_at_most_its_share_in_every_direction() -> None:
    moves = np.array([centre(changed(AugmentConfig(image_shift=0.25), seed)) for seed in range(60)]) - 16
    assert np.abs(moves).max() <= 8.6 and np.abs(moves).max() > 6
    assert (moves[:, 0] > 0).any() and (moves[:, 0] < 0).any() and (moves[:, 1] > 0).any() and (moves[:, 1] < 0).any()


def test_scale_and_rotation() -> None:
    areas = [
        ((changed(AugmentConfig(image_scale=0.3), seed)[..., 0].astype(float) - 40) / 200).sum() for seed in range(60)
    ]
    assert 25 * 0.7**2 * 0.85 < min(areas) < 22 < 28 < max(areas) < 25 * 1.3**2 * 1.15
    config = AugmentConfig(image_rotate=90)
    places = np.array([centre(changed(config, seed, blob(26, 16))) for seed in range(60)]) - 15.5
    radius = np.hypot(*places.T)
    assert np.abs(radius - 10.5).max() < 1 and places[:, 1].min() < -8 and places[:, 1].max() > 8


def test_flip_is_an_exact_mirror_at_its_chance() -> None:
    mirrored = np.asarray(blob(10, 20))[:, ::-1]
    flips = [
        np.array_equal(changed(AugmentConfig(image_flip=0.5), seed, blob(10, 20)), mirrored) for seed in range(200)
    ]
    assert 70 < sum(flips) < 130
    both = AugmentConfig(image_flip=1.0, image_scale=0.001)
    assert np.abs(changed(both, 0, blob(10, 20)).astype(int) - mirrored).mean() < 2


def test_what_comes_in_has_the_colour_of_the_corners() -> None:
    moved = changed(AugmentConfig(image_shift=0.5), 2)
    assert moved.min() >= 40


def test_noise_stays_in_range_and_at_its_level() -> None:
    flat = Image.new("RGB", (32, 32), (128, 128, 128))
    levels = [changed(AugmentConfig(image_noise=0.1), seed, flat).std() for seed in range(50)]
    assert max(levels) < 27 and max(levels) > 18 and min(levels) < 8
    white = changed(AugmentConfig(image_noise=0.1), 0, Image.new("RGB", (32, 32), "white"))
    assert white.max() == 255 and white.min() > 100


def test_crops_keep_their_share_and_lie_inside() -> None:
    shares = []
    for seed in range(200):
        box = ImageAugment(AugmentConfig(image_crop=0.4), generator(seed, 0)).crop_box(100, 60)
        assert box is not None
        left, top, right, bottom = box
        assert 0 <= left < right <= 100 and 0 <= top < bottom <= 60
        assert abs((right - left) / (bottom - top) - 100 / 60) < 1e-6
        shares.append((right - left) * (bottom - top) / 6000)
    assert 0.4 <= min(shares) < 0.45 and 0.95 < max(shares) <= 1


def test_speed_changes_length_and_pitch_together() -> None:
    for seed in range(20):
        found = augment_audio(TONE, RATE, AugmentConfig(audio_speed=0.2), generator(seed, 1))
        factor = len(TONE) / len(found)
        assert 0.8 <= factor <= 1.2 + 1e-3
        pitch = np.abs(np.fft.rfft(found)).argmax() * RATE / len(found)
        assert abs(pitch / 500 - factor) < 0.01


def test_gain_silence_noise_and_tilt() -> None:
    for seed in range(20):
        louder = augment_audio(TONE, RATE, AugmentConfig(audio_gain_db=6), generator(seed, 1))
        ratio = 20 * np.log10(np.abs(louder).max() / np.abs(TONE).max())
        assert abs(ratio) <= 6.001
        later = augment_audio(TONE, RATE, AugmentConfig(audio_shift_seconds=0.2), generator(seed, 1))
        assert len(TONE) <= len(later) <= len(TONE) + 1600
        np.testing.assert_array_equal(later[-len(TONE) :], TONE)
        assert not later[: len(later) - len(TONE)].any()
        noisy = augment_audio(TONE, RATE, AugmentConfig(audio_noise=0.5), generator(seed, 1))
        assert (noisy - TONE).std() <= 0.55 * TONE.std()
    chirp = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    tilts = []
    for seed in range(40):
        spectrum = np.abs(np.fft.rfft(augment_audio(chirp, RATE, AugmentConfig(audio_tilt_db=12), generator(seed, 1))))
        before = np.abs(np.fft.rfft(chirp))
        low, high = (
            20 * np.log10(spectrum[part].mean() / before[part].mean()) for part in (slice(1, 50), slice(-50, -1))
        )
        tilts.append(high - low)
    assert np.abs(tilts).max() <= 12.1 and max(tilts) > 8 and min(tilts) < -8


def test_the_equalizer_moves_bands_apart_and_stays_within_its_gain() -> None:
    hiss = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    before = np.abs(np.fft.rfft(hiss))
    config = AugmentConfig(audio_equalizer_db=12)
    gains = np.array(
        [
            20 * np.log10(np.abs(np.fft.rfft(augment_audio(hiss, RATE, config, generator(seed, 1)))) / before)
            for seed in range(40)
        ]
    )
    assert np.abs(gains).max() <= 12.1 and gains.max() > 10 and gains.min() < -10
    low, high = gains[:, 20], gains[:, -20]
    assert abs(np.corrcoef(low, high)[0, 1]) < 0.5
    assert np.abs(np.diff(gains, axis=1)).max() < 1

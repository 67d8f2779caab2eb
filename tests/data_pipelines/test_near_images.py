"""Perceptual hashes: near for the same picture, far for others, and found by distance as a plain search finds them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.near_images import HASH_BITS, NearHashes, perceptual_hash


def picture(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Smooth random shapes, as photographs have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def distance(one: Image.Image, two: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(two)).bit_count()


def test_the_same_bits_everywhere() -> None:
    pixels = (np.add.outer(np.arange(64) * 3, np.arange(48) * 2) % 256).astype(np.uint8)
    assert f"{perceptual_hash(Image.fromarray(pixels)):016x}" == "922b56ad52a55ab5"
    assert perceptual_hash(Image.new("L", (5, 5), 77)).bit_count() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_scaled_and_compressed_pictures_stay_near(seed: int) -> None:
    image = picture(seed)
    file = io.BytesIO()
    image.resize((60, 50), Image.Resampling.LANCZOS).save(file, "JPEG", quality=60)
    assert distance(image, Image.open(file)) <= 8
    assert distance(image, picture(seed + 100)) > 12


def test_real_photographs_are_far_from_each_other(shared_data: Path) -> None:
    folder = shared_data / "coco-captions-mini"
    with open(folder / "manifest.csv", encoding="utf-8") as file:
        paths = sorted({row["image"] for row in csv.DictReader(file) if row["image"]})[:40]
    images = [Image.open(folder / path).convert("RGB") for path in paths]
    hashes = [perceptual_hash(image) for image in images]
    apart = [(one ^ two).bit_count() for n, one in enumerate(hashes) for two in hashes[:n]]
    assert len(images) > 20 and min(apart) > 8
    for image in images[:8]:
        file = io.BytesIO()
        image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(file, "JPEG", quality=70)
        assert distance(image, Image.open(file)) <= 4


def test_a_real_picture_that_is_there_twice(shared_data: Path) -> None:
    birds = shared_data / "sound-photos" / "images" / "bird"
    one, two = (birds / name for name in ("ibis_0076.jpg", "ibis_0079.jpg"))
    assert one.read_bytes() != two.read_bytes()
    assert distance(Image.open(one).convert("RGB"), Image.open(two).convert("RGB")) == 0


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 16),
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, HASH_BITS - 1), max_size=20)), max_size=30),
)
def test_the_search_finds_what_comparing_all_finds(limit: int, changes: list[tuple[int, list[int]]]) -> None:
    bases = [0, (1 << 64) - 1, 0x0F0F0F0F0F0F0F0F, 0x123456789ABCDEF0]
    search, kept = NearHashes(limit), []
    for base, flips in changes:
        value = bases[base]
        for flip in flips:
            value ^= 1 << flip
        expected = any((value ^ other).bit_count() <= limit for other in kept)
        assert search.add(value) == expected
        if not expected:
            kept.append(value)

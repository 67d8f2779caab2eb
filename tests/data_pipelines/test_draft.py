"""JPEGs decoded at the size that is needed: nearly the same pixels, and only where it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipelines.config import ImageConfig
from data_pipelines.decode import load_image, resize_image
from tests.data_pipelines.tuples import encode_image


def photo(height: int, width: int) -> np.ndarray:
    """Smooth shapes and some texture."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    waves = np.stack([np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 60)], axis=-1)
    return np.clip(128 + 90 * waves + noise, 0, 255).astype(np.uint8)


def test_a_large_jpeg_comes_out_smaller_and_looks_the_same() -> None:
    jpeg = encode_image(photo(400, 800), "JPEG", quality=90)
    config = ImageConfig(size=96, patch_size=8, pooling=3)
    whole, small = load_image(jpeg, 10**6), load_image(jpeg, 10**6, (192, 192))
    assert whole.size == (800, 400) and small.size == (400, 200)
    assert load_image(jpeg, 10**6, (300, 300)).size == (800, 400)
    exact, drafted = (np.asarray(resize_image(image, config)).astype(int) for image in (whole, small))
    assert exact.shape == drafted.shape == (96, 96, 3)
    assert np.abs(exact - drafted).mean() < 1.5


def test_other_formats_are_not_touched() -> None:
    png = encode_image(photo(400, 400))
    assert load_image(png, 10**6, (50, 50)).size == (400, 400)


def test_drafts_need_a_fixed_size() -> None:
    assert not ImageConfig().draft
    with pytest.raises(ValidationError, match="draft needs a fixed size"):
        ImageConfig(draft=True)

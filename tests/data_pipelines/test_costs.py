"""Costs from the index alone, and what dealing and packing make of them on real data."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.balance import deal, pack
from data_pipelines.config import DataConfig, ImageConfig
from data_pipelines.costs import num_patches, sample_costs, soft_tokens
from data_pipelines.dataset import Costs
from data_pipelines.decode import DecodeError, target_size
from data_pipelines.headers import audio_seconds, image_size


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([70, 280]))
@example(28, 28, 70)
@example(5000, 30, 70)
def test_patches_are_counted_as_they_are_decoded(width: int, height: int, tokens: int) -> None:
    config = ImageConfig(max_soft_tokens=tokens)
    counted = int(num_patches(width, height, config))
    try:
        wide, high = target_size(width, height, config)
    except DecodeError:
        assert 0 < counted <= config.max_patches
        return
    assert counted == wide * high // config.patch_size**2


def costs_of(text: list[int], width: list[int], height: list[int], seconds: list[float]) -> Costs:
    wide, high = np.array(width), np.array(height)
    return Costs(np.array(text), wide * high, np.array(seconds, dtype=np.float32), wide, high)


def test_what_is_missing_costs_nothing() -> None:
    config = DataConfig(train="-", image=ImageConfig(size=96, patch_size=8, pooling=3))
    image, audio, text = soft_tokens(costs_of([0, 9, 4000], [0, 28, 50], [0, 28, 60], [0, 1.0, 99.0]), config)
    assert (image.tolist(), audio.tolist(), text.tolist()) == ([0, 16, 16], [0, 25, 750], [0, 3, 128])
    costs = sample_costs(costs_of([0, 9], [28, 28], [28, 28], [0, 1.0]), config)
    assert costs.tolist() == [144, 144 + 25 + 16 + 25 + 2 * 3]


def real_costs(folder: Path, every: int) -> Costs:
    """Costs of every so many-th row of a manifest, from the headers of its files: what the index would say."""
    text, width, height, seconds = [], [], [], []
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[::every]
    for row in rows:
        size = image_size((folder / row["image"]).read_bytes()) if row["image"] else None
        text.append(len(row["text"].encode()))
        width.append(size[1] if size else 0)
        height.append(size[2] if size else 0)
        seconds.append(audio_seconds((folder / row["audio"]).read_bytes()) if row["audio"] else 0.0)
    return costs_of(text, width, height, seconds)


def test_real_data_are_dealt_and_packed_evenly(shared_data: Path) -> None:
    """Half spoken digits, half photos with sounds, 8 ranks, global batches of 1,024 (see benchmarks/balance.py)."""
    digits, photos = real_costs(shared_data / "spoken-digits", 12), real_costs(shared_data / "sound-photos", 3)
    config, random = DataConfig(train="-"), np.random.default_rng(0)
    ratios, shares, naive = [], [], []
    for _ in range(6):
        places = [random.integers(0, len(costs.pixels), 512) for costs in (digits, photos)]
        both = zip(digits, photos, strict=True)
        batch = Costs(*(np.concatenate([one[places[0]], other[places[1]]]) for one, other in both))
        mixed = random.permutation(1024)
        batch = Costs(*(column[mixed] for column in batch))
        cost = sample_costs(batch, config)
        image, audio, text = soft_tokens(batch, config)
        for hands, found in ((deal(cost, 8), ratios), (np.split(np.arange(1024), 8), naive)):
            loads = np.array([cost[hand].sum() for hand in hands])
            found.append(loads.max() / loads.mean())
        for hand in deal(cost, 8)[:2]:
            lengths = np.concatenate([(image + audio + text + 6)[hand], (text + 2)[hand]])[np.tile(text[hand] > 0, 2)]
            for row_tokens in (512, 2048):
                rows = pack(lengths, row_tokens, 16)
                width = -(-max(int(lengths[row].sum()) for row in rows) // 16) * 16
                shares.append(1 - lengths.sum() / (len(rows) * width))
    assert np.median(ratios) < 1.02 and max(ratios) < 1.05 < max(naive), json.dumps([ratios, naive])
    assert np.mean(shares) < 0.03


@pytest.mark.parametrize("row_tokens", [128, 512, 4096])
def test_even_rows_hold_less_padding_than_full_ones(row_tokens: int) -> None:
    """Rows of few long segments included: never more tokens than first-fit decreasing alone would take."""
    random = np.random.default_rng(row_tokens)
    for count in (1, 3, 40, 300):
        lengths = random.integers(5, 120, count)
        rows = pack(lengths, row_tokens, 16)
        width = -(-max(int(lengths[row].sum()) for row in rows) // 16) * 16
        assert width * len(rows) >= lengths.sum() and width <= row_tokens
        if lengths.sum() > 4 * row_tokens:
            assert 1 - lengths.sum() / (width * len(rows)) < 0.06

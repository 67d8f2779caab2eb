"""Our batched log-mel against transformers' own feature extractor, and SpecAugment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Gemma4AudioFeatureExtractor

from data_pipelines.config import AudioConfig, AugmentConfig
from pretrain.counter_random import uniform
from pretrain.features import augment_mel, log_mel, num_frames


@pytest.mark.parametrize(
    "audio",
    [
        AudioConfig(),
        AudioConfig(sampling_rate=8000, mel_bins=40, frame_ms=25.0, mel_mean=-3.0, mel_std=2.5),
    ],
)
def test_log_mel_equals_the_exported_feature_extractor(audio: AudioConfig) -> None:
    extractor = Gemma4AudioFeatureExtractor(
        feature_size=audio.mel_bins,
        sampling_rate=audio.sampling_rate,
        frame_length_ms=audio.frame_ms,
        hop_length_ms=audio.hop_ms,
        max_frequency=audio.top_frequency,
        per_bin_mean=[audio.mel_mean] * audio.mel_bins,
        per_bin_stddev=[audio.mel_std] * audio.mel_bins,
    )
    draw = np.random.default_rng(0)
    lengths = [1, 250, 3999, 7777]
    sounds = [(draw.normal(size=n) * 5000).astype(np.int16) for n in lengths]
    padded = np.zeros((len(sounds), max(lengths)), dtype=np.int16)
    for row, sound in zip(padded, sounds, strict=True):
        row[: len(sound)] = sound
    mel, mask = log_mel(torch.from_numpy(padded), torch.tensor(lengths), audio)
    for i, sound in enumerate(sounds):
        theirs = extractor([sound.astype(np.float32) / 32768], return_tensors="np")
        valid = theirs["input_features_mask"][0]
        assert int(mask[i].sum()) == int(valid.sum())
        np.testing.assert_allclose(mel[i][mask[i]].numpy(), theirs["input_features"][0][valid], atol=2e-4)
        assert (mel[i][~mask[i]] == 0).all()


def test_num_frames_counts_whole_windows_only() -> None:
    audio = AudioConfig(sampling_rate=8000, frame_ms=25.0)
    assert num_frames(torch.tensor([0, 100, 101, 180, 181]), audio).tolist() == [0, 0, 1, 1, 2]


def test_uniform_is_a_function_of_the_seed_alone() -> None:
    seeds = torch.tensor([5, 7, -3])
    whole = uniform(seeds, 3, 1000)
    torch.testing.assert_close(uniform(seeds[1:2], 3, 1000), whole[1:2], rtol=0, atol=0)
    assert not torch.equal(uniform(seeds, 4, 1000), whole)
    assert ((whole >= 0) & (whole < 1)).all()
    assert abs(float(whole.mean()) - 0.5) < 0.03
    # Golden values: masks of old runs must stay what they were.
    assert [round(float(x), 6) for x in uniform(torch.tensor([42]), 0, 3)[0]] == GOLDEN


GOLDEN = [0.343292, 0.955747, 0.48635]


def test_augment_mel_leaves_padding_at_zero_and_repeats_itself() -> None:
    mel = torch.randn(3, 50, 40)
    mask = torch.arange(50)[None] < torch.tensor([50, 30, 10])[:, None]
    augment = AugmentConfig(mel_warp=0.1, mel_time_masks=2, mel_frequency_masks=1)
    seed = torch.tensor([1, 2, 3])
    once = augment_mel(mel, mask, seed, augment)
    torch.testing.assert_close(once, augment_mel(mel, mask, seed, augment), rtol=0, atol=0)
    assert (once[~mask] == 0).all()
    assert not torch.allclose(once[0], mel[0])
    torch.testing.assert_close(once[1:2], augment_mel(mel[1:2], mask[1:2], seed[1:2], augment), rtol=0, atol=0)

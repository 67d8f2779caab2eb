"""What the exported processors make of pictures and sounds, against the run's own features; and what they reload as."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

from pretrain.config import Config
from pretrain.features import log_mel
from pretrain.model.backbones import gemma4
from pretrain.processors import save_processors
from tests.pretrain.tiny import tiny_config, word_tokenizer

AUDIO = {"sampling_rate": 8000, "mel_bins": 20, "frame_ms": 25.0, "hop_ms": 12.5, "mel_mean": -4.0, "mel_std": 2.5}


@pytest.fixture(scope="module")
def config() -> Config:
    image = {"size": 28, "patch_size": 7, "pooling": 2}
    return tiny_config(data={"train": "unused", "global_batch": 8, "image": image, "audio": AUDIO})


@pytest.fixture(scope="module")
def folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export")
    tokenizer = word_tokenizer()
    save_processors(config.data, tokenizer, out)
    # AutoTokenizer and AutoFeatureExtractor ask the model's config which class is meant.
    gemma4.make_config(config.model, config.data, tokenizer).save_pretrained(out)
    return out


def test_a_reloaded_feature_extractor_gives_the_log_mel_of_training(config, folder):
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    assert (extractor.frame_length, extractor.hop_length) == (200, 100)
    generator = np.random.default_rng(0)
    samples = (generator.normal(size=(2, 6000)) * 4000).astype(np.int16)
    length = torch.tensor([6000, 4321])
    mel, mask = log_mel(torch.from_numpy(samples), length, config.data.audio)
    found = extractor([samples[0] / 32768.0, samples[1, :4321] / 32768.0], return_tensors="pt")
    theirs = found["input_features_mask"]
    assert theirs.sum(1).tolist() == mask.sum(1).tolist()
    for ours, valid, features, also in zip(mel, mask, found["input_features"], theirs, strict=True):
        assert torch.allclose(ours[valid], features[also].float(), atol=2e-4)


def test_a_reloaded_image_processor_cuts_the_same_patches(folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    found = processor(Image.fromarray(pixels), return_tensors="pt")
    assert found["num_soft_tokens_per_image"].tolist() == [4]
    real = (found["image_position_ids"][0] >= 0).all(-1)
    assert found["image_position_ids"][0][real].tolist() == [[x, y] for y in range(4) for x in range(4)]
    patches = pixels.reshape(4, 7, 4, 7, 3).transpose(0, 2, 1, 3, 4).reshape(16, 147)
    assert np.array_equal(np.round(found["pixel_values"][0][real].numpy() * 255), patches)


def test_a_reloaded_tokenizer_knows_the_prompts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layout = json.loads((folder / "prompts.json").read_text())
    text = layout["prompts"]["image_and_audio"].format(image="<image>" * 2, audio="<audio>" * 3)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [2, 5, 4, 4, 6, 8, 7, 7, 7, 9]
    assert tokenizer.image_token_id == 4 and tokenizer.boa_token_id == 8 and tokenizer.eos_token_id == 1


def test_the_chat_template_writes_the_layout_of_training(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [{"type": "text", "text": "w1"}, {"type": "audio"}, {"type": "image"}]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert asked == "<bos><image><audio>w1"
    answered = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "w3"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == "<bos><image>w3<eos>"

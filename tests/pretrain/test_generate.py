"""Greedy captions: a padded batch writes what each sample alone would, and what a search by hand would."""

from __future__ import annotations

import pytest
import torch

from pretrain.generate import caption, caption_ids, prompt_inputs
from pretrain.model.omni import OmniPretrainer
from tests.pretrain.tiny import batch_of, sample, tiny_config, word_tokenizer


@pytest.fixture(scope="module")
def model() -> OmniPretrainer:
    torch.manual_seed(0)
    built = OmniPretrainer.build(tiny_config(), word_tokenizer()).eval()
    with torch.no_grad():  # a random model repeats one token; sharper logits make captions differ
        for parameter in built.backbone.model.language_model.parameters():
            parameter.mul_(3.0)
    return built


SAMPLES = [
    sample(0),
    sample(1, audio=False),
    sample(2, image=False),
    sample(3, image=False, audio=False),
    sample(4),
]


def test_a_batch_writes_what_each_sample_alone_writes(model):
    together = caption_ids(model, batch_of(SAMPLES), max_new_tokens=6)
    alone = [caption_ids(model, batch_of([one]), max_new_tokens=6)[0] for one in SAMPLES]
    assert together == alone
    assert len({tuple(ids) for ids in together}) > 1
    assert all(1 <= len(ids) <= 6 for ids in together)


def test_what_is_not_to_be_seen_does_not_count(model):
    batch = batch_of(SAMPLES)
    blind = caption_ids(model, batch, see=(), max_new_tokens=6)
    assert len({tuple(ids) for ids in blind}) == 1
    assert "pixel_values" not in prompt_inputs(model, batch, ("audio",))
    assert len(prompt_inputs(model, batch, ("image",))["pixel_values"]) == 3


def test_greedy_by_hand_agrees(model):
    batch = batch_of([SAMPLES[0]])
    inputs = prompt_inputs(model, batch, ("image", "audio"))
    written: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            whole = prompt_inputs(model, batch, ("image", "audio"), [written])
            written.append(int(model.backbone(**whole).logits[0, -1].argmax()))
            if written[-1] == model.special.eos:
                break
    assert caption_ids(model, batch, max_new_tokens=6)[0] == written
    num_audio = int(model.audio_soft_tokens(batch["audio_length"])[0])
    assert inputs["input_ids"][0].tolist() == model.prompt_ids(4, num_audio)


def test_captions_are_text_without_special_tokens(model):
    texts = caption(model, word_tokenizer(), batch_of(SAMPLES), max_new_tokens=6)
    assert len(texts) == len(SAMPLES)
    assert not any("<" in text for text in texts)

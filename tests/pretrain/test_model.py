"""The one forward pass: equal to plain transformers on each segment, and blind to what is absent and who holds it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from data_pipelines.config import DataConfig
from data_pipelines.errors import BadInput
from pretrain.config import ModelConfig
from pretrain.features import log_mel
from pretrain.model.omni import OmniPretrainer
from pretrain.model.presets import PRESETS
from pretrain.objectives import joint
from pretrain.objectives.align import align_loss
from tests.pretrain.tiny import batch_of, sample, tiny_config, word_tokenizer

KINDS = [(True, True, True), (True, False, True), (False, True, True), (False, False, True), (True, True, False)]


@pytest.fixture(scope="module")
def model() -> OmniPretrainer:
    return OmniPretrainer.build(tiny_config(), word_tokenizer())


def losses(model: OmniPretrainer, batch: dict) -> dict[str, float]:
    plan = model.plan(batch)
    output = model(batch, plan)
    align, pairs = align_loss(output.embeddings, model.config.objectives)
    sums = {"text": output.text, "image": output.image, "audio": output.audio, "align": align}
    counts = {**plan.counts, "align": pairs}
    return {name: float(sums[name].detach()) / max(counts[name], 1) for name in joint.NAMES}


@torch.no_grad()
def test_packed_caption_loss_equals_plain_transformers(model: OmniPretrainer) -> None:
    model.eval()
    batch = batch_of([sample(i, *kind) for i, kind in enumerate(KINDS)])
    nll, tokens = model.caption_nll(batch)
    assert tokens[-1] == 0 and nll[-1] == 0
    for i, (image, audio, text) in enumerate(KINDS):
        if not text:
            continue
        words = batch["text"][i, : batch["text_length"][i]].tolist()
        num_image = int(model.image_soft_tokens(batch["image_position"][i : i + 1])) if image else 0
        num_audio = int(model.audio_soft_tokens(batch["audio_length"][i : i + 1])) if audio else 0
        head = model.prompt_ids(num_image, num_audio)
        ids = torch.tensor([head + words + [model.special.eos]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if image:
            inputs["pixel_values"] = batch["image"][i : i + 1].float() / 255
            inputs["image_position_ids"] = batch["image_position"][i : i + 1]
        if audio:
            length = batch["audio_length"][i : i + 1]
            inputs["input_features"], inputs["input_features_mask"] = log_mel(
                batch["audio"][i : i + 1], length, model.audio_config
            )
        logits = model.backbone(**inputs).logits[0].log_softmax(-1)
        expected = -sum(float(logits[t - 1, ids[0, t]]) for t in range(len(head), ids.shape[1]))
        assert float(nll[i]) == pytest.approx(expected, rel=1e-5)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = OmniPretrainer.build(tiny_config(), word_tokenizer())
    torch.manual_seed(2)
    second = OmniPretrainer.build(tiny_config(engine={"zero_stage": 3}), word_tokenizer())
    other = OmniPretrainer.build(tiny_config(run={"dir": "x", "seed": 1}), word_tokenizer())
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim > 1:
            assert not torch.equal(a, c), name
    assert all(parameter.ndim >= 1 for parameter in first.parameters())


def test_every_parameter_gets_a_gradient(model: OmniPretrainer) -> None:
    model.train()
    model.zero_grad()
    batch = batch_of([sample(i) for i in range(8)])
    plan = model.plan(batch)
    output = model(batch, plan)
    align, pairs = align_loss(output.embeddings, model.config.objectives)
    sums = {"text": output.text, "image": output.image, "audio": output.audio, "align": align}
    joint.weighted_sum(sums, {**plan.counts, "align": pairs}, model.config.losses).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    zero = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert not missing
    # The similarity's bias takes part in SigLIP only.
    assert zero == ["heads.similarity.logit_bias"]


@pytest.mark.parametrize("absent", ["image", "audio", "both", "everything"])
def test_absent_modalities_give_finite_zero_gradients(model: OmniPretrainer, absent: str) -> None:
    model.train()
    model.zero_grad()
    image, audio = absent == "audio", absent == "image"
    batch = batch_of([sample(i, image, audio, absent != "everything") for i in range(4)])
    plan = model.plan(batch)
    output = model(batch, plan)
    align, pairs = align_loss(output.embeddings, model.config.objectives)
    sums = {"text": output.text, "image": output.image, "audio": output.audio, "align": align}
    total = joint.weighted_sum(sums, {**plan.counts, "align": pairs}, model.config.losses)
    total.backward()
    assert total.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if not audio:
        assert not any(p.grad.any() for p in model.backbone.model.audio_tower.parameters())
    if not image:
        assert not any(p.grad.any() for p in model.backbone.model.vision_tower.parameters())


@torch.no_grad()
def test_a_placeholder_changes_no_loss(model: OmniPretrainer) -> None:
    model.train()
    samples = [sample(i, *kind) for i, kind in enumerate(KINDS)]
    placeholder = {**sample(99), "weight": samples[0]["weight"] * 0}
    with_it = losses(model, batch_of([*samples[:2], placeholder, *samples[2:]]))
    assert with_it == pytest.approx(losses(model, batch_of(samples)), rel=1e-5)


@torch.no_grad()
def test_embeddings_are_unit_vectors_that_ignore_the_batch(model: OmniPretrainer) -> None:
    model.eval()
    batch = batch_of([sample(i) for i in range(4)])
    image = model.encode_image(batch["image"], batch["image_position"])
    audio = model.encode_audio(batch["audio"], batch["audio_length"])
    text = model.encode_text(batch["text"], batch["text_length"])
    for encoded in (image, audio, text):
        assert encoded.shape == (4, model.embedding_size)
        torch.testing.assert_close(encoded.norm(dim=1), torch.ones(4))
    alone = batch_of([sample(2)])
    torch.testing.assert_close(
        model.encode_audio(alone["audio"], alone["audio_length"]), audio[2:3], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(model.encode_text(alone["text"], alone["text_length"]), text[2:3], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_backbone_round_trips_through_plain_transformers(model: OmniPretrainer, tmp_path) -> None:
    model.eval()
    model.backbone.save_pretrained(tmp_path)
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[2, 15, 16, 17, 1]])
    torch.testing.assert_close(again(input_ids=ids).logits, model.backbone(input_ids=ids).logits, atol=0, rtol=0)


def test_init_from_a_checkpoint_starts_with_its_weights(model: OmniPretrainer, tmp_path) -> None:
    model.backbone.save_pretrained(tmp_path)
    config = tiny_config(
        model={**tiny_config().model.model_dump(), "init_from": str(tmp_path)}, run={"dir": "x", "seed": 9}
    )
    started = OmniPretrainer.build(config, word_tokenizer())
    for (name, a), b in zip(started.backbone.named_parameters(), model.backbone.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    batch = batch_of([sample(i) for i in range(4)])
    found = []
    for on in (False, True):
        section = {**tiny_config().model.model_dump(), "gradient_checkpointing": on}
        model = OmniPretrainer.build(tiny_config(model=section), word_tokenizer()).train()
        output = model(batch, model.plan(batch))
        (output.text + output.image + output.audio).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_unknown_field_of_a_tower_is_named() -> None:
    config = tiny_config(model={"vision": {"num_hiden_layers": 1}})
    with pytest.raises(BadInput, match="model.vision.num_hiden_layers.*num_hidden_layers"):
        OmniPretrainer.build(config, word_tokenizer())


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 1.6), ("base", 280), ("large", 1600)])
def test_preset_sizes(preset: str, millions: float) -> None:
    from pretrain.model.backbones import gemma4

    data = tiny_config().data if preset == "tiny" else DataConfig(train="unused")
    tokenizer = word_tokenizer()
    vocabulary = {"tiny": 2048, "base": 32_000, "large": 64_000}[preset]
    model_config = ModelConfig(preset=preset, text={"vocab_size": vocabulary})
    with torch.device("meta"):
        backbone = gemma4.from_config(gemma4.make_config(model_config, data, tokenizer), "sdpa")
    counted = sum(parameter.numel() for parameter in backbone.parameters()) / 1e6
    assert counted == pytest.approx(millions, rel=0.2), PRESETS[preset]

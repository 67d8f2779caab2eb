"""Captions, written greedily by the backbone's own `generate`: what a user of the export would get.

Inputs are batches of the evaluation loader. Prompts differ in length, so they are padded on the left, which is where
`generate` wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.features import log_mel
from pretrain.model.omni import OmniPretrainer
from pretrain.sample_batches import sample_batches

if TYPE_CHECKING:
    from data_pipelines.dataset import Dataset
    from pretrain.restore import Restored


@torch.inference_mode()
def caption(
    model: OmniPretrainer,
    tokenizer: Any,
    batch: dict[str, Any],
    see: tuple[str, ...] = ("image", "audio"),
    max_new_tokens: int | None = None,
) -> list[str]:
    """Greedy captions of a batch, one a sample; without anything to see, the model's favourite sentence.

    Args:
        model: the model, whole on one device (not partitioned by ZeRO-3).
        tokenizer: its tokenizer.
        batch: CPU tensors of the loader.
        see: modalities that the caption may be about, where a sample has them.
        max_new_tokens: longest caption in tokens; None takes the longest of training.
    """
    ids = caption_ids(model, batch, see, max_new_tokens)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def caption_samples(restored: Restored, dataset: Dataset, ids: Sequence[int], see: tuple[str, ...]) -> list[str]:
    """Greedy captions of some samples of a dataset, in the order of `ids`.

    Args:
        restored: a model with its settings and tokenizer.
        dataset: where the samples are.
        ids: which samples.
        see: modalities that the captions may be about.

    Returns:
        One text for each id; empty for a sample that does not decode.
    """
    found: dict[int, str] = {}
    samples = [dataset[i] for i in ids]
    size = restored.config.evaluation.batch
    for places, batch in sample_batches(restored.config, restored.tokenizer, samples, size):
        found |= zip(places, caption(restored.model, restored.tokenizer, batch, see), strict=False)
    return [found.get(place, "") for place in range(len(ids))]


@torch.inference_mode()
def caption_ids(
    model: OmniPretrainer,
    batch: dict[str, Any],
    see: tuple[str, ...] = ("image", "audio"),
    max_new_tokens: int | None = None,
) -> list[list[int]]:
    """Token ids of `caption`, without the prompt, up to and with the EOS."""
    inputs = prompt_inputs(model, batch, see)
    was_training = model.training
    model.eval()
    try:
        found = model.backbone.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens or model.config.data.text.max_tokens,
            bos_token_id=model.special.bos,
            eos_token_id=model.special.eos,
            pad_token_id=_pad(model),
        )
    finally:
        model.train(was_training)
    rows = found[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(model.special.eos) + 1] if model.special.eos in row else row for row in rows]


def prompt_inputs(
    model: OmniPretrainer, batch: dict[str, Any], see: tuple[str, ...], tails: list[list[int]] | None = None
) -> dict[str, Tensor]:
    """Arguments for the backbone's `forward` or `generate`: the prompts of a batch, left-padded, and what they see.

    Args:
        model: gives the prompt's layout, the features and the device.
        batch: CPU tensors of the loader.
        see: modalities to show.
        tails: ids to put after each prompt; None puts nothing.
    """
    size = len(batch["keys"])
    device = next(model.backbone.parameters()).device
    dtype = next(model.backbone.parameters()).dtype
    num_image = model.image_soft_tokens(batch["image_position"]) if "image" in see else torch.zeros(size).long()
    num_audio = model.audio_soft_tokens(batch["audio_length"]) if "audio" in see else torch.zeros(size).long()
    rows = [
        model.prompt_ids(int(images), int(sounds)) + (tails[i] if tails else [])
        for i, (images, sounds) in enumerate(zip(num_image, num_audio, strict=True))
    ]
    width = max(len(row) for row in rows)
    pad = _pad(model)
    inputs = {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    images, sounds = num_image > 0, num_audio > 0
    if images.any():
        inputs["pixel_values"] = (batch["image"][images].float() / 255).to(dtype)
        inputs["image_position_ids"] = batch["image_position"][images]
    if sounds.any():
        mel, mask = log_mel(batch["audio"][sounds], batch["audio_length"][sounds], model.config.data.audio)
        inputs["input_features"], inputs["input_features_mask"] = mel.to(dtype), mask
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _pad(model: OmniPretrainer) -> int:
    return int(model.backbone.config.get_text_config().pad_token_id)

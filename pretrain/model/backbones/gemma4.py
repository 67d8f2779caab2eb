"""The Gemma4 family: transformers' native `Gemma4ForConditionalGeneration`, reached part by part.

Everything that knows Gemma4's insides is here. A second family is one more file with the same functions, named in
`pretrain.model.backbones.FAMILIES`. Quirks held together here: the audio tower is eager-only, the first subsampling
width equals the mel bins, per-layer inputs are switched off, and the queries start scaled by
head_dim ** -0.5 because Gemma4 attention itself does not scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    PreTrainedTokenizerBase,
)

from data_pipelines.config import DataConfig
from data_pipelines.errors import BadInput
from pretrain.config import ModelConfig
from pretrain.model.presets import PRESETS, TowerSize

AUDIO_STRIDE = 4
"""Mel frames that become one audio token."""

_POSITION_STD = 0.3
"""transformers fills the position table with ones, a constant that drowns the patches at the start of training."""

_PARTS = (
    ("model.vision_tower.", "vision"),
    ("model.embed_vision.", "vision"),
    ("model.audio_tower.", "audio"),
    ("model.embed_audio.", "audio"),
)


def make_config(model: ModelConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Gemma4Config:
    """Native config of a preset with the overrides of `model`, the geometry of `data` and the tokenizer's ids."""
    preset = PRESETS[model.preset]
    text = {
        **_tower(preset.text),
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "global_head_dim": preset.text.head_dim,
        "layer_types": _layer_types(model.text.get("num_hidden_layers", preset.text.num_layers)),
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 1,
        "max_position_embeddings": 32_768,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "attention_dropout": 0.0,
    }
    vision = {
        **_tower(preset.vision),
        "patch_size": data.image.patch_size,
        "pooling_kernel_size": data.image.pooling,
        "position_embedding_size": _longest_side(data),
        "use_clipped_linears": False,
    }
    audio = {
        "hidden_size": preset.audio.hidden_size,
        "num_hidden_layers": preset.audio.num_layers,
        "num_attention_heads": preset.audio.num_heads,
        "subsampling_conv_channels": [data.audio.mel_bins, preset.audio_conv_channels],
        "output_proj_dims": preset.audio.hidden_size,
        "attention_context_right": 12,
        "use_clipped_linears": False,
        "initializer_range": preset.audio.hidden_size**-0.5,
    }
    return Gemma4Config(
        text_config=_override(Gemma4TextConfig, "text", text, model.text),
        vision_config=_override(Gemma4VisionConfig, "vision", vision, model.vision),
        audio_config=_override(Gemma4AudioConfig, "audio", audio, model.audio),
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        audio_token_id=tokenizer.audio_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
        video_token_id=tokenizer.video_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=True,
    )


def from_config(config: Gemma4Config, attention: str) -> Gemma4ForConditionalGeneration:
    """A freshly initialised fp32 model. Uses torch's global generator: seed it first."""
    _choose_attention(config, attention)
    backbone = Gemma4ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("self_attn.q_norm.weight"):
                parameter.fill_(parameter.shape[0] ** -0.5)
            elif name.endswith("position_embedding_table"):
                parameter.normal_(std=_POSITION_STD)
    return backbone


def from_pretrained(folder: str, attention: str) -> Gemma4ForConditionalGeneration:
    """A model from a local folder in fp32, safetensors only."""
    config = Gemma4Config.from_pretrained(folder, local_files_only=True)
    _choose_attention(config, attention)
    return Gemma4ForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )


def image_tower(backbone: Gemma4ForConditionalGeneration, pixels: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Encode patches.

    Args:
        pixels: float [N, P, 3 * patch * patch] in 0..1; position: int64 [N, P, 2], -1 = padding.

    Returns:
        Patch features [N, P, vision_hidden] and language-model tokens [M, text_hidden], all images concatenated.
    """
    tower = backbone.model.vision_tower
    padding = (position == -1).all(-1)
    patches = tower.encoder(
        inputs_embeds=tower.patch_embedder(pixels, position, padding),
        attention_mask=~padding,
        pixel_position_ids=position,
    ).last_hidden_state
    pooling = tower.config.pooling_kernel_size**2
    soft, valid = tower.pooler(
        hidden_states=patches,
        pixel_position_ids=position,
        padding_positions=padding,
        output_length=pixels.shape[1] // pooling,
    )
    return patches, backbone.model.embed_vision(soft[valid].to(patches.dtype))


def audio_tower(backbone: Gemma4ForConditionalGeneration, mel: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encode log-mel frames.

    Args:
        mel: float [N, F, mel_bins]; mask: bool [N, F].

    Returns:
        Features [N, ceil(F / 4), audio_hidden], their mask, and language-model tokens [M, text_hidden].
    """
    out = backbone.model.audio_tower(mel, mask)
    valid = out.attention_mask
    return out.last_hidden_state, valid, backbone.model.embed_audio(out.last_hidden_state[valid])


def embed(backbone: Gemma4ForConditionalGeneration, ids: Tensor) -> Tensor:
    """Token embeddings: int64 [R, L] -> float [R, L, text_hidden]."""
    return backbone.model.language_model.embed_tokens(ids)


def language_model(backbone: Gemma4ForConditionalGeneration, embeds: Tensor, position: Tensor) -> Tensor:
    """Last hidden states of packed rows, [R, L, text_hidden]. Segments are told apart by `position` alone."""
    return backbone.model.language_model(
        inputs_embeds=embeds, position_ids=position, attention_mask=None, use_cache=False
    ).last_hidden_state


def logits(backbone: Gemma4ForConditionalGeneration, hidden: Tensor) -> Tensor:
    """Vocabulary logits: [T, text_hidden] -> [T, vocab]."""
    scores = backbone.lm_head(hidden)
    cap = backbone.config.text_config.final_logit_softcapping
    return scores if cap is None else torch.tanh(scores / cap) * cap


def sizes(config: Gemma4Config) -> tuple[int, int, int]:
    """Feature sizes (text, vision, audio) that the pretraining heads attach to."""
    return config.text_config.hidden_size, config.vision_config.hidden_size, config.audio_config.output_proj_dims


def part(name: str) -> str:
    """Which part a backbone parameter belongs to: text, vision or audio."""
    return next((part for prefix, part in _PARTS if name.startswith(prefix)), "text")


def _tower(size: TowerSize) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "head_dim": size.head_dim,
        "initializer_range": size.hidden_size**-0.5,
    }


def _layer_types(num_layers: int) -> list[str]:
    """Gemma's pattern, five sliding layers to one full one, with a full one last."""
    return [
        "full_attention" if (layer + 1) % 6 == 0 or layer + 1 == num_layers else "sliding_attention"
        for layer in range(num_layers)
    ]


def _longest_side(data: DataConfig) -> int:
    """Patches along the longest side an image can have: the whole budget in one strip of cells, or the fixed grid."""
    image = data.image
    if image.size is not None:
        return image.size // image.patch_size
    return image.max_soft_tokens * image.pooling


def _override(config_class: type, name: str, fields: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """The sub-config with the user's fields on top; an unknown one is named."""
    import difflib

    known = set(config_class().to_dict()) | {"global_head_dim"}
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise BadInput(f"model.{name}.{key}: no such field{f'; nearest is {near[0]}' if near else ''}")
    try:
        return config_class(**{**fields, **overrides})
    except (TypeError, ValueError) as error:
        raise BadInput(f"model.{name}: {str(error).splitlines()[0]}") from error


def _choose_attention(config: Gemma4Config, attention: str) -> None:
    config._attn_implementation = {
        "": attention,
        "text_config": attention,
        "vision_config": attention,
        "audio_config": "eager",
    }

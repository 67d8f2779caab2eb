"""A small config, a word-level tokenizer and batches by the loader's contract, for tests of the model and the loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pretrain.config import Config

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>", "<boi>", "<eoi>", "<audio>", "<boa>", "<eoa>", "<video>"]
GRID = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="xy"), -1).reshape(-1, 2)


def tiny_config(run_dir: str = "unused", **sections: dict[str, Any]) -> Config:
    """28x28 images in 7x7 patches, 8 kHz sound, a model of a few hundred thousand parameters, all losses on."""
    raw: dict[str, Any] = {
        "run": {"dir": run_dir},
        "data": {
            "train": "unused",
            "global_batch": 8,
            "pack_tokens": 64,
            "image": {"size": 28, "patch_size": 7, "pooling": 2},
            "audio": {"sampling_rate": 8000, "mel_bins": 20, "frame_ms": 25.0},
        },
        "model": {
            "text": {"num_hidden_layers": 2},
            "vision": {"num_hidden_layers": 1},
            "audio": {"num_hidden_layers": 1, "hidden_size": 32, "output_proj_dims": 32},
        },
        "losses": {"text": 1.0, "align": 1.0, "image": 0.5, "audio": 0.5},
        "train": {"max_steps": 6, "warmup_steps": 2, "learning_rate": 1e-3},
        "engine": {"bucket_mb": 1},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return Config.model_validate(raw)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Fifty words after the special tokens."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(50))])}
    names = ("image", "boi", "eoi", "audio", "boa", "eoa", "video")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={f"{name}_token": f"<{name}>" for name in names},
    )


def sample(number: int, image: bool = True, audio: bool = True, text: bool = True) -> dict[str, Any]:
    """One random sample, a function of its number."""
    draw = np.random.default_rng(number)
    return {
        "keys": f"key-{number}",
        "index": number,
        "image": draw.integers(0, 256, (16, 147)).astype(np.uint8),
        "image_position": GRID if image else np.full((16, 2), -1),
        "audio": (draw.normal(size=4000) * 3000).astype(np.int16),
        "audio_length": int(draw.integers(1500, 4000)) if audio else 0,
        "text": draw.integers(len(SPECIAL), len(SPECIAL) + 50, 12),
        "text_length": int(draw.integers(3, 12)) if text else 0,
        "seed": int(draw.integers(1 << 62)),
        "weight": np.float32(1.0),
        "label": number % 3,
    }


def batch_of(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate samples as the loader does."""
    batch: dict[str, Any] = {
        name: torch.from_numpy(np.stack([np.asarray(one[name]) for one in samples]))
        for name in samples[0]
        if name != "keys"
    }
    batch["keys"] = [one["keys"] for one in samples]
    return batch

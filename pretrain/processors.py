"""What an export needs beside the weights: image processor, feature extractor, tokenizer, and the prompts.

Each is transformers' own class with the run's geometry, so that a reloaded export turns a picture and a sound into
exactly the numbers that the model was trained on. `processor_config.json` holds all of them in the nested form that
`AutoImageProcessor`, `AutoFeatureExtractor` and (where torchvision is installed) `AutoProcessor` read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from data_pipelines.config import AudioConfig, DataConfig, ImageConfig
from pretrain.features import MEL_FLOOR

# Parts come in the order of training, image before sound before text, whatever the order in the message.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for kind in ['image', 'audio', 'text'] %}{% for part in message['content'] %}{% if part['type'] == kind %}"
    "{% if kind == 'text' %}{{ part['text'] }}{% elif kind == 'image' %}{{ '<image>' }}{% else %}{{ '<audio>' }}"
    "{% endif %}{% endif %}{% endfor %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def image_processor(image: ImageConfig) -> Gemma4ImageProcessorPil:
    """The image processor of a geometry. With a fixed size, resizing to that square is left to the caller."""
    return Gemma4ImageProcessorPil(
        patch_size=image.patch_size,
        pooling_kernel_size=image.pooling,
        max_soft_tokens=image.max_soft_tokens,
        do_resize=image.size is None,
    )


def feature_extractor_settings(audio: AudioConfig) -> dict[str, Any]:
    """Arguments of `Gemma4AudioFeatureExtractor` that give the log-mel of `pretrain.features`."""
    plain = audio.mel_mean == 0.0 and audio.mel_std == 1.0
    return {
        "feature_size": audio.mel_bins,
        "sampling_rate": audio.sampling_rate,
        "frame_length_ms": audio.frame_ms,
        "hop_length_ms": audio.hop_ms,
        "min_frequency": audio.min_frequency,
        "max_frequency": audio.top_frequency,
        "mel_floor": MEL_FLOOR,
        "per_bin_mean": None if plain else [audio.mel_mean] * audio.mel_bins,
        "per_bin_stddev": None if plain else [audio.mel_std] * audio.mel_bins,
    }


def prompts(tokenizer: Any) -> dict[str, str]:
    """The text that a caption follows, by what is seen; `{image}` and `{audio}` stand for all their soft tokens."""
    bos = tokenizer.bos_token
    image = f"{tokenizer.boi_token}{{image}}{tokenizer.eoi_token}"
    audio = f"{tokenizer.boa_token}{{audio}}{tokenizer.eoa_token}"
    return {"text": bos, "image": bos + image, "audio": bos + audio, "image_and_audio": bos + image + audio}


def save_processors(data: DataConfig, tokenizer: Any, folder: Path) -> None:
    """Write tokenizer, chat template, `preprocessor_config.json`, `processor_config.json` and `prompts.json`."""
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    images = image_processor(data.image)
    images.save_pretrained(folder)
    settings = feature_extractor_settings(data.audio)
    # The class drops the window in milliseconds when it is saved, and would come back with 20 and 10: name them again.
    sounds = json.loads(Gemma4AudioFeatureExtractor(**settings).to_json_string()) | settings
    for derived in ("frame_length", "hop_length", "fft_length"):
        del sounds[derived]
    images_saved = json.loads(images.to_json_string())
    video = {name: images_saved[name] for name in ("patch_size", "pooling_kernel_size", "do_resize")}
    nested = {
        "processor_class": "Gemma4Processor",
        "image_processor": images_saved,
        "feature_extractor": sounds,
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor"} | video,
    }
    _write_json(folder / "processor_config.json", nested)
    layout = {
        "prompts": prompts(tokenizer),
        "image_token": tokenizer.image_token,
        "audio_token": tokenizer.audio_token,
        "end_of_caption": tokenizer.eos_token,
        "image_size": data.image.size,
        "sampling_rate": data.audio.sampling_rate,
        "max_audio_seconds": data.audio.max_seconds,
    }
    _write_json(folder / "prompts.json", layout)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

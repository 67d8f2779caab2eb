"""What a trained model says about a few probes, measured with the run's own code and weights, for an export to match.

Three probes are made up here (a picture, a sound, both) and travel with the export; a few more are samples of the
evaluation data, which stay where they are and are named by their keys. Everything goes through the loader, the packed
caption loss of training and the run's own model, so that `pretrain.verify` compares two different paths: ours, and
plain transformers reading the exported files.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from data_pipelines.dataset import Dataset
from data_pipelines.shard import Sample
from pretrain.features import log_mel
from pretrain.folders import FORMAT_VERSION, PROBE_AUDIO, PROBE_IMAGE
from pretrain.generate import caption_ids, prompt_inputs
from pretrain.restore import Restored
from pretrain.sample_batches import sample_batches

VOCABULARY_SAMPLE = 32
NEW_TOKENS = 24


def probe_image() -> bytes:
    """A PNG of 120 x 80 pixels: a colour gradient with a disc on it. The same bytes' worth of pixels everywhere."""
    y, x = np.mgrid[0:80, 0:120]
    pixels = np.stack([x * 2, y * 3, 255 - x - y], axis=-1).astype(np.uint8)
    pixels[(x - 40) ** 2 + (y - 40) ** 2 < 500] = (250, 240, 30)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def probe_audio(sampling_rate: int) -> bytes:
    """A 16-bit WAV of 0.8 seconds: a tone that rises from 200 Hz to a fifth of the sampling rate, over quiet noise."""
    n = np.arange(int(0.8 * sampling_rate))
    seconds = n / sampling_rate
    sweep = 200 * seconds + (sampling_rate / 5 - 200) * seconds**2 / 1.6
    # A linear congruential generator, so that the bytes do not depend on numpy's version.
    noise = ((n.astype(np.uint64) * 1_103_515_245 + 12_345) % 2_147_483_648).astype(np.float64) / 2_147_483_648 - 0.5
    wave = 9000 * np.sin(2 * np.pi * sweep) + 600 * noise
    file = io.BytesIO()
    soundfile.write(file, np.round(wave).astype(np.int16), sampling_rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def made_up(sampling_rate: int) -> list[Sample]:
    """The probes that travel with an export: picture, sound, both."""
    image, audio, text = probe_image(), probe_audio(sampling_rate), "a picture with a sound"
    return [
        Sample("probe-image", image=image, text=text, image_extension="png"),
        Sample("probe-audio", audio=audio, text=text),
        Sample("probe-both", image=image, audio=audio, text=text, image_extension="png"),
    ]


def choose(dataset: Dataset, number: int = 4) -> list[int]:
    """Samples to use as probes: spread over the dataset, with a text, and with image or sound where there are any."""
    ids = np.arange(len(dataset))
    shown = (dataset.sizes("image", ids) >= 0) | (dataset.sizes("audio", ids) >= 0)
    usable = ids[(dataset.sizes("text", ids) > 0) & shown]
    return usable[np.unique(np.linspace(0, len(usable) - 1, number).astype(int))].tolist() if len(usable) else []


@torch.no_grad()
def measure(restored: Restored, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """What the model says about samples, through the loader and the code of training.

    Returns:
        One dict a sample: the prompt and caption ids, hashes and moments of the features, the caption loss in nats a
        token, log-sum-exp and a sample of the logits at every caption position, and a greedy caption.
    """
    batches = sample_batches(restored.config, restored.tokenizer, samples, batch_size=1)
    return [_measure_one(restored, samples[places[0]].key, batch) for places, batch in batches if places]


def _measure_one(restored: Restored, key: str, batch: dict[str, Any]) -> dict[str, Any]:
    model, data = restored.model, restored.config.data
    num_image = int(model.image_soft_tokens(batch["image_position"])[0])
    num_audio = int(model.audio_soft_tokens(batch["audio_length"])[0])
    prompt = model.prompt_ids(num_image, num_audio)
    caption = [*batch["text"][0, : int(batch["text_length"][0])].tolist(), model.special.eos]
    nll, num_tokens = model.caption_nll(batch, see=("image", "audio"))
    inputs = prompt_inputs(model, batch, ("image", "audio"), [caption])
    logits = model.backbone(**inputs).logits[0, len(prompt) - 1 : -1].float()
    vocabulary = np.unique(np.linspace(0, logits.shape[-1] - 1, VOCABULARY_SAMPLE).astype(int)).tolist()
    kinds = {(True, False): "image", (False, True): "audio", (True, True): "image_and_audio", (False, False): "text"}
    measured: dict[str, Any] = {
        "key": key,
        "prompt": kinds[num_image > 0, num_audio > 0],
        "prompt_ids": prompt,
        "caption_ids": caption,
        "vocabulary": vocabulary,
        "max_new_tokens": NEW_TOKENS,
        "loss": float(nll[0] / num_tokens[0]),
        "logsumexp": logits.logsumexp(-1).tolist(),
        "logits": logits[:, torch.tensor(vocabulary)].tolist(),
        "generated_ids": caption_ids(model, batch, max_new_tokens=NEW_TOKENS)[0],
    }
    if num_image:
        real = (batch["image_position"][0] >= 0).all(-1)
        measured["num_image_tokens"] = num_image
        measured["pixels_sha256"] = hashlib.sha256(batch["image"][0][real].numpy().tobytes()).hexdigest()
    if num_audio:
        mel, mask = log_mel(batch["audio"], batch["audio_length"], data.audio)
        measured["num_audio_tokens"] = num_audio
        measured["mel_mean"], measured["mel_std"] = float(mel[0][mask[0]].mean()), float(mel[0][mask[0]].std())
    return measured


def record(restored: Restored, dataset: Dataset | None, folder: Path, dtype: str) -> dict[str, Any]:
    """Measure the probes and put what travels with the export into `folder`.

    Args:
        restored: the run's model. With dtype `bf16` its backbone is rounded to bfloat16 in place first, so that the
            numbers are those of the exported weights, computed in fp32.
        dataset: where the other probes come from; None for the made-up ones alone.
        folder: the export; gets `eval/probe.png` and `eval/probe.wav`.
        dtype: `fp32` or `bf16`, the type of the exported weights.

    Returns:
        The content of `eval/reference.json`.
    """
    if dtype == "bf16":
        with torch.no_grad():
            for tensor in [*restored.model.backbone.parameters(), *restored.model.backbone.buffers()]:
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(torch.bfloat16))
    (folder / "eval").mkdir(exist_ok=True)
    (folder / PROBE_IMAGE).write_bytes(probe_image())
    (folder / PROBE_AUDIO).write_bytes(probe_audio(restored.config.data.audio.sampling_rate))
    reference: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "step": restored.step,
        "dtype": dtype,
        "probes": measure(restored, made_up(restored.config.data.audio.sampling_rate)),
        "data": None,
    }
    if dataset is not None:
        samples = [dataset[i] for i in choose(dataset)]
        reference["data"] = {"name": dataset.name, "fingerprint": dataset.fingerprint}
        reference["data"]["probes"] = measure(restored, samples) if samples else []
    return reference

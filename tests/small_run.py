"""A real, very small pretraining run: two ranks, a few steps, pictures and tones whose class can be seen and heard.

Starting two ranks takes many seconds, so a run is made once a test session and shared by the modules that read it.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from data_pipelines.dataset import commit_shard, write_dataset
from data_pipelines.shard import Sample
from tests.data_pipelines.tuples import encode_image, encode_sound
from tests.ranks import ROOT, run_ranks

CLASSES = ("red", "green", "blue")
STEPS = 4
# Squares in one run, native aspect ratios in the other: both ways of an image are trained, exported and compared.
SIZES = {2: "28", 3: "null"}
_CONFIG = """
run: {{dir: {run}, name: small run, seed: 1}}
data:
  train: {train}
  eval: {test}
  global_batch: 8
  num_workers: 0
  pack_tokens: 128
  image: {{size: {size}, patch_size: 7, pooling: 2}}
  audio: {{sampling_rate: 8000, mel_bins: 20, frame_ms: 25.0, max_seconds: 0.7, mel_mean: -3.0, mel_std: 2.0}}
  text: {{vocab_size: 320, max_tokens: 24}}
model:
  text: {{num_hidden_layers: 2}}
  vision: {{num_hidden_layers: 1}}
  audio: {{num_hidden_layers: 1, hidden_size: 32, output_proj_dims: 32}}
losses: {{text: 1.0, align: 1.0, image: 0.5, audio: 0.5}}
train: {{max_steps: 4, warmup_steps: 1, learning_rate: 0.002}}
engine: {{zero_stage: {stage}, bucket_mb: 1}}
checkpoint: {{every_steps: 2, keep_last: 3}}
evaluation: {{batch: 8, image_prompts: ["a {{}} square", "a picture of {{}}"], audio_prompts: ["the tone of {{}}"]}}
"""


def config_text(run: Path, train: Path, test: Path, stage: int = 2, size: str = "28") -> str:
    """The YAML of a small run; `size` is the images' side, or `null` for native aspect ratios."""
    return _CONFIG.format(run=run, train=train, test=test, stage=stage, size=size)


def small_sample(number: int) -> Sample:
    """A 40 x 30 square and a tone of one of three classes; now and then one of the three members is missing."""
    draw = np.random.default_rng(number)
    kind = number % len(CLASSES)
    pixels = draw.integers(0, 60, (30, 40, 3), dtype=np.uint8)
    pixels[5:25, 5:25, kind] += 180
    seconds = np.arange(int(8000 * draw.uniform(0.3, 0.6))) / 8000
    wave = 0.4 * np.sin(2 * np.pi * 300 * (kind + 1) * seconds) + 0.01 * draw.standard_normal(len(seconds))
    missing = {5: "image", 6: "audio", 7: "text"}.get(number % 8)
    return Sample(
        key=f"small-{number:03d}",
        image=None if missing == "image" else encode_image(pixels),
        text=None if missing == "text" else f"a {CLASSES[kind]} square and the tone of {CLASSES[kind]}",
        audio=None if missing == "audio" else encode_sound(wave),
        metadata={"label": kind, "label_name": CLASSES[kind], "license": "CC0-1.0"},
        image_extension="png",
        audio_extension="flac",
    )


def small_dataset(folder: Path, name: str, numbers: range) -> Path:
    """Write the samples of `numbers` as a dataset of two shards."""
    half = len(numbers) // 2
    shards = [
        commit_shard(map(small_sample, part), folder, f"shards/{name}-{i}.tar")
        for i, part in enumerate((numbers[:half], numbers[half:]))
    ]
    write_dataset(folder, name, shards)
    return folder


@functools.lru_cache(maxsize=2)
def small_run(stage: int) -> Path:
    """A folder with `run/`, `train/`, `test/` and `config.yaml`, trained for `STEPS` steps under ZeRO 2 or 3."""
    keep = tempfile.TemporaryDirectory(prefix=f"small-run-{stage}-")
    _kept.append(keep)
    folder = Path(keep.name)
    train = small_dataset(folder / "train", "small-train", range(32))
    test = small_dataset(folder / "test", "small-test", range(100, 124))
    text = config_text(folder / "run", train, test, stage, SIZES[stage])
    (folder / "config.yaml").write_text(text)
    run_ranks("pretrain.train", [str(folder / "config.yaml")])
    return folder


def triptych(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the `triptych` command as a user would, in a process of its own."""
    command = [sys.executable, "-c", "from launch.cli import main; main()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


_kept: list[tempfile.TemporaryDirectory[str]] = []

"""Claim: reading by index, in an exact order, costs little over decoding and less than webdataset's streaming.

One run, one process without workers, the same tars and the same decoding and stacking for all three:
  decode      the limit: samples already in memory -> batches
  triptych    our loader: index, order, pread, decode -> batches
  webdataset  webdataset: tar stream, shuffled shards and a sample buffer, decode -> batches

    python benchmarks/loader.py [--samples 2000] [--rounds 5]

Each round runs all three, in turning order. The figures are medians of samples per CPU-second, printed as JSON with
their ratios to the limit, and kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ["WDS_SECURE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import soundfile
import webdataset
from PIL import Image

from data_pipelines.collate import Collator
from data_pipelines.dataset import Dataset, RawSample, commit_shard, open_dataset, write_dataset
from data_pipelines.loader import build_loader
from data_pipelines.shard import Sample
from data_pipelines.tokenizer import TextEncoder, make_tokenizer
from pretrain.config import Config

BATCH = 64


def sample(number: int) -> Sample:
    """A 256 px JPEG of coloured noise, 2 s of 16 kHz FLAC and a caption."""
    draw = np.random.default_rng(number)
    picture = Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize(
        (256, 256), Image.Resampling.BICUBIC
    )
    jpeg, flac = io.BytesIO(), io.BytesIO()
    picture.save(jpeg, "JPEG", quality=90)
    wave = np.cumsum(draw.normal(size=32_000)) / 500
    soundfile.write(flac, np.clip(wave - wave.mean(), -0.9, 0.9), 16_000, format="FLAC")
    caption = f"picture number {number} of the benchmark, with a sound"
    return Sample(f"s{number:06d}", jpeg.getvalue(), caption, flac.getvalue(), {"label": number % 10}, "jpg", "flac")


def build(folder: Path, count: int) -> Dataset:
    """Write `count` samples in shards of 250."""
    starts = range(0, count, 250)
    shards = [
        commit_shard(map(sample, range(start, min(start + 250, count))), folder, f"shards/b-{i:06d}.tar")
        for i, start in enumerate(starts)
    ]
    write_dataset(folder, "benchmark", shards)
    return open_dataset(folder)


def webdataset_batches(dataset: Dataset, collator: Collator) -> Iterator[int]:
    """Batches as webdataset users make them: shuffled shards, a shuffle buffer, the same decoding."""
    shards = [str(dataset.path / entry.path) for entry in dataset.shards]
    stream = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(1000)
    batch: list[RawSample] = []
    for found in stream:
        members = (found["jpg"], found["txt"], found["flac"], found["json"])
        batch.append(RawSample(found["__key__"], "", *members, "jpg", "flac", None))
        if len(batch) == BATCH:
            collator(batch, [0] * BATCH, [""] * BATCH)
            yield BATCH
            batch = []


def rate(batches: Callable[[], Iterator[int]]) -> float:
    """Samples per CPU-second of one pass."""
    start = time.process_time()
    done = sum(batches())
    return done / (time.process_time() - start)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = build(folder / "data", options.samples)
        steps = options.samples // BATCH
        config = Config.model_validate(
            {
                "run": {"dir": str(folder / "run")},
                "data": {"train": str(folder / "data"), "global_batch": BATCH, "num_workers": 0},
                "train": {"max_steps": steps, "warmup_steps": 0},
            }
        )
        collator = Collator(config.data, TextEncoder.of(make_tokenizer(config, [dataset])), None)
        in_memory = dataset.read(np.arange(steps * BATCH), limits=collator.limits)

        def decode() -> Iterator[int]:
            for start in range(0, steps * BATCH, BATCH):
                collator(in_memory[start : start + BATCH], [0] * BATCH, [""] * BATCH)
                yield BATCH

        def triptych() -> Iterator[int]:
            for batch in build_loader(config, 0, 1):
                yield len(batch["keys"])

        runs = {"decode": decode, "triptych": triptych, "webdataset": lambda: webdataset_batches(dataset, collator)}
        found: dict[str, list[float]] = {name: [] for name in runs}
        kinds = list(runs)
        for number in range(options.rounds):
            for turn in range(len(kinds)):
                kind = kinds[(number + turn) % len(kinds)]
                found[kind].append(rate(runs[kind]))
    median = {kind: statistics.median(values) for kind, values in found.items()}
    result = {
        "samples_per_cpu_second": {kind: round(value, 1) for kind, value in median.items()},
        "ratio_to_decode": {kind: round(value / median["decode"], 3) for kind, value in median.items()},
        "rounds": options.rounds,
        "samples": options.samples,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "webdataset", "pillow", "soundfile", "numpy")},
    }
    text = json.dumps(result, indent=1)
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"loader-{time.strftime('%Y-%m-%d')}-cpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

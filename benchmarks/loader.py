"""Claim: reading by index, in an exact order, costs little over decoding and less than any peer.

One run, the same tuples, decoding and stacking for all:
  decode      the limit: samples already in memory -> batches, in this process
  triptych    our loader: index, order, pread, decode -> batches
  others      webdataset, Mosaic Streaming, litData and Hugging Face `datasets`, each as it is set up for training,
              handing encoded members to our collator in their workers (peers.py); what is not installed is named
each without workers, with 2 processes, and ours with 2 threads too.

    python benchmarks/loader.py [--samples 512] [--rounds 5]

Each round runs all cases, in turning order. The figures are medians over rounds of samples per CPU-second (children
included) and per second, with the ratios to the limit of the same round; printed as JSON, kept in benchmarks/results/,
and plotted where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import io
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ["WDS_SECURE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import soundfile
import torch
from PIL import Image

from benchmarks.peers import NOT_MEASURED, PACKAGES, PEERS
from data_pipelines.collate import Collator
from data_pipelines.dataset import Dataset, RawSample, commit_shard, open_dataset, write_dataset
from data_pipelines.loader import build_loader
from data_pipelines.shard import Sample
from data_pipelines.tokenizer import TextEncoder, make_tokenizer
from pretrain.config import Config

BATCH = 64
SIDE = 240


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
    """Write `count` samples in shards of a batch each."""
    starts = range(0, count, BATCH)
    shards = [
        commit_shard(map(sample, range(start, min(start + BATCH, count))), folder, f"shards/b-{i:06d}.tar")
        for i, start in enumerate(starts)
    ]
    write_dataset(folder, "benchmark", shards)
    return open_dataset(folder)


def cpu_seconds() -> float:
    """Of this process with its threads, and of the workers that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def rates(batches: Iterable[Any]) -> tuple[float, float]:
    """Samples per CPU-second and per second of one pass; workers have ended when it is over."""
    cpu, wall, done = cpu_seconds(), time.perf_counter(), 0
    for batch in batches:
        done += len(batch["keys"])
    del batches
    gc.collect()
    return done / (cpu_seconds() - cpu), done / (time.perf_counter() - wall)


def config_of(folder: Path, steps: int, workers: int, kind: str) -> Config:
    """A run's config over the benchmark's tuples."""
    data = {"train": str(folder / "data"), "global_batch": BATCH, "num_workers": workers, "worker_type": kind}
    return Config.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "data": {**data, "image": {"size": SIDE}},
            "train": {"max_steps": steps, "warmup_steps": 0},
        }
    )


def cases(folder: Path, dataset: Dataset) -> tuple[dict[str, Callable[[], Iterable[Any]]], dict[str, str]]:
    """What is measured, by name, and the peers that are not there with the reason."""
    steps = len(dataset) // BATCH
    config = config_of(folder, steps, 0, "process")
    collator = Collator(config.data, TextEncoder.of(make_tokenizer(config, [dataset])), None)
    in_memory = dataset.read(np.arange(steps * BATCH), limits=collator.limits)

    def collate(samples: list[RawSample]) -> dict[str, Any]:
        made = collator(samples, [0] * len(samples), [""] * len(samples))
        return {"keys": made.keys, **{name: torch.from_numpy(array) for name, array in made.arrays.items()}}

    def ours(workers: int, kind: str) -> Iterable[Any]:
        return build_loader(config_of(folder, steps, workers, kind), 0, 1)

    found: dict[str, Callable[[], Iterable[Any]]] = {
        "decode": lambda: (collate(in_memory[at : at + BATCH]) for at in range(0, steps * BATCH, BATCH)),
        "triptych, no workers": lambda: ours(0, "process"),
        "triptych, 2 processes": lambda: ours(2, "process"),
        "triptych, 2 threads": lambda: ours(2, "thread"),
    }
    absent = dict(NOT_MEASURED)
    for name, make in PEERS.items():
        try:
            peer = make(folder, dataset, collate, BATCH)
        except ImportError as error:
            absent[name] = str(error)
            continue
        found[f"{name}, no workers"] = functools.partial(peer, 0)
        found[f"{name}, 2 processes"] = functools.partial(peer, 2)
    return found, absent


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of the ratios to the limit, by case."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    names = [name for name in result["ratio_to_decode_per_cpu_second"] if name != "decode"]
    values = [result["ratio_to_decode_per_cpu_second"][name] for name in names]
    colours = ["tab:blue" if name.startswith("triptych") else "tab:gray" for name in names]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(names) + 1.2))
    axes.barh(names[::-1], values[::-1], color=colours[::-1])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("samples per CPU-second, as a share of decoding alone")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this, besides decode")
    options = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        dataset = build(Path(name) / "data", options.samples)
        runs, absent = cases(Path(name), dataset)
        kinds = [kind for kind in runs if options.only in kind or kind == "decode"]
        for number in range(-1, options.rounds):
            for turn in range(len(kinds)):
                kind = kinds[(number + turn) % len(kinds)]
                found = rates(runs[kind]())
                # The round before the first warms caches and is left out.
                if number >= 0:
                    measured.setdefault(kind, []).append(found)
    limit = measured["decode"]

    def medians(of: Callable[[int, tuple[float, float]], float], digits: int) -> dict[str, float]:
        return {
            kind: round(statistics.median(of(number, one) for number, one in enumerate(measured[kind])), digits)
            for kind in kinds
        }

    result = {
        "samples_per_cpu_second": medians(lambda _, one: one[0], 1),
        "samples_per_second": medians(lambda _, one: one[1], 1),
        "ratio_to_decode_per_cpu_second": medians(lambda number, one: one[0] / limit[number][0], 3),
        "ratio_to_decode_per_second": medians(lambda number, one: one[1] / limit[number][1], 3),
        "not_measured": absent,
        "rounds": options.rounds,
        "samples": options.samples,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "versions": {
            name: version(name)
            for name in ("torch", "pillow", "soundfile", "numpy", *PACKAGES.values())
            if find_version(name)
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    path = results / f"loader-{time.strftime('%Y-%m-%d')}-cpu.json"
    path.write_text(text + "\n")
    plot(result, path.with_suffix(".png"))


def find_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

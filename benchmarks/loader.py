"""Claim: reading by index, in an exact order, costs little over decoding, and less than any peer.

One run, the same tuples:
  decode      the limit: samples already in memory -> our batches, in this process, or in 2 processes that hand over
              nothing
  triptych    our loader: index, order, pread, decode -> batches
  others      webdataset, Energon, Mosaic Streaming, litData and Hugging Face `datasets`, each as it is set up for
              training (peers.py), with the usual collate function in its workers: Pillow, soundfile, float32 tensors;
              and once more "with our decoder", which leaves the difference between reading and reading
each without workers, with 2 processes, and ours with 2 threads too; and each without any decoding. What is not
installed is named.

    python benchmarks/loader.py [--samples 512] [--rounds 5]

Each round runs all cases, in turning order, each between two runs of the limit with as many workers: a machine's speed
drifts within seconds. The figures are medians over rounds of samples per CPU-second (children included) and per second,
with the ratios to the two limits beside; printed as JSON, kept in benchmarks/results/, and plotted where matplotlib is
installed.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ["WDS_SECURE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import soundfile
from PIL import Image

from benchmarks.peers import PACKAGES, PEERS, UsualCollate
from data_pipelines.collate import Collator
from data_pipelines.dataset import Dataset, RawSample, commit_shard, open_dataset, write_dataset
from data_pipelines.loader import build_loader
from data_pipelines.sequence import SampleSequence
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
    gc.collect()
    gc.freeze()
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


def decode_in_processes(
    collate: Callable[[list[RawSample]], Any], batches: list[list[RawSample]], workers: int
) -> Iterator[Any]:
    """Decode and stack in forked processes, each its share, and let the results go."""
    children = []
    for number in range(workers):
        child = os.fork()
        if not child:
            for batch in batches[number::workers]:
                collate(batch)
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise RuntimeError("a process of the benchmark died")
    for batch in batches:
        yield {"keys": batch}


def cases(folder: Path, dataset: Dataset) -> tuple[dict[str, Callable[[], Iterable[Any]]], dict[str, str]]:
    """What is measured, by "name, how", and the peers that are not there with the reason."""
    steps = len(dataset) // BATCH
    config = config_of(folder, steps, 0, "process")
    tokenizer = make_tokenizer(config, [dataset])
    collator = Collator(config.data, TextEncoder.of(tokenizer), None)
    in_memory = dataset.read(np.arange(steps * BATCH), limits=collator.limits)
    shares = [in_memory[at : at + BATCH] for at in range(0, steps * BATCH, BATCH)]

    def collate(samples: list[RawSample]) -> dict[str, Any]:
        made = collator(samples, [0] * len(samples), [""] * len(samples))
        return {"keys": made.keys, **made.block.tensors()}

    def count(samples: list[RawSample]) -> dict[str, Any]:
        return {"keys": [sample.key for sample in samples]}

    def ours(workers: int, kind: str) -> Iterable[Any]:
        return build_loader(config_of(folder, steps, workers, kind), 0, 1)

    def read_ours() -> Iterable[Any]:
        data = config.data
        sequence = SampleSequence(
            [dataset], [1.0], config.run.seed, BATCH, data.num_streams, data.shuffle_block, data.tail
        )
        for step in range(steps):
            yield count([raw for _, raw in dataset.iter_read(sequence.batch(step).sample, limits=collator.limits)])

    found: dict[str, Callable[[], Iterable[Any]]] = {
        "decode, no workers": lambda: map(collate, shares),
        "decode, 2 processes": lambda: decode_in_processes(collate, shares, 2),
        "triptych, no workers": lambda: ours(0, "process"),
        "triptych, 2 processes": lambda: ours(2, "process"),
        "triptych, 2 threads": lambda: ours(2, "thread"),
        "triptych, reading alone": read_ours,
    }
    absent: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            # Some print while they prepare; standard output is for the result.
            with contextlib.redirect_stdout(sys.stderr):
                usual = UsualCollate(tokenizer, SIDE)
                peer, same, reader = (make(folder, dataset, each, BATCH) for each in (usual, collate, count))
        except ImportError as error:
            absent[name] = str(error)
            continue
        found[f"{name}, no workers"] = functools.partial(peer, 0)
        found[f"{name}, 2 processes"] = functools.partial(peer, 2)
        found[f"{name} with our decoder, no workers"] = functools.partial(same, 0)
        found[f"{name} with our decoder, 2 processes"] = functools.partial(same, 2)
        found[f"{name}, reading alone"] = functools.partial(reader, 0)
    return found, absent


@dataclass
class Measured:
    """Of one case, by round: samples per CPU-second and per second, and these as shares of the limits beside."""

    rates: list[tuple[float, float]] = field(default_factory=list)
    shares: list[tuple[float, float]] = field(default_factory=list)


def measure(runs: dict[str, Callable[[], Iterable[Any]]], rounds: int) -> dict[str, Measured]:
    """Run each case `rounds` times, between runs of its limit, after a round that warms caches and is left out."""
    ways = {
        "decode, no workers": [kind for kind in runs if kind.endswith(", no workers")],
        "decode, 2 processes": [kind for kind in runs if kind.endswith((", 2 processes", ", 2 threads"))],
        None: [kind for kind in runs if kind.endswith(", reading alone")],
    }
    measured: dict[str, Measured] = {kind: Measured() for kind in runs}
    for number in range(-1, rounds):
        for limit, kinds in ways.items():
            kinds = [kind for kind in kinds if kind != limit]
            before = rates(runs[limit]()) if limit else (1.0, 1.0)
            for turn in range(len(kinds)):
                kind = kinds[(number + turn) % len(kinds)]
                found = rates(runs[kind]())
                after = rates(runs[limit]()) if limit else before
                if number >= 0:
                    measured[kind].rates.append(found)
                    of = [rate / statistics.mean(beside) for rate, *beside in zip(found, before, after, strict=True)]
                    measured[kind].shares.append((of[0], of[1]))
                    if limit:
                        measured[limit].rates.append(after)
                before = after
    return measured


def colour_of(case: str) -> str:
    """Ours, a peer as it is, or a peer with our decoder."""
    if case.startswith("triptych"):
        return "tab:blue"
    return "silver" if "with our decoder" in case else "tab:gray"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars: shares of the limit, and what reading alone reaches."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    shares: dict[str, float] = result["ratio_to_decode_per_cpu_second"]
    rates: dict[str, float] = result["samples_per_cpu_second"]
    reading = {name.split(",")[0]: rate for name, rate in rates.items() if name.endswith("reading alone")}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.27 * len(shares) + 1.2), width_ratios=(3, 2))
    for axes, values in ((left, shares), (right, reading)):
        names = sorted(values, key=lambda name: (name.split(", ")[1:], values[name]))
        colours = [colour_of(name) for name in names]
        axes.bar_label(axes.barh(names, [values[name] for name in names], color=colours), fmt="{:,.3g}", padding=3)
        axes.spines[["top", "right"]].set_visible(False)
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("read and decode: share of decoding alone")
    right.set_xlabel("reading alone: samples per CPU-second")
    right.margins(x=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this, besides the limits")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dataset = build(Path(name) / "data", options.samples)
        runs, absent = cases(Path(name), dataset)
        wanted = {kind: run for kind, run in runs.items() if options.only in kind or kind.startswith("decode")}
        measured = measure(wanted, options.rounds)

    def rates_of(unit: int) -> dict[str, float]:
        return {kind: round(statistics.median(one[unit] for one in of.rates), 1) for kind, of in measured.items()}

    def shares_of(unit: int) -> dict[str, float]:
        return {
            kind: round(statistics.median(one[unit] for one in of.shares), 3)
            for kind, of in measured.items()
            if not kind.startswith("decode") and not kind.endswith("reading alone")
        }

    result = {
        "samples_per_cpu_second": rates_of(0),
        "samples_per_second": rates_of(1),
        "ratio_to_decode_per_cpu_second": shares_of(0),
        "ratio_to_decode_per_second": shares_of(1),
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

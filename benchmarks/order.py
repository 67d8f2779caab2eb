"""Claim: planning an epoch and seeking in it cost no more for 1e10 samples than for 1e6, nor for more ranks.

  plan      make the order of an epoch of so many samples: in 200,000 shards, and in shards of 5,000
  seek      the sample ids of a global batch of 4,096 in the middle of it
  start     what one rank does before its first sample: plan, seek, and its share of a batch of 16,384, by ranks
  window    shards that are open at a time, by the size of a shuffle block: what a cache has to hold

    python benchmarks/order.py [--rounds 7]

Times are CPU-milliseconds, medians; bytes are the most that were allocated at a time. Printed as JSON, kept in
benchmarks/results/, and plotted where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.balance import deal
from data_pipelines.order import DEFAULT_BLOCK, DEFAULT_STREAMS, Order

SAMPLES = (10**6, 10**7, 10**8, 10**9, 10**10)
RANKS = (1, 8, 64, 512, 4096, 16_384)
BLOCKS = (1024, 4096, 16_384, 65_536)


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Median CPU-milliseconds of one call."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return round(1000 * statistics.median(times), 2)


def planning(sizes: np.ndarray, rounds: int) -> dict[str, float]:
    """Cost of an order over shards of these sizes, and of a seek in it."""
    order = Order(sizes, 0, 0)
    middle = order.num_batches(4096) // 2
    tracemalloc.start()
    Order(sizes, 0, 1).global_batch(middle, 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "shards": len(sizes),
        "plan_ms": milliseconds(lambda: Order(sizes, 0, 1), rounds),
        "seek_ms": milliseconds(lambda: order.global_batch(middle, 4096), rounds),
        "peak_mb": round(peak / 1e6, 1),
    }


def start(num_ranks: int, rounds: int) -> dict[str, float]:
    """What a rank of so many does before its first sample, at 1e9 samples in 200,000 shards."""
    sizes, size = np.full(200_000, 5000), 16_384
    costs = np.random.default_rng(0).integers(50, 1000, size)

    def work() -> None:
        Order(sizes, 0, 0).global_batch(1000, size)

    return {"plan_and_seek_ms": milliseconds(work, rounds), "deal_ms": milliseconds(lambda: deal(costs, num_ranks), 3)}


def plot(result: dict[str, Any], path: Path) -> None:
    """Planning and seeking by samples, starting by ranks."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for name in ("200000_shards", "shards_of_5000"):
        for what, style in (("plan_ms", "-o"), ("seek_ms", "--s")):
            values = [one[what] for one in result["by_samples"][name].values()]
            left.loglog(SAMPLES, values, style, label=f"{what[:4]}, {name.replace('_', ' ')}")
    left.set_xlabel("samples")
    left.set_ylabel("CPU-milliseconds")
    left.legend(fontsize=7)
    for what, label in (("plan_and_seek_ms", "plan and seek"), ("deal_ms", "deal 16,384 samples")):
        right.semilogx(RANKS, [one[what] for one in result["by_ranks"].values()], "-o", label=label)
    right.set_xlabel("ranks")
    right.set_ylim(bottom=0)
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    by_samples = {
        "200000_shards": {
            str(n): planning(np.diff(np.linspace(0, n, 200_001, dtype=np.int64)), options.rounds) for n in SAMPLES
        },
        "shards_of_5000": {str(n): planning(np.full(n // 5000, 5000), options.rounds) for n in SAMPLES},
    }
    sizes = np.full(200_000, 5000)
    window = {str(block): len(Order(sizes, 0, 0, DEFAULT_STREAMS, block).open_shards(10**8)) for block in BLOCKS}
    result = {
        "by_samples": by_samples,
        "by_ranks": {str(ranks): start(ranks, options.rounds) for ranks in RANKS},
        "open_shards_by_block": window,
        "defaults": {"num_streams": DEFAULT_STREAMS, "shuffle_block": DEFAULT_BLOCK},
        "rounds": options.rounds,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "versions": {"numpy": np.__version__},
    }
    text = json.dumps(result, indent=1)
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    path = results / f"order-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(text + "\n")
    plot(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Claim: dealt and packed by what the index knows, ranks get even work and rows hold hardly any padding.

A mix of spoken digits (tiny pictures, half-second sounds, modalities missing) and photos with sounds is dealt to 8
simulated ranks in global batches of 1,024, and each rank's segments are packed into rows:
  cost      the dearest rank of a batch over the mean: tokens of both towers and the language model, from the index
  padding   share of a packed row's tokens that are padding, rows being as wide as the longest, in multiples of 16
Beside them the same for naive dealing (slices of the batch in order) and naive packing (segments in order, a new row
when the next one does not fit), and without any packing (each segment padded to the longest).

    python benchmarks/balance.py [--data ../shared/data] [--batches 200]

Printed as JSON and kept in benchmarks/results/. No sample is read after the two datasets are built.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipelines.balance import deal, pack
from data_pipelines.build import build_dataset
from data_pipelines.config import DataConfig, ImageConfig
from data_pipelines.costs import sample_costs, soft_tokens
from data_pipelines.dataset import Costs, open_dataset
from data_pipelines.sequence import SampleSequence

RANKS, GLOBAL_BATCH, WIDTH_MULTIPLE = 8, 1024, 16


def segments(costs: Costs, config: DataConfig) -> np.ndarray:
    """Lengths of the language model's segments of these samples, in order: int64."""
    image, audio, text = soft_tokens(costs, config)
    framed = np.where(image, image + 2, 0) + np.where(audio, audio + 2, 0)
    both = np.stack([np.where((text > 0) & (framed > 0), framed + text + 2, 0), np.where(text > 0, text + 2, 0)], 1)
    lengths = both.reshape(-1)
    return lengths[lengths > 0]


def in_order(lengths: np.ndarray, row_tokens: int) -> list[int]:
    """Row totals when segments are taken as they come."""
    totals = [0]
    for length in lengths.tolist():
        if totals[-1] + length > row_tokens:
            totals.append(0)
        totals[-1] += length
    return totals


def padding(totals: list[int]) -> float:
    """Padding's share of rows with these totals."""
    width = -(-max(totals) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    return 1 - sum(totals) / (width * len(totals))


def take(costs: Costs, places: np.ndarray) -> Costs:
    """The costs of some of the samples."""
    return Costs(*(column[places] for column in costs))


def measure(batches: Iterator[Costs], config: DataConfig, row_tokens: tuple[int, ...]) -> dict[str, dict[str, object]]:
    """Ratio of costs and shares of padding, ours and naive, over batches."""
    ratio: dict[str, list[float]] = {"ours": [], "naive": []}
    share: dict[str, dict[int, list[float]]] = {
        name: {tokens: [] for tokens in row_tokens} for name in ("ours", "naive", "unpacked")
    }
    for batch in batches:
        cost = sample_costs(batch, config)
        hands = {"ours": deal(cost, RANKS), "naive": np.split(np.arange(len(cost)), RANKS)}
        for name, dealt in hands.items():
            loads = np.array([cost[hand].sum() for hand in dealt])
            ratio[name].append(float(loads.max() / loads.mean()))
        for hand in hands["ours"]:
            lengths = segments(take(batch, hand), config)
            for tokens in row_tokens:
                rows = pack(lengths, max(tokens, int(lengths.max())), WIDTH_MULTIPLE)
                share["ours"][tokens].append(padding([int(lengths[row].sum()) for row in rows]))
        for hand in hands["naive"]:
            lengths = segments(take(batch, hand), config)
            for tokens in row_tokens:
                share["naive"][tokens].append(padding(in_order(lengths, tokens)))
                share["unpacked"][tokens].append(padding(lengths.tolist()))
    return {
        "largest_rank_cost_over_mean": {
            name: {"median": round(float(np.median(all_)), 5), "p99": round(float(np.quantile(all_, 0.99)), 5)}
            for name, all_ in ratio.items()
        },
        "padding_share_of_tokens": {
            name: {str(tokens): round(float(np.mean(all_)), 4) for tokens, all_ in by_row.items()}
            for name, by_row in share.items()
        },
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--built", type=Path, help="folder for the two datasets, kept and used again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.built or Path(temporary)
        names = ("spoken-digits", "sound-photos")
        for name in names:
            if not (folder / name / "dataset.json").is_file():
                build_dataset(str(options.data / name / "manifest.csv"), folder / name)
        datasets = [open_dataset(folder / name) for name in names]
        everything = [dataset.costs(np.arange(len(dataset))) for dataset in datasets]
    joined = Costs(*(np.concatenate(columns) for columns in zip(*everything, strict=True)))
    sequence = SampleSequence(datasets, [1.0, 1.0], 0, GLOBAL_BATCH, 720, 4096, "wrap")
    configs = {
        "native_images": DataConfig(train="-"),
        "squares_of_96": DataConfig(train="-", image=ImageConfig(size=96, patch_size=8, pooling=3)),
    }
    result = {
        "ranks": RANKS,
        "global_batch": GLOBAL_BATCH,
        "batches": options.batches,
        "samples": {dataset.name: len(dataset) for dataset in datasets},
        "row_tokens": [512, 1024, 2048, 4096],
        **{
            name: measure(
                (take(joined, sequence.batch(step).index) for step in range(options.batches)),
                config,
                (512, 1024, 2048, 4096),
            )
            for name, config in configs.items()
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"balance-{time.strftime('%Y-%m-%d')}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

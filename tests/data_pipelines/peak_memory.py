"""Reads a folder of tars as a run does, for one epoch at the default limits, and prints what it took.

python -m tests.data_pipelines.peak_memory FOLDER
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from data_pipelines.config import DataConfig
from data_pipelines.dataset import index_folder
from data_pipelines.loader import build_loader
from pretrain.config import Config, RunConfig, TrainConfig


def memory(field: str) -> int:
    """`VmHWM` (the peak) or `VmRSS` (now) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main(folder: Path) -> None:
    """Index, read every sample once, and print JSON: bytes before, at the peak, and what became of the samples."""
    before = memory("VmRSS")
    dataset, quarantined = index_folder(folder)
    config = Config(
        run=RunConfig(dir=str(folder / "run")),
        train=TrainConfig(max_steps=-(-len(dataset) // 8), warmup_steps=0),
        data=DataConfig(train=str(folder), global_batch=8, num_workers=0, max_bad_rate=1.0),
    )
    weights = {
        key: float(weight)
        for batch in build_loader(config, 0, 1)
        for key, weight in zip(batch["keys"], batch["weight"], strict=True)
    }
    reasons = Counter(line.reason for line in quarantined)
    found = {"before": before, "peak": memory("VmHWM"), "weights": weights, "refused": dict(reasons)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

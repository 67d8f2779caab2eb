"""A handful of samples as batches: through a small data set of their own, so that they go the way of all data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipelines.dataset import commit_shard, open_dataset, write_dataset
from data_pipelines.loader import build_eval_loader
from data_pipelines.shard import Sample
from pretrain.config import Config


def sample_batches(
    config: Config, tokenizer: Any, samples: Sequence[Sample], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Batches of the evaluation loader over `samples`, each with the places in `samples` that its rows have.

    Args:
        config: the run's settings.
        tokenizer: its tokenizer.
        samples: what to load.
        batch_size: samples a batch; the last one is filled up with rows of weight 0, which have no place.
    """
    if not samples:
        return
    with tempfile.TemporaryDirectory(prefix="triptych-samples-") as folder:
        # Keys of data sets that were not made here may come twice, and a shard would join them into one sample.
        numbered = [replace(sample, key=f"{place:08d}") for place, sample in enumerate(samples)]
        write_dataset(Path(folder), "samples", [commit_shard(numbered, Path(folder), "shards/samples.tar")])
        data = config.data.model_copy(update={"num_workers": 0})
        # A sample that does not decode is noted in the run's folder, which may be another machine's.
        here = config.model_copy(update={"data": data, "run": config.run.model_copy(update={"dir": folder})})
        for batch in build_eval_loader(here, open_dataset(folder), tokenizer, 0, 1, batch_size):
            real = [key for key, weight in zip(batch["keys"], batch["weight"].tolist(), strict=True) if weight > 0]
            yield [int(key) for key in real], batch

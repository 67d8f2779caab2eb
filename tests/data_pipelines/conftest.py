"""Datasets of small real samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.dataset import commit_shard, write_dataset
from data_pipelines.shard import Sample
from tests.data_pipelines.tuples import tuple_sample


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Write a dataset of `sizes` samples a shard; `sample(number)` makes each one."""

    def make(
        name: str = "dataset",
        sizes: tuple[int, ...] = (10, 10),
        sample: Callable[[int], Sample] = tuple_sample,
    ) -> Path:
        folder = tmp_path / name
        starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        entries = [
            commit_shard(map(sample, range(start, end)), folder, f"shards/{name}-{number:06d}.tar")
            for number, (start, end) in enumerate(zip(starts, starts[1:], strict=False))
        ]
        write_dataset(folder, name, entries)
        return folder

    return make

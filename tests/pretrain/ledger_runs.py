"""Runs reduced to what they consume, for tests of the ledger: small datasets of texts, and no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.dataset import Dataset, commit_shard, write_dataset
from data_pipelines.sequence import SampleSequence
from data_pipelines.shard import Sample
from pretrain.consumption import data_facts
from pretrain.cursor import Cursor
from pretrain.ledger import FORMAT_VERSION, LedgerWriter, Outcome, id_checksums

BATCH = 8


def text_datasets(folder: Path) -> None:
    """Write `a` of 37 samples in three shards and `b` of 21 in one."""
    for name, sizes in (("a", (20, 5, 12)), ("b", (21,))):
        starts = np.cumsum([0, *sizes]).tolist()
        shards = [
            commit_shard(
                [Sample(key=f"{name}-{i:02d}", text=f"{name} {i}") for i in range(first, last)],
                folder / name,
                f"shards/{name}-{number}.tar",
            )
            for number, (first, last) in enumerate(zip(starts, starts[1:], strict=False))
        ]
        write_dataset(folder / name, name, shards)


@dataclass
class Run:
    """A run reduced to what it consumes: it writes the ledger as the trainer does."""

    run_dir: Path
    sources: list[Dataset]
    weights: list[float] = field(default_factory=lambda: [1.0])
    tail: Any = "wrap"
    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    done: list[tuple[int, int, Outcome]] = field(default_factory=list)
    """What an observer who forgets what is undone has seen: (step, batch, outcome)."""

    def start(self, state: dict[str, Any] | None = None, change: bool = False) -> dict[str, Any]:
        """Begin, or go on from the state of a checkpoint; returns the data's state."""
        self.sequence = SampleSequence(self.sources, self.weights, 3, BATCH, 720, 4096, self.tail)
        if state is not None:
            self.sequence.resume(state["data"], change)
            self.step = state["step"]
            self.cursor.resume(state)
            self.done = [each for each in self.done if each[0] <= self.step]
        data = data_facts(self.sources, self.sequence.state(self.cursor.batch), 720)
        self.writer = LedgerWriter(self.run_dir)
        self.writer.begin("start", self.step, self.cursor.batch, format_version=FORMAT_VERSION, world_size=1, data=data)
        return data

    def steps(self, count: int, outcome: Outcome = Outcome.TRAINED) -> None:
        for number in [number for numbers in self.cursor.ranges(count) for number in numbers]:
            left = self.cursor.consume(number)
            self.step += 1
            for batch in left:
                self._add(batch, 0, Outcome.PASSED_OVER)
            self._add(number, int(id_checksums(self.sequence.batch(number).index)), outcome)

    def roll_back(self, state: dict[str, Any], guilty: Sequence[int]) -> None:
        self.cursor.go_back(state["batch"], guilty)
        self.step = state["step"]
        self.done = [each for each in self.done if each[0] <= self.step]
        self.writer.begin("roll_back", self.step, self.cursor.batch, passed_over=list(guilty))

    def checkpoint(self) -> dict[str, Any]:
        self.writer.flush()
        state = {"step": self.step, **self.cursor.state(), "data": self.sequence.state(self.cursor.batch)}
        return json.loads(json.dumps(state))

    def _add(self, batch: int, checksum: int, outcome: Outcome) -> None:
        self.writer.add(self.step, batch, checksum, outcome)
        self.done.append((self.step, batch, outcome))

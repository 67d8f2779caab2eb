"""Started by test_zero.py on N ranks: train a few steps under several engines and print the losses as JSON on rank 0.

Samples are dealt in several ways: `even` deals full and text-only samples to all ranks, `apart` gives rank 0 all full
ones and rank 1 none, and `alternate` swaps the two ranks every step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.engine import prepare_environment

prepare_environment()

from pretrain.callbacks import Callback, StepRecord  # noqa: E402
from pretrain.engine import Engine  # noqa: E402
from pretrain.model.omni import OmniPretrainer  # noqa: E402
from pretrain.trainer import Trainer  # noqa: E402
from tests.pretrain.tiny import batch_of, sample, tiny_config, word_tokenizer  # noqa: E402

GLOBAL_BATCH = 8


def batches(dealing: str, rank: int, world_size: int, samples: int = 1000) -> Iterator[dict[str, Any]]:
    step = 0
    share = GLOBAL_BATCH // world_size
    while True:
        full = [2 * i for i in range(GLOBAL_BATCH // 2)]
        bare = [i + 1 for i in full]
        order = {
            "even": sorted(full + bare),
            "apart": full + bare,
            "alternate": full + bare if step % 2 else bare + full,
        }
        mine = order[dealing][rank * share : (rank + 1) * share]
        base = step * GLOBAL_BATCH % samples
        yield batch_of([sample(base + i, image=i % 2 == 0, audio=i % 2 == 0) for i in mine])
        step += 1


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.found.append({"loss": record.loss, "grad_norm": record.grad_norm or 0.0})


def train(case: dict[str, Any], folder: Path, number: int) -> list[dict[str, float]]:
    run_dir = folder / f"run-{number}"
    config = tiny_config(
        str(run_dir),
        engine={"bucket_mb": 1, **case.get("engine", {})},
        train={"max_steps": case["steps"], "warmup_steps": 2, "learning_rate": 1e-3},
        data={**tiny_config().data.model_dump(), "micro_batch": case.get("micro_batch")},
        objectives=case.get("objectives", {}),
        model={**tiny_config().model.model_dump(), **case.get("model", {})},
        checkpoint={"every_steps": 10_000, **case.get("checkpoint", {})},
    )
    engine = Engine(config)
    engine.prepare(OmniPretrainer.build(config, word_tokenizer()))
    losses = Losses()
    trainer = Trainer(config, engine, run_dir, "test", 1000, [losses], lambda step: {})
    trainer.run(batches(case["dealing"], engine.rank, engine.world_size, case.get("samples", 1000)))
    return losses.found


if __name__ == "__main__":
    cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    # accelerate keeps one DeepSpeed state a process, so every engine gets a process of its own: one case a start.
    found = train(cases, folder, 0)
    if os.environ["RANK"] == "0":
        print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)

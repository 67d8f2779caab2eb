"""Started by test_zero.py on N ranks: train a few steps under several engines and print the losses as JSON on rank 0.

Samples are dealt in several ways: `even` deals full and text-only samples to all ranks, `apart` gives rank 0 all full
ones and rank 1 none, and `alternate` swaps the two ranks every step. `poison` [rank, steps] makes the caption loss
of that rank's batch NaN in those steps.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.engine import prepare_environment

prepare_environment()

from pretrain.callbacks import Callback, StepRecord  # noqa: E402
from pretrain.engine import Engine  # noqa: E402
from pretrain.model.omni import OmniPretrainer  # noqa: E402
from pretrain.trainer import LimitPassed, Trainer  # noqa: E402
from tests.pretrain.tiny import batch_of, sample, tiny_config, word_tokenizer  # noqa: E402

GLOBAL_BATCH = 8


def batches(
    dealing: str, rank: int, world_size: int, samples: int = 1000, poison: tuple[int, list[int]] = (0, [])
) -> Iterator[dict[str, Any]]:
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
        batch = batch_of([sample(base + i, image=i % 2 == 0, audio=i % 2 == 0) for i in mine])
        step += 1
        yield {**batch, "poisoned": rank == poison[0] and step in poison[1]}


def poisoned(model: OmniPretrainer, arguments: Any, output: Any) -> Any:
    return replace(output, text=output.text * math.nan) if arguments[0]["poisoned"] else output


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.found.append({"loss": record.loss, "grad_norm": record.grad_norm or 0.0, "skipped": record.skipped})


def train(case: dict[str, Any], folder: Path, number: int) -> list[dict[str, Any]]:
    run_dir = folder / f"run-{number}"
    config = tiny_config(
        str(run_dir),
        engine={"bucket_mb": 1, **case.get("engine", {})},
        train={"max_steps": case["steps"], "warmup_steps": 2, "learning_rate": 1e-3, **case.get("train", {})},
        data={**tiny_config().data.model_dump(), "micro_batch": case.get("micro_batch")},
        objectives=case.get("objectives", {}),
        model={**tiny_config().model.model_dump(), **case.get("model", {})},
        checkpoint={"every_steps": 10_000, **case.get("checkpoint", {})},
        watch=case.get("watch", {}),
    )
    engine = Engine(config)
    model = OmniPretrainer.build(config, word_tokenizer())
    model.register_forward_hook(poisoned)
    engine.prepare(model)
    losses = Losses()
    trainer = Trainer(config, engine, run_dir, "test", 1000, [losses], lambda step: {})
    poison = case.get("poison", (0, []))
    try:
        trainer.run(batches(case["dealing"], engine.rank, engine.world_size, case.get("samples", 1000), poison))
    except LimitPassed as error:
        losses.found.append({"stopped": str(error)})
    return losses.found


if __name__ == "__main__":
    cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    # accelerate keeps one DeepSpeed state a process, so every engine gets a process of its own: one case a start.
    found = train(cases, folder, 0)
    if os.environ["RANK"] == "0":
        print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)

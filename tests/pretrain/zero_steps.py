"""Started by test_zero.py on N ranks: train a few steps under several engines and print the losses as JSON on rank 0.

Samples are dealt in several ways: `even` deals full and text-only samples to all ranks, `apart` gives rank 0 all full
ones and rank 1 none, and `alternate` swaps the two ranks every step. `poison` [rank, steps] makes the caption loss of
that rank's share NaN in those steps; `poisons` [[rank, step, how]...] does as `poison.py` says. A step stands for its
batch here. `dirty` has torch fill memory that nobody has written yet with NaN.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.engine import prepare_environment

prepare_environment()

import torch  # noqa: E402

from pretrain.callbacks import Callback, StepRecord  # noqa: E402
from pretrain.callbacks.ledger import LedgerKeeper  # noqa: E402
from pretrain.callbacks.logs import Console, MetricsFile  # noqa: E402
from pretrain.engine import Engine  # noqa: E402
from pretrain.model.omni import OmniPretrainer  # noqa: E402
from pretrain.trainer import LimitPassed, Trainer  # noqa: E402
from tests.pretrain.poison import POISONS  # noqa: E402
from tests.pretrain.tiny import batch_of, sample, tiny_config, word_tokenizer  # noqa: E402

GLOBAL_BATCH = 8


def batches(case: dict[str, Any], rank: int, world_size: int, numbers: range) -> Iterator[dict[str, Any]]:
    share = GLOBAL_BATCH // world_size
    poison = case.get("poison", (0, []))
    poisons = [*case.get("poisons", []), *([poison[0], step, "loss"] for step in poison[1])]
    for step in numbers:
        full = [2 * i for i in range(GLOBAL_BATCH // 2)]
        bare = [i + 1 for i in full]
        order = {
            "even": sorted(full + bare),
            "apart": full + bare,
            "alternate": full + bare if step % 2 else bare + full,
        }
        mine = order[case["dealing"]][rank * share : (rank + 1) * share]
        base = step * GLOBAL_BATCH % case.get("samples", 1000)
        batch = batch_of([sample(base + i, image=i % 2 == 0, audio=i % 2 == 0) for i in mine])
        yield {**batch, "step": step, "poisons": [how for *where, how in poisons if where == [rank, step + 1]]}


def poisoned(model: OmniPretrainer, arguments: Any, output: Any) -> Any:
    for how in arguments[0]["poisons"]:
        output = replace(output, text=POISONS[how](output.text))
    return output


class Losses(Callback):
    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        numbers = {"step": record.step, "batch": record.batch, "loss": record.loss, "skipped": record.skipped}
        self.found.append({**numbers, "grad_norm": record.grad_norm or 0.0})


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
    torch.use_deterministic_algorithms(case.get("dirty", False), warn_only=True)
    model = OmniPretrainer.build(config, word_tokenizer())
    model.register_forward_hook(poisoned)
    engine.prepare(model)
    losses = Losses()
    run_dir.mkdir(parents=True, exist_ok=True)
    callbacks = [losses, LedgerKeeper(run_dir, {}), MetricsFile(run_dir / "metrics.jsonl"), Console(1)]
    trainer = Trainer(config, engine, run_dir, "test", 1000, callbacks, lambda step: {})
    try:
        trainer.run(functools.partial(batches, case, engine.rank, engine.world_size))
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

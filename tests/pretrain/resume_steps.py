"""Started by the resume tests on N ranks: `pretrain.train` itself, watched closely, and killed where the test says.

Each rank writes below RUN/observed/ what it saw: a line a step with the loss, the batch, the sample keys and a draw of
every random generator, and a line with hashes of the whole weights and moments at the steps asked for, at the start of
each process that resumed, and at the end, where the generators' states are hashed too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.loader import TrainLoader
from pretrain import train
from pretrain.callbacks import StepRecord, logs
from pretrain.checkpoint import _generators
from pretrain.trainer import Trainer

KEYS: dict[int, list[str]] = {}
_batches = TrainLoader.batches


def seen_batches(self: TrainLoader, numbers: range) -> Iterator[dict[str, Any]]:
    for batch in _batches(self, numbers):
        KEYS[batch["step"]] = list(batch["keys"])
        yield batch


class Observer(logs.MetricsFile):
    case: dict[str, Any] = {}

    def on_start(self, trainer: Trainer) -> None:
        super().on_start(trainer)
        folder = trainer.run_dir / "observed"
        folder.mkdir(exist_ok=True)
        self.file = (folder / f"rank-{trainer.engine.rank}.jsonl").open("a", buffering=1)
        if trainer.step:
            self.write(start=trainer.step, state=whole_state(trainer))

    def write(self, **what: Any) -> None:
        self.file.write(json.dumps(what) + "\n")

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        super().on_step(trainer, record)
        self.write(
            step=record.step,
            batch=record.batch,
            loss=record.loss,
            loss_hex=record.loss_hex,
            grad_norm=record.grad_norm,
            lr=record.lr,
            keys=KEYS[record.batch],
            random=draws(),
        )
        if record.step in self.case.get("hash_at", ()):
            self.write(hashed=record.step, state=whole_state(trainer))
        if record.step == self.case.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_end(self, trainer: Trainer) -> None:
        super().on_end(trainer)
        states = {name: sha(value) for name, value in _generators(trainer.engine.device).items()}
        optimizer = trainer.engine.module.optimizer
        groups = [(group["weight_decay"], group["betas"]) for group in optimizer.param_groups]
        clip = getattr(optimizer, "clip_grad", None)
        self.write(end=trainer.step, state=whole_state(trainer), generators=states, groups=groups, clip=clip)


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))]


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def whole_state(trainer: Trainer) -> dict[str, str]:
    """Hashes of the model's weights as computed with, the master weights and the moments, through DeepSpeed's own API.

    Padding and cuts do not count, so that they are the same under every stage and number of ranks.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = trainer.engine.module
    zero = hasattr(engine.optimizer, "optimizer")
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links the moments when the first group is updated, and those of the others are not there yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    whole = hashlib.sha256()
    moments = hashlib.sha256()
    steps = set()
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if zero else parameter
        whole.update(f"{name} {sha(master)} ".encode())
        for key in ("exp_avg", "exp_avg_sq"):
            if zero:
                moment = safe_get_full_optimizer_state(parameter, key)
            else:
                moment = engine.optimizer.state.get(parameter, {}).get(key, torch.zeros_like(parameter))
            moments.update(f"{name} {key} {sha(moment)} ".encode())
    inner = engine.optimizer.optimizer if zero else engine.optimizer
    steps = {float(state["step"]) for state in inner.state.values() if "step" in state}
    return {"weights": whole.hexdigest()[:16], "moments": moments.hexdigest()[:16], "steps": repr(steps)}


def observed(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What a rank wrote, every process of it."""
    return [json.loads(line) for line in (run / "observed" / f"rank-{rank}.jsonl").read_text().splitlines()]


def steps_of(run: Path, rank: int = 0) -> dict[int, dict[str, Any]]:
    """The lines of the steps that count: of a step that was done twice, the last one."""
    return {line["step"]: line for line in observed(run, rank) if "step" in line}


if __name__ == "__main__":
    Observer.case = json.loads(sys.argv[2])
    logs.MetricsFile = Observer  # type: ignore[misc]
    TrainLoader.batches = seen_batches  # type: ignore[method-assign]
    arguments = [sys.argv[1], *Observer.case.get("arguments", [])]
    for override in Observer.case.get("set", []):
        arguments += ["--set", override]
    status = train.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

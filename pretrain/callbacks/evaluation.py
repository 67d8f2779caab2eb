"""Evaluate during the run and at its end; results go to `eval/`, and to TensorBoard where it is on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.atomic import atomic_file
from pretrain.callbacks import Callback, StepRecord
from pretrain.evaluate import evaluate, summary_line

if TYPE_CHECKING:
    from data_pipelines.dataset import Dataset
    from pretrain.trainer import Trainer


class Left(Exception):
    """The evaluation was left, on all ranks before the same batch, because somebody asked the run to stop."""


class Evaluation(Callback):
    """Runs `evaluate` on all ranks every `evaluation.every_steps` steps and after the last step.

    A request to stop does not wait for its end, which may be later than the job's: it is left without results.
    The first dataset's results are the run's; those of further ones stand under `more`, by name.
    """

    def __init__(self, datasets: Sequence[Dataset], tokenizer: Any) -> None:
        self._datasets = datasets
        self._tokenizer = tokenizer

    def on_start(self, trainer: Trainer) -> None:
        """Catch up on the last evaluation where a run was ended between its last checkpoint and that."""
        last = trainer.config.train.max_steps
        done = trainer.engine.gather_objects(_result_file(trainer, last).exists())[0]
        if trainer.step == last and not done:
            self._evaluate(trainer)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        every = trainer.config.evaluation.every_steps
        if record.step == trainer.config.train.max_steps or (every and record.step % every == 0):
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        config, engine = trainer.config, trainer.engine

        def before_batch() -> None:
            trainer.pulse.beat("evaluate", trainer.step)
            if trainer.asked_to_stop():
                raise Left

        engine.module.eval()
        try:
            results, *others = [
                evaluate(
                    engine.model,
                    config,
                    dataset,
                    self._tokenizer,
                    rank=engine.rank,
                    world_size=engine.world_size,
                    device=engine.device,
                    before_batch=before_batch,
                )
                for dataset in self._datasets
            ]
        except Left:
            if engine.is_main:
                print(f"the evaluation at step {trainer.step} was left without results", file=sys.stderr, flush=True)
            return
        finally:
            engine.module.train()
        if others:
            results["more"] = {dataset.name: found for dataset, found in zip(self._datasets[1:], others, strict=True)}
        results["step"] = trainer.step
        if engine.is_main:
            path = _result_file(trainer, trainer.step)
            _write(path, results)
            _write(path.with_name("results.json"), results)
            print(f"evaluation at step {trainer.step}: {summary_line(results)}", file=sys.stderr, flush=True)


def _result_file(trainer: Trainer, step: int) -> Path:
    return trainer.run_dir / "eval" / f"step-{step:08d}.json"


def _write(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())

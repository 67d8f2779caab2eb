"""Started by the tests of this folder: a rank that trains a small model and saves often.

    saving_rank RUN_DIR CASE     CASE is JSON: {steps, every_steps, keep_last, on_failure, mutation}

After its first checkpoint is whole it writes `ready-RANK.json` beside the run directory, with the number of the thread
that writes checkpoints, and waits there for a file `go`. `mutation` breaks the protocol in one place, to show that the
tests would see it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.engine import prepare_environment

prepare_environment()

from data_pipelines.atomic import atomic_file  # noqa: E402
from pretrain import checkpoint  # noqa: E402
from pretrain.callbacks import Callback, StepRecord  # noqa: E402
from pretrain.callbacks.logs import MetricsFile  # noqa: E402
from pretrain.checkpoint import commit, saver, writer  # noqa: E402
from pretrain.engine import Engine  # noqa: E402
from pretrain.model.omni import OmniPretrainer  # noqa: E402
from pretrain.trainer import Trainer  # noqa: E402
from tests.pretrain.tiny import batch_of, sample, tiny_config, word_tokenizer  # noqa: E402

GLOBAL_BATCH = 8


class ReadyAndWait(Callback):
    """After the first checkpoint, say so and wait to be told to go on."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._ready, self._go = run_dir.parent / f"ready-{rank}.json", run_dir.parent / "go"
        self.waited = False

    def on_checkpoint(self, trainer: Trainer, path: Any) -> None:
        if self.waited:
            return
        self.waited = True
        thread = next(one for one in threading.enumerate() if one.name == "checkpoint")
        with atomic_file(self._ready) as file:
            file.write(json.dumps({"pid": os.getpid(), "thread": thread.native_id}).encode())
        while not self._go.exists():
            time.sleep(0.005)


class Slowly(Callback):
    """Leaves the disk and the tests time between two steps."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        time.sleep(0.02)


def batches(rank: int, world_size: int, numbers: range) -> Iterator[dict[str, Any]]:
    for step in numbers:
        samples = range(step * GLOBAL_BATCH + rank, (step + 1) * GLOBAL_BATCH, world_size)
        yield {**batch_of([sample(i) for i in samples]), "step": step}


def break_protocol(how: str | None) -> None:
    """Take one part of the protocol away, in this process alone."""
    if how == "no fsync":
        os.fsync = lambda descriptor: None
    elif how == "no room check":
        saver.lack_of_room = lambda run_dir, needed: None
    elif how == "name first":
        whole = commit.MANIFEST

        def in_place(work: Path, run_dir: Path, manifest: Any) -> Path:
            writer.write_files(work, {whole: writer.Bytes(json.dumps(manifest).encode())}, rank=0)
            return work

        saver.temporary_folder = checkpoint.folder_of
        saver.commit = in_place
    elif how is not None:
        raise ValueError(how)


def main(run_dir: Path, case: dict[str, Any]) -> None:
    config = tiny_config(
        str(run_dir),
        train={"max_steps": case.get("steps", 12), "warmup_steps": 2},
        checkpoint={
            "every_steps": case.get("every_steps", 2),
            "keep_last": case.get("keep_last", 1),
            "on_failure": case.get("on_failure", "continue"),
        },
    )
    engine = Engine(config)
    engine.prepare(OmniPretrainer.build(config, word_tokenizer()))
    run_dir.mkdir(parents=True, exist_ok=True)
    callbacks = [MetricsFile(run_dir / "metrics.jsonl"), Slowly(), ReadyAndWait(run_dir, engine.rank)]
    break_protocol(case.get("mutation"))
    trainer = Trainer(config, engine, run_dir, "faults", 1000, callbacks, lambda step: {})
    try:
        trainer.run(functools.partial(batches, engine.rank, engine.world_size))
    except checkpoint.SaveFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)

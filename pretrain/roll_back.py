"""Back to the last checkpoint within the run, to go on without the batches that did harm.

It is what ending the process and resuming would do, and as exact: weights, moments, generators and the watch's memory
are the checkpoint's. What stays is the number of roll-backs and the batches that are passed over, also by an earlier
roll-back to the same checkpoint. A run that is killed afterwards, before it saves again, comes to the same decisions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pretrain import checkpoint

if TYPE_CHECKING:
    from pretrain.trainer import Trainer


def roll_back(trainer: Trainer, guilty: int) -> Path | None:
    """Reload the newest valid checkpoint of this history and pass over batch `guilty` and those around it.

    All ranks call it. Returns the checkpoint, or None, with nothing changed, where there is none to go back to.
    """
    trainer.finish_saving()
    path = trainer.engine.gather_objects(_newest_valid(trainer.committed) if trainer.engine.is_main else None)[0]
    if path is None:
        return None
    state = checkpoint.read_state(path)
    checkpoint.load(trainer.engine, path, trainer.run_dir)
    times = trainer.watch.roll_backs + 1
    trainer.watch.resume(state["watch"])
    trainer.watch.roll_backs = times
    trainer.step = int(state["step"])
    batch = int(state.get("batch", trainer.step))
    around = trainer.config.watch.pass_over_around
    trainer.cursor.go_back(batch, range(max(batch, guilty - around), guilty + around + 1))
    return Path(path)


def _newest_valid(committed: list[Path]) -> Path | None:
    for path in reversed(committed):
        if path.is_dir() and checkpoint.verify(path) is None:
            return path
    return None

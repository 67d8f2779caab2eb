"""Back to the last checkpoint within the run, to go on without the batches that did harm.

It is what ending the process and resuming would do, and as exact: weights, moments, generators and the watch's memory
are the checkpoint's. What stays is the number of roll-backs and the batches that are passed over, also by an earlier
roll-back to the same checkpoint. A run that is killed afterwards, before it saves again, comes to the same decisions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain import checkpoint
from pretrain.changes import differences
from pretrain.checkpoint.verification import verify_together

if TYPE_CHECKING:
    from pretrain.trainer import Trainer


def roll_back(trainer: Trainer, guilty: int) -> Path | None:
    """Reload the newest valid checkpoint of this history and pass over batch `guilty` and those around it.

    All ranks call it. Returns the checkpoint, or None, with nothing changed, where there is none to go back to.
    """
    trainer.finish_saving()
    path = _newest_valid(trainer)
    if path is None:
        return None
    state = checkpoint.read_state(path)
    checkpoint.load(trainer.engine, path, trainer.run_dir, trainer.pulse.tick)
    times = trainer.watch.roll_backs + 1
    trainer.watch.resume(state["watch"])
    trainer.watch.forget(each.field for each in differences(state["config"], trainer.config))
    trainer.watch.roll_backs = times
    trainer.step = int(state["step"])
    batch = int(state.get("batch", trainer.step))
    around = trainer.config.watch.pass_over_around
    trainer.cursor.go_back(batch, range(max(batch, guilty - around), guilty + around + 1))
    return path


def _newest_valid(trainer: Trainer) -> Path | None:
    """Of the checkpoints that this run may go back to; the ranks share the bytes to verify, as on a resume."""
    engine = trainer.engine
    for path in reversed(trainer.committed):
        if not engine.gather_objects(path.is_dir())[0]:
            # Removed since, as an older one than those that are kept.
            continue
        reason = verify_together(engine, path)
        trainer.pulse.tick()
        if reason is None:
            return path
        if engine.is_main:
            print(f"passed over {path}: {reason}", file=sys.stderr, flush=True)
    return None

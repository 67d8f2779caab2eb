"""DeepSpeed's files of a rank, taken from its `save_checkpoint` before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

Take = Callable[[Path, dict[str, Any]], None]
"""Path that DeepSpeed would write, and what it would write there; both are frozen before it returns."""


class ZeroFiles(CheckpointEngine):  # type: ignore[misc]
    """Stands where DeepSpeed's writer of checkpoints stands. It touches no disk to save, and loads weights-only."""

    def __init__(self, take: Take) -> None:
        super().__init__()
        self.name = type(self).__name__
        self._take = take

    def create(self, info: Any) -> None:
        """DeepSpeed is about to save."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The thread that writes makes the folders."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Freeze a file."""
        self._take(Path(path), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file of a verified checkpoint; only the classes that were allowed are unpickled."""
        return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: Any) -> bool:
        """DeepSpeed has handed out all files."""
        return True

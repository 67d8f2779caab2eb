"""Checkpoints that exist only when whole, written while training goes on.

`saver` is the protocol as the loop sees it: the ranks' state is copied to host memory (`snapshot`), a thread of each
rank writes, hashes and fsyncs its files (`writer`), and when all have said that theirs are written, the thread of rank
0 adds `MANIFEST.json`, fsyncs the folders, renames `.tmp-step-N.<id>` to `step-N`, fsyncs the parent, moves the
`latest` hint and only then lets old ones go (`commit`, `retention`). Valid means: the manifest parses, every file that
it lists is there with its size and SHA-256, and nothing else is (`manifest`, `verification`). Resume takes the newest
valid one and says which it passed over and why (`loading`). Nothing in a checkpoint is unpickled: weights load
weights-only, generators are safetensors, the rest is JSON.

What only looks at checkpoints imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.manifest import FORMAT_VERSION, MANIFEST, Found, folder_of, read_manifest
from pretrain.checkpoint.verification import find_latest, list_checkpoints, verify

if TYPE_CHECKING:
    from pretrain.checkpoint.loading import load as load
    from pretrain.checkpoint.loading import read_state as read_state
    from pretrain.checkpoint.saver import Saved as Saved
    from pretrain.checkpoint.saver import SaveFailed as SaveFailed
    from pretrain.checkpoint.saver import Saver as Saver
    from pretrain.checkpoint.saver import save as save

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "Found",
    "SaveFailed",
    "Saved",
    "Saver",
    "find_latest",
    "folder_of",
    "list_checkpoints",
    "load",
    "read_manifest",
    "read_state",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("load", "read_state"):
        from pretrain.checkpoint import loading

        return getattr(loading, name)
    if name in ("Saved", "SaveFailed", "Saver", "save"):
        from pretrain.checkpoint import saver

        return getattr(saver, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

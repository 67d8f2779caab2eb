"""Which folder is what: runs, exports, and the names within an export. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipelines.errors import BadInput

HEADS_FOLDER = "pretrain_heads"
TRAINING_CONFIG = "training_config.yaml"
EXPORT_MANIFEST = "MANIFEST.json"
REFERENCE = "eval/reference.json"
RESULTS = "eval/results.json"
PROBE_IMAGE, PROBE_AUDIO = "eval/probe.png", "eval/probe.wav"
FORMAT_VERSION = 1
"""Of the manifest and of the reference values."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def is_export(folder: Path) -> bool:
    """Whether a folder is an export of ours."""
    return (folder / "config.json").is_file() and (folder / TRAINING_CONFIG).is_file()


def check_run(folder: Path) -> None:
    """Raise `BadInput` unless a folder is a run directory."""
    if not is_run(folder):
        raise BadInput(f"{folder}: not a run directory (no config.yaml with checkpoints/ beside it)")


def check_free(out: Path) -> None:
    """Raise `BadInput` when something is at `out` that an export would have to overwrite."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"--out {out}: exists and is not empty; choose another folder or remove it")


def exported_step(folder: Path) -> int | None:
    """Optimizer steps behind an export; None where it does not say."""
    try:
        step = json.loads((folder / HEADS_FOLDER / "config.json").read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None

"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    """`error` would stop a run; `warning` makes it slower or riskier."""
    found: str
    advice: str = ""
    """What to do; empty where all is well."""


def ok(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", found)


def warning(name: str, found: str, advice: str) -> Finding:
    """A run would work, but."""
    return Finding(name, "warning", found, advice)


def error(name: str, found: str, advice: str) -> Finding:
    """A run would not work."""
    return Finding(name, "error", found, advice)


def size(num_bytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"

"""Amounts as people read them, with three digits where they count."""

from __future__ import annotations


def amount(num_bytes: float) -> str:
    """Bytes."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    digits = 1 if num_bytes < 100 and unit in ("GB", "TB") else 0
    return f"{num_bytes:,.{digits}f} {unit}"


def count(number: float) -> str:
    """How many."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Time."""
    for unit, scale in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    if seconds == 0:
        return "0 s"
    if seconds >= 10:
        return f"{seconds:.0f} s"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2g} ms"

"""Curves out of block characters, one or more rows high."""

from __future__ import annotations

from collections.abc import Sequence

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def sparkline(
    values: Sequence[float | None], width: int, height: int = 1, low: float | None = None, high: float | None = None
) -> list[str]:
    """`height` lines of `width` characters, top first; empty places where there are no values.

    Each column is the mean of the values that fall into it, so the picture does not depend on where values were cut.

    Args:
        values: at even distances; None is a gap.
        width: columns. Fewer values than that are drawn as wide as they go, at the left.
        height: rows.
        low: value at the bottom; by default the smallest column.
        high: value at the top; by default the largest column.
    """
    columns = column_means(values, width)
    known = [value for value in columns if value is not None]
    if not known or width < 1:
        return [" " * width] * height
    bottom = min(known) if low is None else low
    top = max(known) if high is None else high
    # An eighth stays free, or curves below each other would run into one another.
    steps = height * 8 - 1
    rows = [""] * height
    for value in columns:
        level = 0
        if value is not None:
            share = 0.5 if top <= bottom and low is None else (value - bottom) / ((top - bottom) or 1.0)
            # What is there shows, also at the bottom.
            level = max(1, min(steps, round(share * (steps - 1)) + 1))
        for row in range(height):
            rows[row] += _EIGHTHS[max(0, min(8, level - 8 * (height - 1 - row)))]
    return [row.ljust(width) for row in rows]


def column_means(values: Sequence[float | None], width: int) -> list[float | None]:
    """The mean of the values of each of `width` equal parts; the values themselves where there are no more."""
    if len(values) <= width:
        return list(values)
    found: list[float | None] = []
    for column in range(width):
        part = values[len(values) * column // width : len(values) * (column + 1) // width]
        known = [value for value in part if value is not None]
        found.append(sum(known) / len(known) if known else None)
    return found

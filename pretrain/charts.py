"""Line charts as inline SVG: pictures for a page that may ask nobody else for anything.

Colours are CSS variables of the page (`--series`, `--ink`, `--grid`), so one drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 420, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 26
_MAX_POINTS = 400


def line_chart(steps: Sequence[float], values: Sequence[float], label: str, unit: str = "") -> Markup:
    """One series over steps: every point faintly, and their running mean as a line.

    Args:
        steps: x, increasing.
        values: y; values that are not finite are left out.
        label: what a screen reader says, and what the pointer shows.
        unit: put after the values that are named.
    """
    points = [(x, y) for x, y in zip(steps, values, strict=True) if math.isfinite(y)]
    if not points:
        return Markup('<p class="quiet">no values</p>')
    xs = np.array([x for x, _ in points], dtype=float)
    ys = np.array([y for _, y in points], dtype=float)
    smooth = running_mean(ys, max(1, len(ys) // 40))
    low, high = float(ys.min()), float(ys.max())
    ticks = nice_ticks(min(low, 0.0) if low < 0.4 * high else low, high)
    bottom, top = min(ticks[0], low), max(ticks[-1], high)

    def place(x: float, y: float) -> str:
        across = (x - xs[0]) / ((xs[-1] - xs[0]) or 1)
        up = (y - bottom) / ((top - bottom) or 1)
        px = _LEFT + across * (WIDTH - _LEFT - _RIGHT)
        py = HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)
        return f"{px:.1f},{py:.1f}"

    keep = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), _MAX_POINTS)).astype(int))
    raw = " ".join(place(xs[i], ys[i]) for i in keep)
    mean = " ".join(place(xs[i], smooth[i]) for i in keep)
    parts = []
    for tick in ticks:
        y = place(xs[0], tick).split(",")[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" dy="0.32em" text-anchor="end">{tick:g}</text>')
    for x in nice_ticks(xs[0], xs[-1], 4):
        if xs[0] <= x <= xs[-1]:
            px = place(x, bottom).split(",")[0]
            parts.append(f'<text x="{px}" y="{HEIGHT - 8}" text-anchor="middle">{x:g}</text>')
    last = place(xs[-1], smooth[-1]).split(",")
    title = Markup.escape(f"{label}: {smooth[-1]:.4g}{unit} at step {xs[-1]:g}")
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}"><title>{title}</title>'
        f'{"".join(parts)}<polyline class="raw" points="{raw}"/><polyline class="mean" points="{mean}"/>'
        f'<circle class="last" cx="{last[0]}" cy="{last[1]}" r="3"/></svg>'
    )


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place; fewer at the beginning."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low..high."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]

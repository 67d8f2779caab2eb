"""Charts as inline SVG, which a small script of the page lets the pointer read.

Colours are CSS variables of the page, so one drawing serves light and dark. Without the script everything is there but
the numbers under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from launch.report.curves import Curve, Floats

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 22
# Of the values, those above this quantile may be cut off where they would flatten all others.
_SHOWN_QUANTILE = 0.995


@dataclass(frozen=True)
class Chart:
    """A drawn chart, and what the page's script needs to read it."""

    title: str
    unit: str
    svg: Markup
    latest: str
    note: str
    wide: bool
    data: dict[str, object]
    """`x, y, low, high` of the points, and the `box` that they lie in: `[left, right, top, bottom]`, in the drawing's
    own units, with the steps at its sides."""


def chart(
    curve: Curve | None,
    title: str,
    unit: str = "",
    *,
    marks: Sequence[tuple[float, str]] = (),
    log: float | None = None,
    zero: bool = False,
    percent: bool = False,
    wide: bool = False,
    first_step: float = 0.0,
    last_step: float | None = None,
) -> Chart | None:
    """A curve over steps: the spread of the values faintly, and their running mean as a line.

    Args:
        curve: what to draw; None draws nothing.
        title: what it is.
        unit: of the values.
        marks: steps to mark with a line, and the class of the line.
        log: a logarithmic scale where the values spread over more than this factor.
        zero: have the scale begin at 0.
        percent: values are shares, written in percent.
        wide: twice as wide.
        first_step, last_step: what the chart spans; by default the curve.

    Returns:
        The chart, or None without values.
    """
    if curve is None or not len(curve.steps):
        return None
    width, height = (1140, 260) if wide else (270, 165)
    positive = curve.low[curve.low > 0]
    in_log = bool(log and len(positive) == len(curve.low) and float(curve.high.max() / positive.min()) > log)
    scale: Callable[[Floats], Floats] = np.log10 if in_log else lambda values: values
    smooth, low, high = scale(curve.smooth), scale(curve.low), scale(curve.high)
    top_shown = max(float(np.quantile(high, _SHOWN_QUANTILE)), float(smooth.max()))
    # A cut is worth it only where what lies above would squeeze the rest into less than half of the height.
    bottom_value = 0.0 if zero and not in_log else float(low.min())
    reach = bottom_value + 2 * (top_shown - bottom_value)
    top_value = float(high[high <= reach].max()) if float(high.max()) > reach else float(high.max())
    above = int((high > top_value).sum())
    ticks = log_ticks(bottom_value, top_value) if in_log else nice_ticks(bottom_value, top_value)
    bottom, top = min(ticks[0], bottom_value), max(ticks[-1], top_value)
    start = min(first_step, float(curve.steps[0])) if last_step is not None else float(curve.steps[0])
    end = float(curve.steps[-1]) if last_step is None else max(last_step, float(curve.steps[-1]))

    def across(steps: Floats) -> Floats:
        return _LEFT + (steps - start) / ((end - start) or 1.0) * (width - _LEFT - _RIGHT)

    def up(values: Floats) -> Floats:
        share = np.clip((values - bottom) / ((top - bottom) or 1.0), 0.0, 1.0)
        return height - _BOTTOM - share * (height - _TOP - _BOTTOM)

    def text(value: float) -> str:
        return _percent(value) if percent else _plain(10**value if in_log else value)

    parts = [_grid(ticks, lambda value: float(up(np.array(value))), width, text)]
    for tick in nice_ticks(start, end, 8 if wide else 3):
        if start <= tick <= end:
            x = float(across(np.array(tick)))
            parts.append(f'<text x="{x:.1f}" y="{height - 7}" text-anchor="middle">{_count(tick)}</text>')
    for step, kind in marks:
        if start <= step <= end:
            x = float(across(np.array(step)))
            parts.append(f'<line class="mark {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
    points = across(curve.steps)
    if curve.thinned:
        outline = [*_points(points, up(high)), *reversed(_points(points, up(low)))]
        parts.append(f'<polygon class="spread" points="{" ".join(outline)}"/>')
    else:
        parts.append(f'<polyline class="raw" points="{" ".join(_points(points, up(high)))}"/>')
    parts.append(f'<polyline class="mean" points="{" ".join(_points(points, up(smooth)))}"/>')
    parts.append(f'<circle class="last" cx="{points[-1]:.1f}" cy="{float(up(smooth[-1:])[0]):.1f}" r="3"/>')
    latest = text(float(smooth[-1]))
    label = Markup.escape(f"{title}: {latest}{unit and ' ' + unit} at step {curve.steps[-1]:,.0f}")
    notes = ["log scale" if wide else "log"] * in_log
    if above:
        counted = f"{above} point{'s' * (above > 1)} above, " if wide else ""
        notes.append(f"{counted}up to {text(float(high.max()))}")
    return Chart(
        title=title,
        unit=unit,
        svg=Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'),
        latest=latest,
        note=", ".join(notes),
        wide=wide,
        data={
            "x": _rounded(curve.steps, 9),
            "y": _rounded(curve.smooth),
            "low": _rounded(curve.low),
            "high": _rounded(curve.high),
            "box": [_LEFT, width - _RIGHT, _TOP, height - _BOTTOM, start, end],
            "percent": percent,
        },
    )


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low..high."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers that cover 10**low..10**high, as exponents: 1, 2, 5, 10... over two decades, else powers of ten."""
    if high - low <= 2:
        each = [
            power + math.log10(factor) for power in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5)
        ]
        first = max((place for place, tick in enumerate(each) if tick <= low + 1e-9), default=0)
        last = min((place for place, tick in enumerate(each) if tick >= high - 1e-9), default=len(each) - 1)
        return each[first : last + 1]
    start, end = math.floor(low), math.ceil(high)
    stride = max(1, math.ceil((end - start) / 5))
    return [float(tick) for tick in range(start, end + stride, stride)]


def _grid(ticks: Sequence[float], place: Callable[[float], float], width: int, text: Callable[[float], str]) -> str:
    parts = []
    for tick in ticks:
        y = place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y:.1f}" dy="0.32em" text-anchor="end">{text(tick)}</text>')
    return "".join(parts)


def _points(x: Floats, y: Floats) -> list[str]:
    return [f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def _rounded(values: Floats, digits: int = 5) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values.tolist()]


def _plain(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _count(value: float) -> str:
    """`20k`, `1.5M`: steps along an axis."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 10 or (abs(value) >= size and letter == "M"):
            return f"{value / size:g}{letter}"
    return f"{value:g}"

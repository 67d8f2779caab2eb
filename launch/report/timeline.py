"""The run over the hours: where it was when, when it stood still, what happened, as one drawing.

The line goes from step to step as they were done. Where a start went back to a checkpoint, the steps that were lost
show as a line of their own that leads nowhere; where nothing ran the ground is shaded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from launch.report.charts import nice_ticks
from launch.report.curves import Floats
from launch.status.events import Event
from launch.status.run_files import span

_WIDTH, _LEFT, _RIGHT, _TOP, _PLOT = 1140, 78, 12, 10, 190
_LANES = (("starts", ("start",)), ("faults", ("fault",)), ("odd steps", ("numbers",)), ("evaluations", ("evaluation",)))
_LANE = 20
_MAX_POINTS = 400
_MAX_MARKS = 300


@dataclass(frozen=True)
class Stretch:
    """The steps of one start of the run, or of what followed a roll-back in it."""

    start: float
    end: float
    step: int
    """Where it went on from."""
    kept: int
    """The last of its steps that counts."""
    last: int
    """The last step that it did."""


@dataclass(frozen=True)
class Timeline:
    """The drawing, and the shares that it shows."""

    svg: Markup
    seconds: float
    """From the first start to the last sign of the run."""
    running_seconds: float
    """Of these, between a start and its last step."""
    training_seconds: float
    """Of these, in steps that count."""
    lost_steps: int
    """Steps that were done and had to be done again."""


def timeline(
    steps: Floats, times: Floats, step_seconds: Floats, stretches: Sequence[Stretch], events: Sequence[Event]
) -> Timeline | None:
    """Draw a run over time; None where no time is known.

    Args:
        steps: steps that count, in order.
        times: when they were done, in seconds since 1970; as many, or none.
        step_seconds: how long each took.
        stretches: every start, oldest first.
        events: what happened, oldest first.
    """
    if not stretches or len(times) != len(steps) or not len(times):
        return None
    begin = min(stretches[0].start, float(times[0]))
    end = max(float(times[-1]), stretches[-1].end)
    top = max(float(steps[-1]), float(max(each.last for each in stretches)))
    height = _TOP + _PLOT + 8 + _LANE * len(_LANES) + 24

    def x(moment: float) -> float:
        return _LEFT + min(1.0, max(0.0, (moment - begin) / ((end - begin) or 1.0))) * (_WIDTH - _LEFT - _RIGHT)

    def y(step: float) -> float:
        return _TOP + _PLOT - step / (top or 1.0) * _PLOT

    parts: list[str] = []
    running = 0.0
    idle_from = begin
    for each in stretches:
        if x(each.start) - x(idle_from) > 0.5:
            parts.append(_box("idle", x(idle_from), _TOP, x(each.start), _TOP + _PLOT, "nothing ran"))
        running += max(0.0, each.end - each.start)
        idle_from = max(idle_from, each.end)
    for tick in nice_ticks(0.0, top, 4):
        if tick <= top * 1.02:
            place = f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {place}/>')
            parts.append(f'<text x="{_LEFT - 7}" y="{y(tick):.1f}" dy="0.32em" text-anchor="end">{tick:,g}</text>')
    lost = 0
    for number, each in enumerate(stretches):
        following = stretches[number + 1].start if number + 1 < len(stretches) else end
        inside = (steps > each.step) & (steps <= each.kept) & (times <= following + 1)
        rows = np.flatnonzero(inside)
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, _MAX_POINTS).astype(int))] if len(rows) else rows
        line = [(each.start, float(each.step)), *((float(times[row]), float(steps[row])) for row in rows)]
        parts.append(_line("mean", [(x(moment), y(step)) for moment, step in line]))
        if each.last > each.kept:
            lost += each.last - each.kept
            parts.append(_line("lost", [(x(line[-1][0]), y(line[-1][1])), (x(each.end), y(each.last))]))
    for lane, (name, kinds) in enumerate(_LANES):
        middle = _TOP + _PLOT + 8 + _LANE * (lane + 0.5)
        parts.append(f'<text x="{_LEFT - 7}" y="{middle:.1f}" dy="0.32em" text-anchor="end">{name}</text>')
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{middle:.1f}" y2="{middle:.1f}"/>')
        shown = [event for event in events if event.kind in kinds]
        for event in shown[-_MAX_MARKS:]:
            title = Markup.escape(f"{_clock(event.time)}: {event.text}")
            parts.append(
                f'<circle class="event {kinds[0]}" cx="{x(event.time):.1f}" cy="{middle:.1f}" r="5">'
                f"<title>{title}</title></circle>"
            )
    for moment in _moments(begin, end):
        anchor = "middle" if moment != begin else "start"
        parts.append(
            f'<text x="{x(moment):.1f}" y="{height - 6}" text-anchor="{anchor}">{_axis(moment, begin, end)}</text>'
        )
    label = f"steps over {span(end - begin)}, with {len(stretches)} starts"
    return Timeline(
        svg=Markup(f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'),
        seconds=end - begin,
        running_seconds=running,
        training_seconds=float(np.nansum(step_seconds)),
        lost_steps=lost,
    )


def _moments(begin: float, end: float) -> list[float]:
    """About six round moments between two: whole minutes, hours or days of the local clock."""
    sizes = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200)
    size = next((size for size in (*sizes, 86400, 172800, 604800, 1209600) if (end - begin) / size <= 7), 2592000)
    offset = time.localtime(begin).tm_gmtoff
    first = -(-(begin + offset) // size) * size - offset
    return [first + size * place for place in range(int((end - first) // size) + 1)] if end > first else [begin]


def _axis(moment: float, begin: float, end: float) -> str:
    form = "%H:%M:%S" if end - begin < 420 else "%H:%M" if end - begin < 36 * 3600 else "%d %b %H:%M"
    return time.strftime("%d %b" if end - begin > 7 * 86400 else form, time.localtime(moment))


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'


def _box(kind: str, left: float, top: float, right: float, bottom: float, title: str) -> str:
    return (
        f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}">'
        f"<title>{title}</title></rect>"
    )

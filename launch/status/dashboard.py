"""`triptych status --watch`: the run on one screen, refreshed until `q`."""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data_pipelines.errors import BadInput, printable
from launch.processes import UNINTERRUPTIBLE
from launch.status.events import Event, events
from launch.status.metrics import Record, number, values
from launch.status.run_files import ALIVE, RankBeat, span
from launch.status.snapshot import Looker, Snapshot
from launch.status.spark import column_means
from launch.status.tables import (
    COLOURS,
    PARTS,
    Curve,
    badge,
    bar,
    details,
    ending,
    facts,
    for_the_eye,
    place,
    rate,
    steps,
)

_WIDE = 96
# About as many as a curve is wide: what its ends are called depends little on it.
_COLUMNS = 48
_SECONDS_BETWEEN_KEYS = 0.2
_STILL_SECONDS = 5.0
_MARKS = {
    "start": ("▶", "green"),
    "stop": ("■", "yellow"),
    "fault": ("✖", "red"),
    "numbers": ("▲", "yellow"),
    "checkpoint": ("●", "blue"),
    "no checkpoint": ("●", "red"),
    "evaluation": ("◆", "magenta"),
}
_BORDER = "bright_black"


class Dashboard:
    """What stands on the screen; remembers since when each rank stands still."""

    def __init__(self) -> None:
        self._moved: dict[int, tuple[int, float]] = {}

    def render(self, snapshot: Snapshot, width: int, height: int) -> RenderableType:
        """The screen, for a terminal of this size."""
        head = Layout(self._head(snapshot), name="head", size=4)
        curves, below = Layout(name="curves"), Layout(name="below")
        wide = width >= _WIDE
        # Two columns have the curves of losses and of speed side by side, one has them one below the other.
        tall = max(1, min(12, height - 25)) if wide else 1
        losses, speed = _losses(snapshot, tall + 1), _speed(snapshot, tall)
        rows = tall + 7
        about = Panel(self._facts(snapshot), title="run", title_align="left", border_style=_BORDER)
        told = _events(events(snapshot.run), snapshot.now, height)
        happened = Panel(told, title="events", title_align="left", border_style=_BORDER)
        root = Layout()
        if wide:
            curves.split_row(Layout(losses), Layout(speed))
            curves.size = rows
            below.split_row(Layout(about), Layout(happened))
            root.split_column(head, curves, below)
        else:
            about_rows = max(5, min(9, height - 4 - rows))
            root.split_column(head, Layout(losses, size=rows), Layout(about, size=about_rows), Layout(happened))
        return root

    def _head(self, snapshot: Snapshot) -> RenderableType:
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        share = snapshot.progress.share
        line.add_row(
            Text(f"step {steps(snapshot)}"), bar(snapshot), Text("" if share is None else f"{share:.1%}", style="bold")
        )
        why = printable("; ".join(filter(None, (snapshot.state.why, ending(snapshot)))))
        epoch = number((snapshot.metrics.last or {}).get("epoch"))
        told = Table.grid(expand=True, padding=(0, 1))
        told.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        told.add_column(no_wrap=True, justify="right")
        told.add_row(Text.assemble(badge(snapshot), f"  {why}"), Text("" if epoch is None else f"epoch {epoch:.2f}"))
        title = Text.assemble((printable(snapshot.run.name), "bold"), f"  {printable(place(snapshot))}")
        return Panel(
            Group(told, line),
            title=title,
            title_align="left",
            subtitle=Text(f"{time.strftime('%H:%M:%S', time.localtime(snapshot.now))}  q leaves", style=_BORDER),
            subtitle_align="right",
            border_style=COLOURS[snapshot.state.word],
        )

    def _facts(self, snapshot: Snapshot) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, told in self._ranks(snapshot.run.beats, snapshot.now):
            table.add_row(name, told)
        for name, told_ in facts(snapshot):
            table.add_row(name, told_)
        return table

    def _ranks(self, beats: Sequence[RankBeat], now: float) -> Iterator[tuple[str, Text]]:
        for beat in beats:
            count, since = self._moved.get(beat.rank, (-1, now))
            if count != beat.count:
                since = now
            self._moved[beat.rank] = (beat.count, since)
        for beat in beats[:8]:
            still = now - self._moved[beat.rank][1]
            text = Text(f"{beat.phase}, step {beat.step:,}" if beat.step else beat.phase)
            if still >= _STILL_SECONDS:
                text.append(f", for {span(still)}", style="yellow")
            if beat.process != ALIVE and (still >= _STILL_SECONDS or beat.process != UNINTERRUPTIBLE):
                text.append(f", {beat.process}", style="bold red")
            yield f"rank {beat.rank}", text
        if len(beats) > 8:
            yield "", Text(f"and {len(beats) - 8} more ranks on this host", style=_BORDER)


def show(looker: Looker, every_seconds: float) -> None:
    """Keep the dashboard on the terminal until `q` or Ctrl-C, then leave the last facts on it.

    Raises:
        BadInput: it is no run directory.
    """
    console, dashboard = Console(), Dashboard()
    snapshot = looker.look()
    watcher = _Watcher(looker, every_seconds)
    size = console.size
    with (
        _keys() as read_key,
        Live(dashboard.render(snapshot, *size), console=console, screen=True, auto_refresh=False) as live,
    ):
        live.refresh()
        watcher.start()
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                key = read_key(_SECONDS_BETWEEN_KEYS)
                if key not in ("q", "Q", "\x03", "\x1b"):
                    new = watcher.take()
                    if new is not None or console.size != size:
                        snapshot, size = new or snapshot, console.size
                        live.update(dashboard.render(snapshot, *size), refresh=True)
                    continue
            break
    console.print(details(snapshot, console.width))


class _Watcher(threading.Thread):
    """Looks in the background, so that a slow disk or controller does not hold up the keys."""

    def __init__(self, looker: Looker, every_seconds: float) -> None:
        super().__init__(daemon=True)
        self._looker, self._every = looker, every_seconds
        self._new: Snapshot | None = None

    def run(self) -> None:
        while True:
            time.sleep(self._every)
            # The run directory may be replaced while we look; the next look tells.
            with contextlib.suppress(BadInput, OSError):
                self._new = self._looker.look()

    def take(self) -> Snapshot | None:
        new, self._new = self._new, None
        return new


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Single keys from standard input, where that is a terminal; gives a function (seconds) -> key or ''."""
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)

        def read(seconds: float) -> str:
            ready, _, _ = select.select([descriptor], [], [], seconds)
            return os.read(descriptor, 1).decode("latin-1") if ready else ""

        yield read
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _losses(snapshot: Snapshot, height: int) -> RenderableType:
    records = snapshot.metrics.overview
    names = [("loss", "loss"), *((f"loss_{name}", name) for name in PARTS)]
    title = f"losses, over {snapshot.progress.step:,} steps"
    return _curves(records, names, title, {"loss": height}, lambda value: f"{value:.4f}", logarithmic=True)


def _speed(snapshot: Snapshot, height: int) -> RenderableType:
    records = snapshot.metrics.recent
    shown = [{**record, "memory": (number(record.get("rss_bytes")) or 0) / 2**30 or None} for record in records]
    names = [
        ("samples_per_second", "samples/s"),
        ("step_seconds", "s a step"),
        ("data_wait_fraction", "data wait"),
        ("grad_norm", "grad norm"),
        ("lr", "learn. rate"),
        ("memory", "GiB, rank 0"),
    ]
    title = f"speed, over the last {len(records):,} steps" if records else "speed"
    heights = {"samples_per_second": height}
    return _curves(shown, names, title, heights, _short, floors={"data_wait_fraction": 0.0, "samples_per_second": 0.0})


def _curves(
    records: Sequence[Record],
    names: Sequence[tuple[str, str]],
    title: str,
    heights: dict[str, int],
    text: Any,
    floors: dict[str, float] | None = None,
    logarithmic: bool = False,
) -> RenderableType:
    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, justify="right")
    for field, label in names:
        given: Sequence[float | None] = values(records, field)
        known = [value for value in given if value is not None]
        if not known:
            continue
        in_log = logarithmic and (drawn := for_the_eye(given)) is not given
        if in_log:
            given = drawn
            title += ", log scale" * ("log scale" not in title)
        height = heights.get(field, 1)
        latest = sum(known[-10:]) / len(known[-10:])
        shown = f"{latest:.0%}" if field == "data_wait_fraction" else text(latest)
        bad = field == "data_wait_fraction" and latest > 0.2
        table.add_row(
            _label(label, height, given, in_log, (floors or {}).get(field)),
            Curve(given, height, "red" if bad else "cyan", (floors or {}).get(field)),
            Text.assemble((shown, "bold red" if bad else "bold"), f" {_trend(known)}"),
        )
    return Panel(table, title=title, title_align="left", border_style=_BORDER)


def _label(name: str, height: int, drawn: Sequence[float | None], in_log: bool, floor: float | None) -> Text:
    """What a curve is, and where it is high enough also the values at its top and its bottom."""
    text = Text(name, style="bold" if height > 1 else "")
    if height < 4:
        return text
    columns = [value for value in column_means(drawn, _COLUMNS) if value is not None]
    low, high = min(columns) if floor is None else floor, max(columns)
    low, high = (math.exp(low), math.exp(high)) if in_log else (low, high)
    text.append(f"\n{_short(high)}", style=f"not bold {_BORDER}")
    text.append("\n" * (height - 2) + _short(low), style=f"not bold {_BORDER}")
    return text


def _trend(known: Sequence[float]) -> str:
    """Where a curve goes: the mean of its last fifth against the fifth before, an arrow for more than 2 %."""
    part = len(known) // 5
    if part < 2:
        return " "
    now, before = sum(known[-part:]) / part, sum(known[-2 * part : -part]) / part
    scale = max(abs(before), 1e-12)
    return "↗" if now - before > 0.02 * scale else "↘" if before - now > 0.02 * scale else "→"


def _short(value: float) -> str:
    if 0 < abs(value) < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return rate(value)


def _events(found: Sequence[Event], now: float, rows: int) -> RenderableType:
    table = Table.grid(expand=True, padding=(0, 1))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
    # Of checkpoints the newest says enough.
    last_save = max((each.time for each in found if each.kind == "checkpoint"), default=0.0)
    shown = [each for each in found if each.kind != "checkpoint" or each.time == last_save]
    for each in list(reversed(shown))[:rows]:
        mark, colour = _MARKS[each.kind]
        clock = time.strftime("%H:%M:%S" if now - each.time < 12 * 3600 else "%d %b %H:%M", time.localtime(each.time))
        table.add_row(Text(clock, style=_BORDER), Text(mark, style=colour), Text(printable(each.text)))
    return table if shown else Text("nothing yet", style=_BORDER)

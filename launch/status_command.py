"""`triptych status`: how a run is doing, once or as a dashboard; without a run, a line for each one below here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.errors import BadInput
from launch.json_output import print_json, say
from launch.status.run_files import runs_below
from launch.status.snapshot import Looker, Snapshot, look_at_all
from launch.status.target import run_directory

if TYPE_CHECKING:
    from rich.console import RenderableType

_PIPE_WIDTH = 160


def status_command(target: str | None, watch: bool = False, every_seconds: float = 2.0, as_json: bool = False) -> None:
    """Print how a run is doing, or keep a dashboard of it on the terminal.

    Args:
        target: run directory, config or job; None lists the runs below the current folder.
        watch: refresh until `q`, Ctrl-C or the end of the run.
        every_seconds: between two looks.
        as_json: JSON alone on standard output; with `watch` one line each time, until the run has ended.

    Raises:
        BadInput: no such run, or nothing to watch.
    """
    from launch.status import tables

    if target is None:
        if watch:
            raise BadInput("--watch needs a run: its directory, its config or a job's number")
        found = look_at_all(runs_below(Path()))
        if as_json:
            print_json([each.as_json() for each in found])
        elif found:
            _print(lambda width: tables.overview(found))
        else:
            say(f"no run below {Path.cwd()}; give a run directory, a config or a job's number")
        return
    looker = Looker(run_directory(target))
    if watch and as_json:
        _lines(looker, every_seconds)
    elif watch:
        from launch.status.dashboard import show

        if not sys.stdout.isatty():
            raise BadInput("--watch needs a terminal; --watch --json prints a line each time")
        show(looker, every_seconds)
    elif as_json:
        print_json(looker.look().as_json())
    else:
        snapshot = looker.look()
        _print(lambda width: tables.details(snapshot, width))


def _lines(looker: Looker, every_seconds: float) -> None:
    import json

    while True:
        snapshot: Snapshot = looker.look()
        print(json.dumps(snapshot.as_json(), ensure_ascii=False, allow_nan=False), flush=True)
        if not snapshot.state.live and snapshot.state.word != "queued":
            return
        time.sleep(every_seconds)


def _print(shown: Callable[[int], RenderableType]) -> None:
    from rich.console import Console

    if sys.stdout.isatty():
        console = Console(highlight=False)
        console.print(shown(console.width))
        return
    console = Console(width=_PIPE_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(shown(_PIPE_WIDTH))
    # rich fills lines up to the width of the table.
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), flush=True)

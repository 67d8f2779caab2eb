"""The commands that look at a run from outside: `status`, `stop`, `logs`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[str, typer.Argument(metavar="RUN|JOB", help="Run directory, YAML file of a run, or Slurm job.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]


def status(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|JOB]", help="Run directory, YAML file of a run, or Slurm job; without it, all runs below here."
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep a dashboard on the terminal; q leaves it.")] = False,
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Between two looks of --watch.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Say how a run is doing: state and place in the queue, progress, speed, losses, checkpoint, restarts, incidents.

    Example: triptych status runs/demo/run --watch
    """
    from launch.status_command import status_command

    status_command(target, watch, every, as_json)

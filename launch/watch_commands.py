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
            metavar="[RUN|JOB]",
            help="Run directory, YAML file of a run, or Slurm job; without it, all runs below here.",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Keep a dashboard on the terminal; q leaves it.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Between two looks of --watch.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Say how a run is doing: state and place in the queue, progress, speed, losses, checkpoint, restarts, incidents.

    Example: triptych status runs/demo/run --watch
    """
    from launch.status_command import status_command

    status_command(target, watch, every, as_json)


def stop(
    target: Target,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask, and do not wait for the end.")] = False,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without a checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Have a run finish its step, save and end; a job of it that waits is taken out of the queue.

    The same command that started it goes on from there. Ctrl-C stops the waiting, not the run.

    Exit status: 0 stopped with a checkpoint, or done; 1 it ended otherwise; 2 nothing of it runs.

    Example: triptych stop runs/demo/run
    """
    from launch.stop_command import stop_command

    raise typer.Exit(stop_command(target, not no_wait, now, as_json))


def logs(
    target: Target,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until the run ends.")] = False,
    rank: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Of this rank alone; may be repeated. Default: the job, its supervisors, or rank 0."),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines of each log to begin with.")] = 50,
) -> None:
    """Print what a run has said.

    Example: triptych logs runs/demo/run -f --rank 0
    """
    from launch.logs_command import logs_command

    logs_command(target, follow, rank or (), lines)


def report(
    target: Target,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; default: report.html in the run directory.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples to show.")] = 6,
    captions: Annotated[
        bool, typer.Option("--captions", help="Have the newest checkpoint describe samples; loads the model.")
    ] = False,
) -> None:
    """Write one HTML page about a run, whole in itself: curves, time line, scores, samples, settings, versions.

    Example: triptych report runs/demo/run --captions
    """
    from launch.report_command import report_command

    report_command(target, out, samples, captions)

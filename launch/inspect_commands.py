"""`triptych data lint`, `preview` and `stats`: what is wrong with a dataset, how it looks, what its numbers are."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launch.errors import BAD_INPUT
from launch.json_output import messages_to_stderr, print_json, say

_PIPE_WIDTH = 200

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Dataset folder.")]
Workers = Annotated[int | None, typer.Option(min=1, help="How many work at once; by default one a core.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]


class Modality(StrEnum):
    """What a sample may have."""

    image = "image"
    text = "text"
    audio = "audio"


def lint_command(
    folder: Folder,
    fast: Annotated[bool, typer.Option("--fast", help="Leave pictures and sounds undecoded.")] = False,
    require: Annotated[
        list[Modality] | None, typer.Option(help="A modality that every sample must have. May be repeated.")
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Look for everything wrong with a dataset: shards, indexes, dataset.json, keys, members.

    Exit status: 0 and one line when nothing is wrong, 2 and a table when something is.
    """
    from data_pipelines.lint import lint
    from data_pipelines.tables import lint_table, summary_line

    report = lint(folder, fast=fast, require=[modality.value for modality in require or ()], workers=workers)
    if as_json:
        print_json(report.as_json())
    elif report.clean:
        print(summary_line(report), flush=True)
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(lint_table(report))
    if not report.clean:
        raise typer.Exit(BAD_INPUT)


def preview_command(
    folder: Folder,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page to write.")],
    samples: Annotated[int, typer.Option(min=1, help="Samples to show, spread evenly over the dataset.")] = 48,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw the samples at random with this seed.")] = None,
) -> None:
    """Write one HTML page that shows samples: pictures, sounds, spectrograms, captions, metadata.

    The page holds everything in itself and can be mailed or opened anywhere.
    """
    from data_pipelines.preview import write_preview

    keys = write_preview(folder, out, samples=samples, seed=seed)
    say(f"{out}: {len(keys)} samples, {out.stat().st_size / 1e6:.1f} MB")


def stats_command(
    folder: Folder,
    config: Annotated[
        Path | None, typer.Option(metavar="CONFIG", help="Take the image and audio settings of this run.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Measure this many samples, spread evenly; by default all.")
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Measure normalisation constants: mean and standard deviation of log-mel values and of pixels.

    Prints lines to paste into a config. The numbers do not depend on the number of workers.
    """
    from data_pipelines.dataset import open_dataset

    with messages_to_stderr():
        from data_pipelines.config import DataConfig
        from pretrain.config import load_config
        from pretrain.normalisation import measure

        data = DataConfig(train=str(folder)) if config is None else load_config(config).data
        constants = measure(open_dataset(folder), data, samples=samples, workers=workers)
    if as_json:
        print_json(constants.as_json())
    else:
        print(constants.as_yaml(), end="", flush=True)

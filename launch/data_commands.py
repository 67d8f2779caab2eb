"""`triptych data ...`: build a dataset, index tars that are there, look at one, check one."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipelines.errors import BadInput
from launch.errors import exits_cleanly
from launch.inspect_commands import lint_command, preview_command, stats_command

app = typer.Typer(
    name="data",
    help="Raw files to datasets: build one, index existing tars, look at one, check one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class OnError(StrEnum):
    """What a bad row does to a build."""

    fail = "fail"
    skip = "skip"


Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]


_BUILD_EXAMPLES = """Examples:

\b
  triptych data build photos/manifest.csv --out datasets/photos --split train
  triptych data build rows.parquet --out datasets/rows --column image=img_path
  triptych data build digits --split train --out datasets/digits
"""


@app.command(epilog=_BUILD_EXAMPLES)
@exits_cleanly
def build(
    source: Annotated[
        str,
        typer.Argument(help="Manifest (.csv, .jsonl, .parquet), or `digits`, the embedded source."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Dataset folder to write: new, empty, or holding this same build.")
    ],
    split: Annotated[str | None, typer.Option(help="Keep the rows whose `split` column has this value.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 1000,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one a core. The bytes do not depend on it.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="Take `image`, `id`, ... from another column. May be repeated."),
    ] = None,
    allow: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR", help="A folder beside the manifest's own that its files may lie in. May be repeated."
        ),
    ] = None,
    on_error: Annotated[
        OnError, typer.Option(help="A bad row ends the build, or goes to quarantine.jsonl.")
    ] = OnError.fail,
    name: Annotated[str | None, typer.Option(help="Name of the dataset and of its shards.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the embedded source.")] = 0,
    as_json: Json = False,
) -> None:
    """Build a dataset folder from raw files.

    A build that was stopped goes on where it was; one that is done is left as it is.
    """
    from data_pipelines.build import build_dataset

    folder = build_dataset(
        source,
        out,
        split=split,
        shard_size=shard_size,
        workers=workers,
        columns=_parse_columns(column or []),
        allow=allow or [],
        on_error=on_error.value,
        name=name,
        seed=seed,
    )
    if as_json:
        _print_json(_summary(folder))


@app.command(epilog="Example:  triptych data index /data/cc12m")
@exits_cleanly
def index(
    folder: Annotated[Path, typer.Argument(help="Folder with .tar files in it or below it.")],
    as_json: Json = False,
) -> None:
    """Make a dataset of WebDataset tars that are there: dataset.json and index/ beside them, the tars unchanged.

    What is damaged in them goes to quarantine.jsonl; whole samples stay.
    """
    from data_pipelines.dataset import index_folder

    dataset, quarantined = index_folder(folder)
    for line in quarantined[:5]:
        print(f"quarantined: {line.shard}: {line.key or line.member or '?'}: {line.detail}", file=sys.stderr)
    if len(quarantined) > 5:
        print(f"and {len(quarantined) - 5} more in {folder / 'quarantine.jsonl'}", file=sys.stderr)
    print(f"{folder}: {len(dataset)} samples in {len(dataset.shards)} shards", file=sys.stderr)
    if as_json:
        _print_json(_summary(folder))


@app.command(epilog="Example:  triptych data info datasets/photos")
@exits_cleanly
def info(
    dataset: Annotated[Path, typer.Argument(help="Dataset folder.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Count tokens too, with this Hugging Face tokenizer folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a dataset holds: counts, modalities, histograms of sizes, labels, speakers."""
    from data_pipelines.report import info

    description = info(dataset, tokenizer)
    if as_json:
        _print_json(description)
        return
    from rich.console import Console

    from data_pipelines.tables import info_table

    Console(soft_wrap=not sys.stdout.isatty()).print(info_table(description))


app.command("lint", epilog="Example:  triptych data lint datasets/photos --fast")(exits_cleanly(lint_command))
app.command("preview", epilog="Example:  triptych data preview datasets/photos --out photos.html")(
    exits_cleanly(preview_command)
)
app.command("stats", epilog="Example:  triptych data stats datasets/photos --config configs/sound_photos.yaml")(
    exits_cleanly(stats_command)
)


def _parse_columns(options: list[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for option in options:
        ours, equals, theirs = option.partition("=")
        if not (ours and equals and theirs):
            raise BadInput(f"--column {option}: give OURS=THEIRS, for example image=img_path")
        if ours in columns:
            raise BadInput(f"--column {option}: {ours!r} was given {columns[ours]!r} already")
        columns[ours] = theirs
    return columns


def _summary(folder: Path) -> dict[str, Any]:
    from data_pipelines.dataset import open_dataset

    dataset = open_dataset(folder)
    quarantine = folder / "quarantine.jsonl"
    return {
        "path": str(folder),
        "name": dataset.name,
        "num_samples": len(dataset),
        "num_shards": len(dataset.shards),
        "modalities": dataset.modalities,
        "fingerprint": dataset.fingerprint,
        "quarantined": len(quarantine.read_bytes().splitlines()) if quarantine.is_file() else 0,
    }


def _print_json(value: Any) -> None:
    # Flushed here, where a reader that has gone is still an error that `exits_cleanly` knows.
    print(json.dumps(value, indent=1, ensure_ascii=False), flush=True)

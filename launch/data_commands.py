"""`triptych data ...`: build a dataset, index tars that are there, look at one, check one."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipelines.errors import BadInput, printable
from data_pipelines.progress import counted
from launch import prepare_options as prepare
from launch.errors import exits_cleanly
from launch.inspect_commands import lint_command, preview_command, stats_command

app = typer.Typer(
    name="data",
    help="Raw files to datasets: build one, index existing tars, look at one, check one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class Engine(StrEnum):
    """Where shards are built."""

    local = "local"
    slurm = "slurm"


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
  triptych data build raw/images --join raw/captions.csv --out datasets/joined
  triptych data build hf:my-lab/birds --split train --out datasets/birds --keep licence=cc0,cc-by
  triptych data build 'old/{0000..0012}.tar' --out datasets/new --shard-size 5000 --dedup image --dedup-images 4
  triptych data build photos/manifest.csv --out datasets/small --image-side 512 --audio-rate 16000 --clean-text
  triptych data build rows.parquet --out datasets/rows --engine slurm --partition cpu --tasks 200 --throttle 50
"""

_ON_SLURM = "With --engine slurm"


@app.command(epilog=_BUILD_EXAMPLES)
@exits_cleanly
def build(
    source: Annotated[
        str,
        typer.Argument(
            help="Manifest (.csv, .jsonl, .parquet), folder of files that share stems, tars (a file, a brace list, a "
            "folder), hf: and a Hugging Face dataset, or `digits`, the embedded source. files:, tars: and hf: say "
            "which, where a folder could be several."
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Dataset folder to write: new, empty, or holding this same build.")
    ],
    split: Annotated[
        str | None,
        typer.Option(help="Keep this split: a manifest's rows with it in `split`, or a Hugging Face dataset's."),
    ] = None,
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
    engine: Annotated[
        Engine, typer.Option(help="Build in processes of this machine, or as an array of Slurm jobs.")
    ] = Engine.local,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm: limit of an array task, which goes on after it.")] = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Slurm: cores, and so processes, of an array task; default 1.")
    ] = None,
    mem: Annotated[str | None, typer.Option(help="Slurm: memory of an array task, as sbatch's --mem.")] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Slurm: array tasks at most; default 100.")] = None,
    throttle: Annotated[int | None, typer.Option(min=1, help="Slurm: array tasks at a time at most.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Slurm: any other option of sbatch; export=NAMES lets variables through. May be repeated.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Slurm: wait until it is built.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Slurm: plan, show the job, submit nothing.")] = False,
    join: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Add what this source has for the same keys. May be repeated."),
    ] = None,
    join_column: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="As --column, for joined sources.")
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read a Hugging Face dataset as a stream.")] = False,
    prefix_keys: Annotated[
        bool, typer.Option("--prefix-keys", help="Put the tar's name before each key: for tars that repeat theirs.")
    ] = False,
    require: prepare.Require = None,
    keep: prepare.Keep = None,
    min_image_side: prepare.MinImageSide = None,
    max_seconds: prepare.MaxSeconds = None,
    clean_text: prepare.CleanText = False,
    strip_html: prepare.StripHtml = False,
    dedup: prepare.Dedup = None,
    dedup_images: prepare.DedupImages = None,
    audio_rate: prepare.AudioRate = None,
    image_side: prepare.ImageSide = None,
    image_format: prepare.ImageFormat = None,
    as_json: Json = False,
) -> None:
    """Build a dataset folder from raw files, from other datasets, or from several of them joined.

    A build that was stopped goes on where it was; one that is done is left as it is.
    """
    from data_pipelines.build import build_dataset
    from data_pipelines.engines.slurm import SlurmOptions

    slurm = SlurmOptions(
        partition=partition,
        account=account,
        time=time,
        cpus=cpus or 1,
        mem=mem,
        tasks=tasks,
        throttle=throttle,
        sbatch=_parse_sbatch(sbatch or []),
        wait=wait,
        dry_run=dry_run,
    )
    if engine is Engine.slurm and workers is not None:
        raise BadInput("--workers is for --engine local; on Slurm give --tasks and --cpus")
    if engine is Engine.local and (cpus is not None or slurm != SlurmOptions()):
        raise BadInput("options of Slurm (--partition, --time, --cpus, --tasks, ...) need --engine slurm")

    folder = build_dataset(
        source,
        out,
        split=split,
        shard_size=shard_size,
        workers=workers,
        columns=_parse_columns("--column", column or []),
        allow=allow or [],
        on_error=on_error.value,
        name=name,
        seed=seed,
        slurm=slurm if engine is Engine.slurm else None,
        join=join or [],
        join_columns=_parse_columns("--join-column", join_column or []),
        streaming=streaming,
        prefix_keys=prefix_keys,
        prepare=prepare.prepare_config(
            keep,
            require=require,
            min_image_side=min_image_side,
            max_seconds=max_seconds,
            clean_text=clean_text,
            strip_html=strip_html,
            dedup=dedup,
            dedup_images=dedup_images,
            audio_rate=audio_rate,
            image_side=image_side,
            image_format=image_format,
        ),
    )
    if as_json:
        _print_json(_submitted(folder) or _summary(folder))


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

    try:
        dataset, quarantined = index_folder(folder)
    except OSError as error:
        if error.errno is None:
            raise
        raise BadInput(f"{error.filename or folder}: {error.strerror}") from error
    for line in quarantined[:5]:
        what = printable(f"{line.shard}: {line.key or line.member or '?'}: {line.detail}")
        print(f"quarantined: {what}", file=sys.stderr)
    if len(quarantined) > 5:
        print(f"and {len(quarantined) - 5} more in {folder / 'quarantine.jsonl'}", file=sys.stderr)
    print(f"{folder}: {counted(len(dataset), 'sample')} in {counted(len(dataset.shards), 'shard')}", file=sys.stderr)
    if as_json:
        _print_json(_summary(folder))


@app.command(epilog="Example:  triptych data info datasets/photos")
@exits_cleanly
def info(
    dataset: Annotated[str, typer.Argument(help="Dataset folder, or its URL.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Count tokens too, with this Hugging Face tokenizer folder.")
    ] = None,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Allow a URL at a private, loopback or link-local address.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a dataset holds: counts, modalities, histograms of sizes, labels, speakers."""
    from data_pipelines import report
    from data_pipelines.config import RemoteConfig
    from data_pipelines.dataset import open_dataset

    remote = RemoteConfig(mode="range", allow_private_addresses=allow_private)
    description = report.info(open_dataset(dataset, remote), tokenizer)
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


def _parse_columns(flag: str, options: list[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for option in options:
        ours, equals, theirs = option.partition("=")
        if not (ours and equals and theirs):
            raise BadInput(f"{flag} {option}: give OURS=THEIRS, for example image=img_path")
        if ours in columns:
            raise BadInput(f"{flag} {option}: {ours!r} was given {columns[ours]!r} already")
        columns[ours] = theirs
    return columns


def _parse_sbatch(options: list[str]) -> dict[str, str]:
    parsed: dict[str, str] = {}
    for option in options:
        name, _, value = option.removeprefix("--").partition("=")
        if name in parsed:
            raise BadInput(f"--sbatch {option}: {name!r} was given {parsed[name]!r} already")
        parsed[name] = value
    return parsed


def _submitted(folder: Path) -> dict[str, Any] | None:
    """The jobs of a build that is on its way, None when it is done."""
    from data_pipelines.engines.slurm import last_submission

    submission = last_submission(folder)
    return None if submission is None else {"path": str(folder), "jobs": [int(job) for job in submission.jobs]}


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
        "dropped": _dropped(folder),
    }


def _dropped(folder: Path) -> dict[str, int]:
    """Rows that the build left out because it was asked to, by reason."""
    record = folder / "build.json"
    return dict(json.loads(record.read_bytes()).get("dropped", {})) if record.is_file() else {}


def _print_json(value: Any) -> None:
    # Flushed here, where a reader that has gone is still an error that `exits_cleanly` knows.
    print(json.dumps(value, indent=1, ensure_ascii=False), flush=True)

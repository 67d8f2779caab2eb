"""`triptych eval`: score a run's newest valid checkpoint, or an export, on a dataset."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipelines.errors import BadInput
from launch.json_output import messages_to_stderr, print_json, say

if TYPE_CHECKING:
    from pretrain.restore import Restored


def eval_command(
    target: Annotated[Path, typer.Argument(metavar="RUN|EXPORT", help="A run directory, or an exported folder.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="Dataset folder, or its URL; default: data.eval of the training config."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON to this file as well.")] = None,
) -> None:
    """Score a run's newest valid checkpoint, or an export: zero-shot classes, retrieval, caption loss.

    Example: triptych eval runs/demo/run --data runs/demo/dataset/test --json
    """
    with messages_to_stderr():
        results = evaluate_target(target, data)
    if out is not None:
        write_json(out, results)
    if as_json:
        print_json(results)
        return
    from rich.console import Console

    from pretrain.results import table

    Console().print(table(results))


def evaluate_target(target: Path, data: str | Path | None = None) -> dict[str, Any]:
    """The result of `pretrain.evaluate.evaluate`, and which weights and data it is of.

    Args:
        target: a run directory, whose newest valid checkpoint is taken, or an export.
        data: dataset folder, or its URL; None takes the evaluation data of the training config.

    Raises:
        BadInput: neither a run nor an export, no valid checkpoint, or no data.
    """
    from data_pipelines import open_dataset
    from pretrain.folders import TRAINING_CONFIG, is_export, is_run

    if not target.is_dir():
        raise BadInput(f"{target}: no such folder; give a run directory or an export")
    if not is_run(target) and not is_export(target):
        raise BadInput(f"{target}: neither a run directory nor an export (no config.yaml, no {TRAINING_CONFIG})")
    given = open_dataset(data) if data is not None else None

    from pretrain.evaluate import evaluate

    restored = _restore(target)
    if given is None:
        sources = restored.config.data.eval_sources
        if not sources:
            raise BadInput("--data: needed, since the training config names no data.eval")
        given = open_dataset(sources[0].path, restored.config.data.remote)
    device = _device()
    restored.model.to(device)
    say(f"evaluating {restored.source} on {given.location}: {len(given)} samples")
    config = restored.config
    with tempfile.TemporaryDirectory(prefix="triptych-eval-") as notes:
        # The loader notes bad samples in the run's folder; the one in an export's config may be another machine's.
        here = config.model_copy(update={"run": config.run.model_copy(update={"dir": notes})})
        results = evaluate(restored.model, here, given, restored.tokenizer, device=device)
        _tell_bad_samples(Path(notes) / "quarantine.jsonl")
    results["data"]["path"] = given.location
    return results | {"step": restored.step, "checkpoint": str(restored.source)}


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file that appears whole or not at all."""
    from data_pipelines.atomic import atomic_file

    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))


def _tell_bad_samples(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines[:5]:
        bad = json.loads(line)
        say(f"left out {bad['key']} in {bad['shard']}: {bad['reason']} ({bad['detail']})")
    if len(lines) > 5:
        say(f"... and {len(lines) - 5} more")


def _restore(target: Path) -> Restored:
    from pretrain.folders import is_run
    from pretrain.restore import find_checkpoint, restore_export, restore_run

    if not is_run(target):
        return restore_export(target)
    found, passed = find_checkpoint(target)
    for bad in passed:
        say(f"passed over {bad.path}: {bad.reason}")
    return restore_run(target, found)


def _device() -> str:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    return "cuda" if torch.cuda.is_available() else "cpu"

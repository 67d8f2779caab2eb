"""`triptych checkpoints`: which checkpoints a run has, and which of them can be trusted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipelines.errors import BadInput
from launch.json_output import print_json


def checkpoints_command(run: Path, as_json: bool = False) -> None:
    """Verify every checkpoint of a run, which reads every byte, and print them oldest first.

    JSON is a list of `{step, path, valid, reason, bytes}`; `reason` is null where valid.

    Raises:
        BadInput: `run` is no run directory.
    """
    if not run.is_dir():
        raise BadInput(f"{run}: no such run directory")
    if not any((run / name).exists() for name in ("checkpoints", "config.yaml", "run.json")):
        raise BadInput(f"{run}: not a run directory (it has no checkpoints/, config.yaml or run.json)")
    from pretrain.checkpoint import list_checkpoints
    from pretrain.checkpoint.manifest import bytes_of

    found = list_checkpoints(run, quiet=as_json)
    if as_json:
        print_json(
            [
                asdict(each) | {"path": str(each.path), "valid": each.valid, "bytes": bytes_of(each.path)}
                for each in found
            ]
        )
        return
    if not found:
        print(f"{run} has no checkpoint yet")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("step", justify="right")
    table.add_column("size", justify="right", no_wrap=True)
    for name in ("valid", "path"):
        table.add_column(name, overflow="fold")
    for each in found:
        size = f"{bytes_of(each.path) / 1e6:,.1f} MB"
        table.add_row(str(each.step), size, "yes" if each.valid else f"no: {each.reason}", str(each.path))
    Console().print(table)

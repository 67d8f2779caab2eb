"""`triptych doctor`: would a run work here? One line for each check, with what to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.doctor import examine
from launch.json_output import messages_to_stderr, print_json
from launch.train_command import default_num_processes
from pretrain.config import load_config

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor_command(
    path: Path | None, overrides: Sequence[str] = (), num_processes: int | None = None, as_json: bool = False
) -> bool:
    """Print every finding; true when nothing would stop a run.

    JSON is `{ok, checks: [{name, level, found, advice}]}`.

    Raises:
        BadInput: the config or an override is wrong.
    """
    config = load_config(path, overrides) if path is not None else None
    with messages_to_stderr():
        findings = examine(config, num_processes or default_num_processes())
    sound = all(finding.level != "error" for finding in findings)
    if as_json:
        print_json({"ok": sound, "checks": [asdict(finding) for finding in findings]})
        return sound
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("check", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        style = _STYLES[finding.level]
        level = f"[{style}]{finding.level}[/]"
        table.add_row(finding.name, level, escape(finding.found), escape(finding.advice))
    Console(width=None if sys.stdout.isatty() else 250).print(table)
    return sound

"""`triptych config`: what a config comes to, and what settings there are."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.json_output import print_json
from pretrain.config import Config, load_config
from pretrain.config_fields import Setting, list_settings


def config_command(path: Path | None, overrides: Sequence[str] = (), as_json: bool = False) -> None:
    """Print every setting of `path` with its value, or without `path` every setting that there is.

    JSON is the config itself, nested as in the file; without `path` a list of `{path, type, required, default,
    description}`.

    Raises:
        BadInput: the config or an override is wrong.
    """
    if path is None:
        settings = list(list_settings(Config))
        if as_json:
            print_json([_as_json(setting) for setting in settings])
        else:
            _show("Settings", settings, with_value=False)
        return
    config = load_config(path, overrides)
    if as_json:
        print_json(config.model_dump(mode="json"))
    else:
        _show(str(path), list_settings(Config, config), with_value=True)


def shown(setting: Setting, value: Any) -> str:
    """A value as it would be written in the file."""
    if setting.required and value is None:
        return "(required)"
    return json.dumps(value, ensure_ascii=False, default=lambda item: item.model_dump(mode="json"))


def _show(title: str, settings: Iterable[Setting], with_value: bool) -> None:
    columns = ["key", "value", "default", "what it is"] if with_value else ["key", "type", "default", "what it is"]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold", ratio=1 if name == columns[-1] else None)
    for setting in settings:
        default = shown(setting, setting.default)
        if not with_value:
            table.add_row(*map(escape, (setting.path, setting.type, default, setting.description)))
        elif "[]" not in setting.path:
            value = shown(setting, setting.value)
            style = "bold" if value != default else "dim"
            table.add_row(*map(escape, (setting.path, value, default, setting.description)), style=style)
    # Into a file or a pipe the lines stay whole, so that they can be searched.
    Console(width=None if sys.stdout.isatty() else 250).print(table)


def _as_json(setting: Setting) -> dict[str, Any]:
    return {
        "path": setting.path,
        "type": setting.type,
        "required": setting.required,
        "default": setting.default,
        "description": setting.description,
    }

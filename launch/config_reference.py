"""Writes `docs/config.md` from the schema: `python -m launch.config_reference docs/config.md`.

A test compares the page with what this makes, so that it cannot fall behind.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from launch.config_command import shown
from pretrain.config import Config
from pretrain.config_fields import Setting, list_settings

HEAD = """# Every setting

Written by `make docs` from the schema (`pretrain/config.py`, `data_pipelines/config.py`); `triptych config` prints the
same list, and `triptych config CONFIG` what one file comes to.

- The file is YAML, checked whole before anything starts: an unknown key, a wrong type or an impossible combination is
  one line with the file, the line, the key, and the nearest key that exists.
- `--set a.b=c` wins over the file; the value is YAML: `--set losses.audio=0.5`,
  `--set 'data.train=[{path: a, weight: 2}, {path: b}]'`, `--set data.train.0.weight=3`.
- Relative paths are relative to the folder in which the command is started, not to the file.
- `${NAME}` and `${NAME:-default}` take values from the environment; `$${` is a literal `${`. Names that look like a
  secret are refused, since a run and its export carry their config with them.
- Numbers may be written `3e-4`, `65_536` or `0x10`. Only `true` and `false` are truth values, and `24:00:00` is text.
"""


def reference() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for section, settings in groupby(list_settings(Config), _section):
        model = Config.model_fields[section.split(".")[0]]
        title = model.description if "." not in section else ""
        parts.append(f"\n## `{section}`\n\n{title}\n\n" if title else f"\n### `{section}`\n\n")
        parts.append("| key | type | default | what it is |\n|---|---|---|---|\n")
        parts += [_row(setting) for setting in settings]
    return "".join(parts)


def _section(setting: Setting) -> str:
    return setting.path.split("[]")[0].rsplit(".", 1)[0] if "[]" not in setting.path else setting.path.split(".", 1)[0]


def _row(setting: Setting) -> str:
    default = "required" if setting.required else f"`{shown(setting, setting.default)}`"
    cells = [f"`{setting.path}`", setting.type, default, setting.description]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main() -> int:
    """Write the page to the path given."""
    if len(sys.argv) != 2:
        print("usage: python -m launch.config_reference docs/config.md", file=sys.stderr)
        return 2
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

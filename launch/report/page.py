"""The page: everything in one file, nothing from elsewhere, and a script of its own that only reads the charts."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_pipelines.atomic import atomic_file
from launch.report.charts import Chart
from launch.report.timeline import Timeline
from launch.status.events import Event

if TYPE_CHECKING:
    from pretrain.examples import Group
    from pretrain.results import Block

_FOLDER = Path(__file__).parent
_TEMPLATE, _STYLE, _SCRIPT = "page.html", "style.css", "script.js"


@dataclass(frozen=True)
class Section:
    """A titled group of charts."""

    id: str
    title: str
    note: str
    charts: list[Chart]


@dataclass(frozen=True)
class Page:
    """Everything on the page; what is empty is left out."""

    name: str
    subtitle: str = ""
    state: str = ""
    why: str = ""
    tiles: list[tuple[str, str]] = field(default_factory=list)
    """Number and what it is."""
    verification: tuple[bool, str] | None = None
    timeline: Timeline | None = None
    timeline_note: str = ""
    sections: list[Section] = field(default_factory=list)
    evaluation_note: str = ""
    blocks: list[Block] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    """Newest first."""
    events_left_out: int = 0
    facts: list[tuple[str, str]] = field(default_factory=list)
    settings: list[tuple[str, str]] = field(default_factory=list)
    """Those that are not the default's."""
    changes: list[tuple[str, ...]] = field(default_factory=list)
    """Setting, value before, value after, from which step."""
    versions: list[tuple[str, str]] = field(default_factory=list)
    config: str = ""
    made: float = field(default_factory=time.time)


def write_page(page: Page, path: Path) -> None:
    """Write the page to a file that appears whole or not at all."""
    script, style = (Markup((_FOLDER / name).read_text(encoding="utf-8")) for name in (_SCRIPT, _STYLE))
    charts = [chart for section in page.sections for chart in section.charts]
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.filters["clock"] = lambda moment: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    html = environment.get_template(_TEMPLATE).render(
        page=page,
        numbers=_json([chart.data for chart in charts]),
        script=script,
        style=style,
        script_hash=_csp_hash(script),
        style_hash=_csp_hash(style),
    )
    with atomic_file(path) as file:
        file.write(html.encode("utf-8", "replace"))


def _json(value: Any) -> Markup:
    # Within a script element only `</` and `<!--` mean something to the parser.
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def differences(values: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings that are not the default, as dotted names and short values."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            found += differences(value, default, f"{prefix}{name}.")
        elif isinstance(value, dict) and value and all(isinstance(each, dict) for each in value.values()):
            found += differences(value, {}, f"{prefix}{name}.")
        elif value != default or name not in defaults:
            found.append((f"{prefix}{name}", shown(value)))
    return found


def shown(value: Any) -> str:
    """A setting's value in a line, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 300 else f"{text[:300]}..."


def rows(pairs: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of name and text, without those that are empty."""
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def _csp_hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")

"""What `report.info` and `lint` found, drawn in a terminal with rich.

Keys, labels and file names come from elsewhere: what does not print is escaped, so that none of them can steer the
terminal, and rich's own markup is never read from them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from data_pipelines.errors import printable
from data_pipelines.lint import LintReport
from data_pipelines.lint_shard import KINDS
from data_pipelines.progress import counted

_NUM_SHOWN = 12
_BAR_CELLS = 16
_SHOWN_A_KIND = 20
_HISTOGRAMS = {
    "image_width": "image width, pixels",
    "image_height": "image height, pixels",
    "image_pixels": "image size, pixels",
    "audio_seconds": "sound, seconds",
    "text_bytes": "text, bytes",
    "text_tokens": "text, tokens",
}


def info_table(description: dict[str, Any]) -> RenderableType:
    """The result of `report.info`: facts, combinations, histograms, labels, speakers."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    source = description["built_from"]
    origin = "" if source is None else f" (from {source.get('manifest') or source.get('kind')})"
    size = (
        f"{description['num_samples']:,} in {description['num_shards']:,} shards, {description['bytes'] / 1e6:,.1f} MB"
    )
    rows = [
        ("dataset", f"{description['name']}{origin}"),
        ("path", description["path"]),
        ("samples", size),
        ("fingerprint", description["fingerprint"][:16]),
    ]
    rows += [(name, f"{count:,}") for name, count in description["modalities"].items()]
    if description["quarantined"]:
        rows.append(("quarantined", f"{description['quarantined']:,} (quarantine.jsonl)"))
    for name, value in rows:
        facts.add_row(Text(printable(name)), Text(printable(value)))

    together = Table("samples with", "count", "", box=None, pad_edge=False)
    most = max(description["combinations"].values())
    for name, count in description["combinations"].items():
        together.add_row(name, f"{count:,}", _bar(count, most))

    parts: list[RenderableType] = [facts, "", together]
    if description["image_sizes"]:
        parts += ["", Text(_listed("image sizes", description["image_sizes"], description["num_image_sizes"]))]
    histograms = [_histogram(name, description[name]) for name in _HISTOGRAMS if description[name]]
    if histograms:
        parts += ["", Columns(histograms, padding=(1, 6))]
    for name in ("labels", "speakers"):
        if description[name]:
            parts += ["", Text(_listed(name, description[name], len(description[name])))]
    if description["metadata_samples"] < description["num_samples"]:
        parts.append(Text(f"labels and speakers of {description['metadata_samples']:,} samples, spread evenly"))
    return Group(*parts)


def _histogram(name: str, values: dict[str, Any]) -> Table:
    """One quantity: its numbers over a bar for each bin, or the one number that it always is."""
    numbers = f"median {values['median']:,.6g}, mean {values['mean']:,.6g}"
    if values["min"] == values["max"]:
        numbers = f"always {values['min']:,}"
    if not name.startswith("image"):
        numbers += f", total {values['total']:,}"
    table = Table(box=None, pad_edge=False, show_header=False, title_justify="left", title_style="")
    table.title = Text.assemble((_HISTOGRAMS[name], "bold"), "\n", (numbers, "dim"))
    table.add_column(justify="right")
    table.add_column(width=_BAR_CELLS)
    table.add_column(justify="right")
    edges, counts = values["histogram"]["edges"], values["histogram"]["counts"]
    for low, high, count in zip(edges, edges[1:], counts if len(counts) > 1 else [], strict=False):
        table.add_row(f"{low:,.6g} to {high:,.6g}", _bar(count, max(counts)), f"{count:,}")
    return table


def _bar(count: int, most: int) -> Text:
    """A bar in eighths of a cell; whatever is not nothing can be seen."""
    eighths = -(-count * _BAR_CELLS * 8 // most) if count else 0
    return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), style="blue")


def _listed(name: str, counts: dict[str, int], num: int) -> str:
    shown = ", ".join(f"{printable(value)} {count:,}" for value, count in list(counts.items())[:_NUM_SHOWN])
    more = f", and {num - _NUM_SHOWN:,} more" if num > _NUM_SHOWN else ""
    return f"{num:,} {name if num > 1 else name[:-1]}: {shown}{more}"


def lint_table(report: LintReport) -> RenderableType:
    """What `lint` found: how much of what, and the first of each kind by shard, key and member."""
    summary = Table("kind", "found", "what it is", box=None, pad_edge=False, header_style="bold")
    for kind, count in report.counts.items():
        summary.add_row(Text(kind, style="red"), f"{count:,}", KINDS[kind])
    findings = Table("kind", "shard", "key", "member", "what", box=None, pad_edge=False, header_style="bold")
    for column in findings.columns[1:]:
        column.overflow = "fold"
    shown: Counter[str] = Counter()
    for finding in report.findings:
        shown[finding.kind] += 1
        if shown[finding.kind] <= _SHOWN_A_KIND:
            cells = (finding.shard, finding.key or "", finding.member or "", finding.detail)
            findings.add_row(Text(finding.kind, style="red"), *(Text(printable(cell)) for cell in cells))
    left = sum(max(0, count - _SHOWN_A_KIND) for count in report.counts.values())
    parts: list[RenderableType] = [findings, "", summary, "", Text(summary_line(report))]
    if left:
        parts.insert(1, Text(f"and {left:,} more; --json lists them", style="dim"))
    return Group(*parts)


def summary_line(report: LintReport) -> str:
    """The result of `lint` in one line."""
    total = sum(report.counts.values())
    shards = counted(report.num_shards, "shard")
    looked = f"{counted(report.num_samples, 'sample')} in {shards}, {report.bytes / 1e6:,.1f} MB"
    how = ", pictures and sounds not decoded" if report.fast else ""
    found = "nothing wrong" if report.clean else f"{counted(total, 'thing')} wrong"
    return f"{printable(report.path)}: {found} ({looked}{how})"

"""What is in a dataset: counts, which modalities come together, how large things are, labels and speakers.

Sizes come from the indexes; labels and speakers from the samples' metadata, of at most `MAX_METADATA` samples spread
evenly over the dataset, and of fewer behind a URL.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data_pipelines.dataset import Dataset, open_dataset
from data_pipelines.decode import DecodeError
from data_pipelines.index import MODALITIES

if TYPE_CHECKING:
    from rich.console import Group

MAX_METADATA = 100_000
MAX_REMOTE_METADATA = 128
_NUM_BINS = 10
_NUM_SHOWN = 12


def info(dataset: str | Path | Dataset) -> dict[str, Any]:
    """A description of a dataset that JSON can hold.

    `combinations` counts samples by the modalities they have (`image+text+audio`). `image_width` and `image_height`
    (pixels), `audio_seconds` and `text_bytes` have min, median, mean, max, total and a histogram (`edges`, `counts`),
    and are null where no sample has the modality. `labels` and `speakers` map names to counts. Raises `BadInput`.
    """
    opened = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    names = ("image_size", "text_size", "audio_size", "width", "height", "audio_seconds")
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    for number in range(len(opened.shards)):
        index = opened.index(number)
        for name in names:
            parts[name].append(np.array(index[name]))
    column = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    there = {name: column[f"{name}_size"] >= (1 if name == "text" else 0) for name in MODALITIES}
    code = sum(there[name].astype(np.int64) << bit for bit, name in enumerate(MODALITIES))
    combinations = {
        "+".join(name for bit, name in enumerate(MODALITIES) if value >> bit & 1): int(count)
        for value, count in zip(*np.unique(code, return_counts=True), strict=True)
    }
    labels, speakers, num_read = _count_metadata(opened)
    return {
        "path": opened.location,
        "name": opened.name,
        "num_samples": len(opened),
        "num_shards": len(opened.shards),
        "bytes": sum(shard.bytes for shard in opened.shards),
        "fingerprint": opened.fingerprint,
        "modalities": opened.modalities,
        "reencoded": list(opened.reencoded),
        "combinations": dict(sorted(combinations.items(), key=lambda item: -item[1])),
        "image_width": _describe(column["width"][there["image"] & (column["width"] > 0)]),
        "image_height": _describe(column["height"][there["image"] & (column["height"] > 0)]),
        "audio_seconds": _describe(column["audio_seconds"][there["audio"]]),
        "text_bytes": _describe(column["text_size"][there["text"]]),
        "labels": labels,
        "speakers": speakers,
        "metadata_samples": num_read,
        "quarantined": _count_quarantined(opened.path) if opened.is_local else 0,
        "built_from": _built_from(opened.path) if opened.is_local else None,
    }


def _describe(values: npt.NDArray[Any]) -> dict[str, Any] | None:
    if not len(values):
        return None
    counts, edges = np.histogram(values.astype(np.float64), bins=_NUM_BINS if values.min() < values.max() else 1)
    return {
        "min": _number(values.min()),
        "median": _number(np.median(values)),
        "mean": _number(values.mean(dtype=np.float64)),
        "max": _number(values.max()),
        "total": _number(values.sum(dtype=np.float64)),
        "histogram": {"edges": [_number(edge) for edge in edges], "counts": [int(count) for count in counts]},
    }


def _number(value: Any) -> int | float:
    number = round(float(value), 4)
    return int(number) if number.is_integer() else number


def _count_metadata(dataset: Dataset) -> tuple[dict[str, int], dict[str, int], int]:
    """Samples by label (its name where there is one) and by speaker, and of how many samples."""
    most = min(len(dataset), MAX_METADATA if dataset.is_local else MAX_REMOTE_METADATA)
    ids = np.unique(np.linspace(0, len(dataset) - 1, most).astype(np.int64))
    labels: Counter[str] = Counter()
    speakers: Counter[str] = Counter()
    order: dict[str, tuple[bool, Any]] = {}
    for position in ids.tolist():
        try:
            metadata = dataset.metadata(position)
        except DecodeError:
            continue
        label = metadata.get("label")
        name = metadata.get("label_name", label)
        if name is not None:
            labels[str(name)] += 1
            order.setdefault(str(name), (not isinstance(label, int), label if isinstance(label, int) else str(name)))
        if metadata.get("speaker") is not None:
            speakers[str(metadata["speaker"])] += 1
    by_label = sorted(labels, key=lambda name: order[name])
    return {name: labels[name] for name in by_label}, dict(speakers.most_common()), len(ids)


def _count_quarantined(folder: Path) -> int:
    file = folder / "quarantine.jsonl"
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


def _built_from(folder: Path) -> Any:
    """What build.json says of the source; null for tars that came from elsewhere."""
    try:
        return json.loads((folder / "build.json").read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def table(description: dict[str, Any]) -> Group:
    """`info`'s result for people, as something that a rich console prints."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

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
        facts.add_row(name, Text(value))

    together = Table("samples with", "count", box=None, pad_edge=False)
    for name, count in description["combinations"].items():
        together.add_row(name, f"{count:,}")

    sizes = Table("", "min", "median", "mean", "max", "total", "from min to max", box=None, pad_edge=False)
    for name in ("image_width", "image_height", "audio_seconds", "text_bytes"):
        values = description[name]
        if values is not None:
            numbers = [f"{values[what]:,}" for what in ("min", "median", "mean", "max")]
            numbers.append("" if name.startswith("image") else f"{values['total']:,}")
            sizes.add_row(name.replace("_", " "), *numbers, _bars(values["histogram"]["counts"]))

    parts: list[Any] = [facts, "", together, "", sizes]
    for name in ("labels", "speakers"):
        if description[name]:
            parts += ["", Text(_listed(name, description[name]))]
    if description["metadata_samples"] < description["num_samples"]:
        parts.append(Text(f"labels and speakers of {description['metadata_samples']:,} samples, spread evenly"))
    return Group(*parts)


def _bars(counts: list[int]) -> str:
    levels = "▁▂▃▄▅▆▇█"
    return "".join(" " if not n else levels[(n * 8 - 1) // max(counts)] for n in counts)


def _listed(name: str, counts: dict[str, int]) -> str:
    shown = ", ".join(f"{value} {count:,}" for value, count in list(counts.items())[:_NUM_SHOWN])
    more = f", and {len(counts) - _NUM_SHOWN:,} more" if len(counts) > _NUM_SHOWN else ""
    return f"{len(counts):,} {name}: {shown}{more}"

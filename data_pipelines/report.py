"""What is in a dataset: counts, which modalities come together, how large things are, labels and speakers.

Sizes come from the indexes; labels, speakers and tokens from the samples themselves, of at most `MAX_READ` samples
spread evenly over the dataset, and of fewer behind a URL. `tables` draws it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.dataset import MAX_TEXT_BYTES, Dataset, open_dataset
from data_pipelines.decode import DecodeError, decode_text
from data_pipelines.index import MODALITIES

MAX_READ = 100_000
MAX_READ_REMOTE = 128
_NUM_BINS = 10
_NUM_SIZES = 20
_READ_TEXTS = 1024


def info(dataset: str | Path | Dataset, tokenizer: str | Path | None = None) -> dict[str, Any]:
    """A description of a dataset that JSON can hold.

    `combinations` counts samples by the modalities they have (`image+text+audio`). `image_width`, `image_height` and
    `image_pixels`, `audio_seconds`, `text_bytes` and, with the folder of a Hugging Face `tokenizer`, `text_tokens` have
    min, median, mean, max, total and a histogram (`edges`, `counts`), and are null where no sample has the modality;
    the bins grow by a factor where a few values are far above the rest. `image_sizes` counts the most common
    `WIDTHxHEIGHT` of `num_image_sizes`. `labels` and `speakers` map names to counts. Raises `BadInput`.
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
    sized = there["image"] & (column["width"] > 0)
    width, height = column["width"][sized], column["height"][sized]
    image_sizes = _count_sizes(width, height)
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
        "image_width": _describe(width),
        "image_height": _describe(height),
        "image_pixels": _describe(width.astype(np.int64) * height),
        "image_sizes": dict(image_sizes.most_common(_NUM_SIZES)),
        "num_image_sizes": len(image_sizes),
        "audio_seconds": _describe(column["audio_seconds"][there["audio"]]),
        "text_bytes": _describe(column["text_size"][there["text"]]),
        "text_tokens": None if tokenizer is None else _describe(_count_tokens(opened, Path(tokenizer))),
        "labels": labels,
        "speakers": speakers,
        "metadata_samples": num_read,
        "quarantined": _count_quarantined(opened.path) if opened.is_local else 0,
        "built_from": _built_from(opened.path) if opened.is_local else None,
    }


def _describe(values: npt.NDArray[Any]) -> dict[str, Any] | None:
    if not len(values):
        return None
    counts, edges = np.histogram(values.astype(np.float64), bins=_bin_edges(values))
    return {
        "min": _number(values.min()),
        "median": _number(np.median(values)),
        "mean": _number(values.mean(dtype=np.float64)),
        "max": _number(values.max()),
        "total": _number(values.sum(dtype=np.float64)),
        "histogram": {"edges": [_number(edge) for edge in edges], "counts": [int(count) for count in counts]},
    }


def _bin_edges(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.array([low, high])
    # Of even bins the first would hold nearly all, where a few values are far above the rest.
    if low > 0 and high > 20 * float(np.median(values)):
        edges = np.geomspace(low, high, _NUM_BINS + 1)
        edges[0], edges[-1] = low, high
        return edges
    if np.issubdtype(values.dtype, np.integer):
        step = -(-int(high - low) // _NUM_BINS)
        return np.arange(low, high + step, step)
    return np.linspace(low, high, _NUM_BINS + 1)


def _count_sizes(width: npt.NDArray[Any], height: npt.NDArray[Any]) -> Counter[str]:
    sizes, counts = np.unique(width.astype(np.int64) << 32 | height, return_counts=True)
    return Counter(
        {f"{size >> 32}x{size & 0xFFFFFFFF}": n for size, n in zip(sizes.tolist(), counts.tolist(), strict=True)}
    )


def _count_tokens(dataset: Dataset, folder: Path) -> npt.NDArray[np.int64]:
    """Tokens of each text, without begin and end; texts that do not decode are left out."""
    from data_pipelines.tokenizer import TextEncoder, load_folder

    encode = TextEncoder.of(load_folder(folder))
    ids = _spread(dataset)
    counts: list[int] = []
    for start in range(0, len(ids), _READ_TEXTS):
        for raw in dataset.read(ids[start : start + _READ_TEXTS], ("text",), {"text": MAX_TEXT_BYTES}):
            try:
                text = None if raw.text is None else decode_text(raw.text, MAX_TEXT_BYTES)
            except DecodeError:
                continue
            if text is not None:
                counts.append(len(encode(text)))
    return np.array(counts, dtype=np.int64)


def _spread(dataset: Dataset) -> npt.NDArray[np.int64]:
    """Ids of the samples that are read."""
    most = min(len(dataset), MAX_READ if dataset.is_local else MAX_READ_REMOTE)
    return np.unique(np.linspace(0, len(dataset) - 1, most).astype(np.int64))


def _number(value: Any) -> int | float:
    number = round(float(value), 4)
    return int(number) if number.is_integer() else number


def _count_metadata(dataset: Dataset) -> tuple[dict[str, int], dict[str, int], int]:
    """Samples by label (its name where there is one) and by speaker, and of how many samples."""
    ids = _spread(dataset)
    labels: Counter[str] = Counter()
    speakers: Counter[str] = Counter()
    order: dict[str, tuple[bool, Any]] = {}
    for position in ids.tolist():
        try:
            metadata = dataset.metadata(position)
        except DecodeError:
            continue
        label = metadata.get("label")
        name = _text(metadata.get("label_name", label))
        if name is not None:
            labels[name] += 1
            order.setdefault(name, (not isinstance(label, int), label if isinstance(label, int) else name))
        speaker = _text(metadata.get("speaker"))
        if speaker is not None:
            speakers[speaker] += 1
    by_label = sorted(labels, key=lambda name: order[name])
    return {name: labels[name] for name in by_label}, dict(speakers.most_common()), len(ids)


def _text(value: Any) -> str | None:
    """A metadata value as text that UTF-8 can hold: JSON may carry lone surrogates."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _count_quarantined(folder: Path) -> int:
    file = folder / "quarantine.jsonl"
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


def _built_from(folder: Path) -> Any:
    """What build.json says of the source; null for tars that came from elsewhere."""
    try:
        source = json.loads((folder / "build.json").read_bytes())["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return source if isinstance(source, dict) else None

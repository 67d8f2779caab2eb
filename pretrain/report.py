"""One HTML page about a run: what it read, how it learnt, what it can do. No script, nothing from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_pipelines.atomic import atomic_file
from data_pipelines.config import AudioConfig
from data_pipelines.dataset import Dataset
from data_pipelines.decode import DecodeError, load_audio, to_int16
from data_pipelines.headers import image_size
from data_pipelines.pictures import data_uri, spectrogram_png
from data_pipelines.shard import Sample
from pretrain.charts import line_chart
from pretrain.features import log_mel
from pretrain.results import blocks

TEMPLATE = "report_template.html"
_IMAGE_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_AUDIO_TYPES = {"flac": "audio/flac", "wav": "audio/wav", "mp3": "audio/mpeg", "ogg": "audio/ogg"}
_CHARTS = (
    ("loss", "total loss", ""),
    ("loss_text", "text: nats a token", ""),
    ("loss_align", "alignment: nats a pair", ""),
    ("loss_image", "masked patches", ""),
    ("loss_audio", "masked sound frames", ""),
    ("logit_scale", "scale of the similarities", ""),
    ("lr", "learning rate", ""),
    ("grad_norm", "gradient norm", ""),
    ("samples_per_second", "samples a second", ""),
)


@dataclass(frozen=True)
class Example:
    """One sample as the page shows it. Addresses hold the data itself; None is a missing modality."""

    key: str
    picture: str | None
    picture_small: bool
    spectrogram: str | None
    audio: str | None
    texts: list[tuple[str, str]]
    absent: str = "no"
    """What stands before `picture` or `sound` in the place of one that is not there."""


@dataclass(frozen=True)
class Group:
    """A titled row of examples."""

    title: str
    note: str
    examples: list[Example]


@dataclass(frozen=True)
class Report:
    """Everything on the page; what is empty is left out."""

    name: str
    subtitle: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] | None = None
    groups: list[Group] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    verification: tuple[bool, str] | None = None


def write_report(report: Report, path: Path) -> None:
    """Write the page to a file that appears whole or not at all."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template(TEMPLATE).render(
        name=report.name,
        subtitle=report.subtitle,
        tiles=_tiles(report),
        charts=_charts(report.metrics),
        blocks=blocks(report.results) if report.results else [],
        evaluation_data=(report.results or {}).get("data", {}).get("name", ""),
        evaluation_samples=(report.results or {}).get("num_samples", 0),
        groups=report.groups,
        facts=report.facts,
        verification=report.verification and {"verified": report.verification[0], "text": report.verification[1]},
    )
    with atomic_file(path) as file:
        file.write(html.encode("utf-8"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, one a step, in order; a step that was done again counts as it was done last."""
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
            found[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            continue
    return [found[step] for step in sorted(found)]


def spread(dataset: Dataset, number: int, need: Sequence[str] = ()) -> list[int]:
    """Ids of samples spread evenly over a dataset, among those that have the modalities in `need`."""
    ids = np.arange(len(dataset))
    for modality in need:
        ids = ids[dataset.sizes(modality, ids) > 0]
    return ids[np.unique(np.linspace(0, len(ids) - 1, number).astype(int))].tolist() if len(ids) else []


def example(
    sample: Sample, audio: AudioConfig, texts: Sequence[tuple[str, str | None]], only: str | None = None
) -> Example:
    """A sample for the page, with its picture, spectrogram and sound inside.

    Args:
        sample: what to show; a picture or sound that does not decode is shown as missing.
        audio: how the model hears, for the spectrogram.
        texts: labels and texts to put below; None is left out.
        only: `image` or `audio` shows that member alone; None shows what there is.
    """
    if only is not None:
        sample = replace(sample, **{"audio" if only == "image" else "image": None})
    picture, small, spectrogram, sound = None, False, None, None
    header = image_size(sample.image) if sample.image is not None else None
    if sample.image is not None and header is not None:
        picture, small = data_uri(sample.image, _IMAGE_TYPES[header[0]]), max(header[1:]) <= 64
    if sample.audio is not None:
        try:
            wave = torch.from_numpy(to_int16(load_audio(sample.audio, audio)))[None]
            mel, mask = log_mel(wave, torch.tensor([wave.shape[1]]), audio)
        except DecodeError:
            pass
        else:
            if mask.any():
                spectrogram = data_uri(spectrogram_png(mel[0][mask[0]].numpy()), "image/png")
            sound = data_uri(sample.audio, _AUDIO_TYPES[sample.audio_extension])
    shown = [(label, text) for label, text in texts if text is not None]
    return Example(sample.key, picture, small, spectrogram, sound, shown, "no" if only is None else "without the")


def _charts(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    charts = []
    for name, title, unit in _CHARTS:
        pairs = [(record["step"], float(record[name])) for record in metrics if record.get(name) is not None]
        if any(math.isfinite(value) for _, value in pairs):
            steps, values = [step for step, _ in pairs], [value for _, value in pairs]
            charts.append({"title": title, "svg": line_chart(steps, values, title, unit)})
    return charts


def _tiles(report: Report) -> list[dict[str, str]]:
    tiles = []
    if report.results:
        zero_shot, retrieval = report.results["zero_shot"], report.results["retrieval"]
        shares = [
            (zero_shot["image_top1"], "images named, zero-shot"),
            (zero_shot["audio_top1"], "sounds named, zero-shot"),
            (retrieval["image_to_audio_class_p1"], "image to sound, class P@1"),
        ]
        tiles += [{"value": f"{100 * value:.1f} %", "label": label} for value, label in shares if value is not None]
        loss = report.results["caption"]["loss"]
        if loss is not None:
            tiles.append({"value": f"{loss:.3f}", "label": "caption loss, nats a token"})
    if report.metrics:
        last = report.metrics[-1]
        tiles.append({"value": f"{last['step']:,}", "label": f"steps, {last['samples_seen']:,} samples"})
        seconds = sum(record["step_seconds"] for record in report.metrics)
        tiles.append({"value": _duration(seconds), "label": "in training steps"})
    return tiles


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""What a dataset holds, counted from its index, for the model card."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.dataset import Dataset
from data_pipelines.decode import DecodeError

_BLOCK = 100_000
_MAX_METADATA = 200_000


@dataclass(frozen=True)
class Provenance:
    """Counts of one dataset. `role` is `training` or `evaluation`."""

    name: str
    role: str
    fingerprint: str
    num_samples: int
    image: int
    text: int
    audio: int
    all_three: int
    audio_seconds: float
    built_from: str
    """What `triptych data build` read, in words; empty for tars that came from elsewhere."""

    @property
    def hours(self) -> str:
        """Hours of sound, as people read them."""
        return f"{self.audio_seconds / 3600:.2f}"


def count(dataset: Dataset, role: str) -> Provenance:
    """Count a dataset from its index alone; no sample is read."""
    image = text = audio = every = 0
    seconds = 0.0
    for start in range(0, len(dataset), _BLOCK):
        ids = np.arange(start, min(start + _BLOCK, len(dataset)))
        has = [dataset.sizes("image", ids) >= 0, dataset.sizes("text", ids) > 0, dataset.sizes("audio", ids) >= 0]
        image, text, audio = image + int(has[0].sum()), text + int(has[1].sum()), audio + int(has[2].sum())
        every += int((has[0] & has[1] & has[2]).sum())
        seconds += float(dataset.costs(ids).audio_seconds.astype(np.float64).sum())
    return Provenance(
        name=dataset.name,
        role=role,
        fingerprint=dataset.fingerprint,
        num_samples=len(dataset),
        image=image,
        text=text,
        audio=audio,
        all_three=every,
        audio_seconds=round(seconds, 3),
        built_from=_built_from(dataset.path),
    )


def _built_from(folder: Path) -> str:
    try:
        source = json.loads((folder / "build.json").read_bytes())["source"]
        facts = [(name, value) for name, value in source.items() if isinstance(value, (str, int)) and value != ""]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    # A card is for strangers: names of files, not where they lay.
    return ", ".join(f"{name} {Path(value).name if isinstance(value, str) else value}" for name, value in facts)


def licences(dataset: Dataset) -> dict[str, int]:
    """What the samples' metadata say in fields whose names hold `license` or `licence`, most frequent first.

    Empty for datasets of more than 200,000 samples, or behind a URL, whose metadata would take long to read.
    """
    if len(dataset) > _MAX_METADATA or not dataset.is_local:
        return {}
    found: Counter[str] = Counter()
    for i in range(len(dataset)):
        try:
            metadata = dataset.metadata(i)
        except DecodeError:
            continue
        for name, value in metadata.items():
            if ("license" in name.lower() or "licence" in name.lower()) and isinstance(value, str) and value:
                found[f"{name}: {value}"] += 1
    return dict(found.most_common())

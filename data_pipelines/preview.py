"""One HTML page that shows what is in a dataset: pictures, sounds with their spectrograms, captions, metadata.

The page holds everything in itself and asks nobody for anything; its content security policy says so to the browser,
and names the one script that may run by its hash. Foreign bytes do not reach the browser: pictures and sounds are
decoded here and encoded again, texts are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data_pipelines.atomic import atomic_file
from data_pipelines.config import AudioConfig, ImageConfig
from data_pipelines.dataset import MAX_METADATA_BYTES, MAX_TEXT_BYTES, Dataset, RawSample, open_dataset
from data_pipelines.decode import (
    MAX_AUDIO_BYTES,
    MAX_IMAGE_BYTES,
    DecodeError,
    decode_metadata,
    decode_text,
    load_audio,
    load_image,
)
from data_pipelines.errors import BadInput
from data_pipelines.headers import audio_rate
from data_pipelines.index import MEMBERS, MODALITIES
from data_pipelines.pictures import data_uri, mel_levels, spectrogram_png, thumbnail
from data_pipelines.progress import Progress

_FOLDER = Path(__file__).parent
_TEMPLATE, _SCRIPT, _STYLE = "preview_template.html", "preview_script.js", "preview_style.css"
_THUMBNAIL_SIDE = 320
_SMALL_SIDE = 64
_SPECTROGRAM_WIDTH = 400
_RATES = (8_000, 16_000, 24_000)
_MAX_SECONDS = 15.0
_MAX_CHARACTERS = 1_000
_MAX_VALUE_CHARACTERS = 200
_MAX_VALUES = 40
_LIMITS = {"image": MAX_IMAGE_BYTES, "audio": MAX_AUDIO_BYTES, "text": MAX_TEXT_BYTES, "json": MAX_METADATA_BYTES}
_IMAGE = ImageConfig()


@dataclass
class Card:
    """One sample as the page shows it. Addresses hold the data itself; None is a missing modality."""

    key: str
    shard: str
    position: int
    modalities: str
    picture: str | None = None
    picture_note: str = ""
    small: bool = False
    spectrogram: str | None = None
    sound: str | None = None
    sound_note: str = ""
    text: str | None = None
    label: str | None = None
    metadata: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def write_preview(
    dataset: str | Path | Dataset, out: Path, *, samples: int = 48, seed: int | None = None, progress: bool = True
) -> list[str]:
    """Write the page about `samples` samples to `out`, whole or not at all; returns the keys that it shows.

    Args:
        dataset: a dataset folder.
        out: the HTML file.
        samples: how many, spread evenly over the dataset, or all where there are fewer.
        seed: draw them at random instead; the same seed draws the same ones.
        progress: tell on standard error how far the work is.

    Raises:
        BadInput: no such dataset, a tar is gone, or `out` cannot be written. What does not decode is said on the page.
    """
    if samples < 1:
        raise BadInput(f"samples {samples}: give 1 or more")
    if Path(out).is_dir():
        raise BadInput(f"{out}: is a folder; give the name of an HTML file")
    opened = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    ids = choose(len(opened), samples, seed)
    cards: list[Card] = []
    with Progress("drawing", "samples", quiet=not progress) as shown:
        shown.start(len(ids))
        for position in ids.tolist():
            cards.append(_card(opened, position))
            shown.advance(1)
    how = "all of them" if len(ids) == len(opened) else f"{len(ids):,} of them, "
    if len(ids) < len(opened):
        how += "spread evenly" if seed is None else f"drawn at random with seed {seed}"
    html = _render(opened, cards, how)
    try:
        with atomic_file(Path(out)) as file:
            # A lone surrogate, which JSON can hold, has no UTF-8.
            file.write(html.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise BadInput(f"{out}: cannot be written ({error.strerror})") from error
    return [card.key for card in cards]


def choose(num_samples: int, wanted: int, seed: int | None) -> npt.NDArray[np.int64]:
    """Ids of at most `wanted` of `num_samples` samples, sorted: spread evenly, or drawn with a seed."""
    wanted = min(wanted, num_samples)
    if seed is None:
        return np.unique(np.linspace(0, num_samples - 1, wanted).astype(np.int64))
    if seed < 0:
        raise BadInput(f"seed {seed}: give 0 or more")
    return np.sort(np.random.default_rng(seed).choice(num_samples, wanted, replace=False))


def _card(dataset: Dataset, position: int) -> Card:
    [raw] = dataset.read([position], MEMBERS, _LIMITS)
    there = {name: int(dataset.sizes(name, [position])[0]) for name in MODALITIES}
    modalities = "+".join(name for name, size in there.items() if size >= (1 if name == "text" else 0))
    card = Card(raw.key, raw.shard, position, modalities)
    if raw.too_large is not None:
        card.faults.append(f"{raw.too_large}: larger than {_LIMITS[raw.too_large]} bytes")
    for name, add in (("image", _add_picture), ("audio", _add_sound), ("text", _add_text), ("json", _add_metadata)):
        data = getattr(raw, name)
        if data is not None:
            try:
                add(card, data, raw)
            except DecodeError as error:
                card.faults.append(f"{name}: {error}")
    return card


def _add_picture(card: Card, data: bytes, raw: RawSample) -> None:
    image = load_image(data, _IMAGE.max_pixels)
    card.picture = data_uri(*thumbnail(image, _THUMBNAIL_SIDE, _SMALL_SIDE))
    card.picture_note = f"{image.width} x {image.height} {raw.image_extension}, {_size(len(data))}"
    card.small = max(image.size) <= _SMALL_SIDE


def _add_sound(card: Card, data: bytes, raw: RawSample) -> None:
    wave, rate = _load_sound(data)
    seconds = len(wave) / rate
    cut = f", the first {seconds:g} s" if seconds >= _MAX_SECONDS else ""
    card.sound_note = f"{seconds:.2f} s {raw.audio_extension}, {_size(len(data))}{cut}, 0 to {rate // 2000} kHz"
    mel = mel_levels(wave, rate)
    # The browser draws it larger and smoother; here each pixel costs a byte.
    png = spectrogram_png(mel, height=mel.shape[1], width=min(len(mel), _SPECTROGRAM_WIDTH))
    card.spectrogram = data_uri(png, "image/png")
    card.sound = _player_uri(wave, rate)


def _load_sound(data: bytes) -> tuple[npt.NDArray[np.float32], int]:
    """A sound as it is played: mono, at the highest of a few rates that it fills."""
    own = audio_rate(data)
    rate = max([_RATES[0], *(rate for rate in _RATES if rate <= own)])
    return load_audio(data, AudioConfig(sampling_rate=rate, max_seconds=_MAX_SECONDS)), rate


def _player_uri(wave: npt.NDArray[np.float32], rate: int) -> str:
    file = io.BytesIO()
    clipped = np.clip(wave, -1, 1)
    if "MP3" in soundfile.available_formats():
        soundfile.write(file, clipped, rate, format="MP3", subtype="MPEG_LAYER_III")
        return data_uri(file.getvalue(), "audio/mpeg")
    soundfile.write(file, clipped, rate, format="FLAC")
    return data_uri(file.getvalue(), "audio/flac")


def _add_text(card: Card, data: bytes, raw: RawSample) -> None:
    text = decode_text(data, MAX_TEXT_BYTES)
    card.text = None if text is None else _cut(text, _MAX_CHARACTERS)


def _add_metadata(card: Card, data: bytes, raw: RawSample) -> None:
    values = decode_metadata(data, MAX_METADATA_BYTES)
    label = values.get("label_name", values.get("label"))
    card.label = None if label is None else _shown(label)
    card.metadata = [(_cut(name, 60), _shown(value)) for name, value in list(values.items())[:_MAX_VALUES]]
    if len(values) > _MAX_VALUES:
        card.metadata.append(("...", f"and {len(values) - _MAX_VALUES} more"))


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _cut(text, _MAX_VALUE_CHARACTERS)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def _render(dataset: Dataset, cards: list[Card], how: str) -> str:
    script, style = (Markup((_FOLDER / name).read_text(encoding="utf-8")) for name in (_SCRIPT, _STYLE))
    counts: dict[str, int] = {}
    for card in cards:
        counts[card.modalities] = counts.get(card.modalities, 0) + 1
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(_TEMPLATE).render(
        dataset=dataset,
        num_bytes=_size(sum(shard.bytes for shard in dataset.shards)),
        how=how,
        cards=cards,
        combinations=sorted(counts.items(), key=lambda item: (-item[1], item[0])),
        script=script,
        style=style,
        script_hash=_csp_hash(script),
        style_hash=_csp_hash(style),
    )


def _csp_hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")

"""The embedded source: real handwriting, spoken digits and captions, without a download.

Pictures are scikit-learn's 1,797 handwritten digits (UCI optdigits, 8x8), the first 1,440 for training and the last
357, mostly of other writers, for testing (3 nearest neighbours: 0.958; 0.98 to 0.99 with writers mixed). Speech is
espeak-ng's; the voices of the test split speak in no training tuple. Which picture and which voice belong to which
split does not depend on the seed, so that a training set of one seed and a test set of another stay apart.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample
from data_pipelines.sources.captions import (
    WORDS,
    accent_name,
    caption,
    describe_pixels,
    picture_phrase,
    sound_phrase,
)
from data_pipelines.sources.source import Note, Row, RowFault
from data_pipelines.sources.speech import INSTALL, Utterance, Voice, check_voices, say

SIDE = 28
_TRAIN_IMAGES = 1440
_SIZES = {"train": 3000, "test": 500}
_MISSING_SHARE = 0.15
_ACCENTS = (
    "en",
    "en-US",
    "en-US-nyc",
    "en-GB-scotland",
    "en-GB-x-rp",
    "en-GB-x-gbclan",
    "en-GB-x-gbcwmd",
    "en-029",
)
# Whispers, echoes and robots are left out, and two variants (Reed, caleb) that read memory they never set. Versions of
# one voice stay on one side.
_VARIANTS = {
    "train": (
        *(
            "m1",
            "m2",
            "m3",
            "m4",
            "m5",
            "m6",
            "f1",
            "f2",
            "f3",
            "klatt",
            "klatt3",
            "klatt4",
            "klatt6",
            "Alex",
            "Andrea",
        ),
        *("Annie", "Denis", "Diogo", "Gene", "Gene2", "Jacky", "Mario", "Michael", "Mike", "Storm", "adam", "anika"),
        *("antonio", "aunty", "belinda", "boris", "croak", "edward", "edward2", "fast", "gustave", "iven", "iven2"),
        *("john", "linda", "marcelo", "max", "michel", "pablo", "paul", "pedro", "quincy", "rob", "robert", "sandro"),
    ),
    "test": ("m7", "m8", "f4", "f5", "announcer", "benjamin", "david", "grandma", "grandpa", "ian", "miguel", "steph"),
}


@dataclass(frozen=True)
class DigitsSource:
    """The source `digits`. `split` is `train`, `test`, or None for both, one after the other."""

    split: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split is not None and self.split not in _SIZES:
            raise BadInput(f"digits: no split {self.split!r}; the splits are {', '.join(map(repr, _SIZES))}")

    @property
    def label(self) -> str:
        """`digits`."""
        return "digits"

    @property
    def default_name(self) -> str:
        """`digits`, and the split."""
        return f"digits-{self.split}" if self.split else "digits"

    @property
    def shard_prefix(self) -> str:
        """The split, or `digits`."""
        return self.split or "digits"

    def identity(self) -> dict[str, Any]:
        """Kind, split and seed."""
        return {"kind": "digits", "split": self.split, "seed": self.seed}

    def rows(self) -> Iterator[Row | RowFault | Note]:
        """Tuples, labels balanced as the pictures are. A row's references hold all that its bytes are made of."""
        pictures = _load_pictures()
        number = 0
        for split in _SIZES if self.split is None else (self.split,):
            voices = _voices(split)
            check_voices(voices)
            images = range(_TRAIN_IMAGES) if split == "train" else range(_TRAIN_IMAGES, len(pictures))
            draw = random.Random(f"digits {self.seed} {split}")
            without = _missing(_SIZES[split], draw)
            for place, image in enumerate(_cycle(images, _SIZES[split], draw)):
                number += 1
                yield _tuple(number, place, split, image, *pictures[image], draw.choice(voices), without[place], draw)

    def read(self, row: Row) -> Sample:
        """Draw and speak one tuple. The bytes depend on the row alone."""
        return Sample(
            key=row.key,
            image=None if row.image is None else _draw_png(bytes.fromhex(row.image)),
            text=row.text,
            audio=None if row.audio is None else say(_utterance(row.audio)),
            metadata=row.metadata,
            image_extension="png",
            audio_extension="flac",
        )


def _voices(split: str) -> list[Voice]:
    return [Voice(accent, variant) for variant in _VARIANTS[split] for accent in _ACCENTS]


def _load_pictures() -> list[tuple[bytes, int]]:
    """(64 pixels of 0..16, label) of each picture."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BadInput(f"source `digits` needs scikit-learn for its pictures: {INSTALL}") from error
    loaded = load_digits()
    return [(bytes(map(int, x)), int(y)) for x, y in zip(loaded.data.tolist(), loaded.target.tolist(), strict=True)]


def _cycle(images: range, size: int, draw: random.Random) -> list[int]:
    """`size` pictures, shuffled anew each time around."""
    order: list[int] = []
    while len(order) < size:
        order += draw.sample(images, len(images))
    return order[:size]


def _missing(size: int, draw: random.Random) -> list[str | None]:
    """What each tuple lacks: an image, a sound, or nothing. The shares are exact."""
    share = round(size * _MISSING_SHARE)
    return draw.sample(["image"] * share + ["audio"] * share + [None] * (size - 2 * share), size)


def _tuple(
    number: int,
    place: int,
    split: str,
    image: int,
    pixels: bytes,
    digit: int,
    voice: Voice,
    without: str | None,
    draw: random.Random,
) -> Row:
    speed, pitch, pitch_range = draw.randint(120, 220), draw.randint(30, 70), draw.randint(20, 80)
    # A question or an exclamation has another melody.
    utterance = (
        WORDS[digit] + draw.choice(("", "", "?", "!")),
        voice.accent,
        voice.variant,
        speed,
        pitch,
        pitch_range,
        draw.randint(35, 95) / 100,
    )
    has_image, has_audio = without != "image", without != "audio"
    picture = picture_phrase(digit, describe_pixels(pixels), draw) if has_image else None
    sound = sound_phrase(digit, voice.accent, speed, pitch, draw) if has_audio else None
    metadata: dict[str, Any] = {"split": split, "label": digit, "label_name": WORDS[digit]}
    if has_image:
        metadata["image_source"] = f"scikit-learn digits {image}"
    if has_audio:
        metadata |= {"speaker": str(voice), "accent": accent_name(voice.accent), "audio_source": "espeak-ng"}
    return Row(
        number,
        f"{split}-{place:05d}",
        pixels.hex() if has_image else None,
        caption(picture, sound, draw),
        json.dumps(utterance) if has_audio else None,
        metadata,
    )


def _utterance(reference: str) -> Utterance:
    text, accent, variant, speed, pitch, pitch_range, peak = json.loads(reference)
    return Utterance(text, Voice(accent, variant), speed, pitch, pitch_range, peak)


def _draw_png(pixels: bytes) -> bytes:
    """White on black, `SIDE` pixels square, 8-bit gray, from 8x8 pixels of 0..16."""
    import numpy as np
    from PIL import Image

    # The writing reaches the edge of the 8x8 grid: a border keeps it whole when it is shifted.
    grid = np.pad(np.frombuffer(pixels, dtype=np.uint8).reshape(8, 8), 1).astype(np.float32) * (255 / 16)
    smooth = Image.fromarray(grid).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    Image.fromarray(np.asarray(smooth).clip(0, 255).round().astype(np.uint8)).save(file, format="PNG", optimize=False)
    return file.getvalue()

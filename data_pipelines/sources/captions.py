"""Captions of spoken and handwritten digits: templates, varied, that say only what is there.

A digit is named by its word or its numeral. Adjectives of a picture are measured from its pixels, those of a sound come
from how it was spoken.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Quantiles over scikit-learn's digits: between a tenth and a fifth of them lies beyond each.
_BOLD_INK, _THIN_INK = 0.335, 0.272
_WIDE, _NARROW = 0.65, 0.48
_LEAN = 0.2

_PICTURES = (
    "a picture of {a_adjective_digit}",
    "a picture of the digit {digit}",
    "an image of {a_adjective_digit}",
    "{a_adjective_handwritten_digit}",
    "{a_adjective_white_digit} on a black background",
    "the number {digit} written by hand",
    "a scan of {a_adjective_handwritten_digit}",
    "somebody wrote {a_adjective_digit} here",
    "{adjective}handwriting of the numeral {digit}",
)
_SOUNDS = (
    "the sound of {word}",
    "the sound of the word {word}",
    "somebody says {digit}",
    "a {voice} saying {word}",
    "the word {word} spoken {manner}",
    "a recording of the number {digit}",
    "{word}, read aloud in {accent} English",
    "{an_accent} speaker says {digit}",
    "a short spoken {word}",
)
_JOINS = ("{} and {}", "{}, with {}", "{}; {}", "{} together with {}", "{} while you hear {}")
_ACCENTS = {
    "en": "British",
    "en-US": "American",
    "en-US-nyc": "New York",
    "en-GB-scotland": "Scottish",
    "en-GB-x-rp": "London",
    "en-GB-x-gbclan": "Lancashire",
    "en-GB-x-gbcwmd": "West Midlands",
    "en-029": "Caribbean",
}


def accent_name(accent: str) -> str:
    """`en-GB-scotland` as `Scottish`."""
    return _ACCENTS[accent]


def describe_pixels(pixels: bytes) -> list[str]:
    """Adjectives that fit 8x8 pixels of 0..16, one byte each: bold, thin, wide, narrow, slanted, or none of them."""
    grid = np.frombuffer(pixels, dtype=np.uint8).reshape(8, 8) / 16.0
    ink, cells = float(grid.mean()), np.arange(8)
    down, across = grid.sum(axis=1) / grid.sum(), grid.sum(axis=0) / grid.sum()
    y, x = cells - down @ cells, cells - across @ cells
    height, width = float(np.sqrt(down @ y**2)), float(np.sqrt(across @ x**2))
    lean = float(y @ grid @ x) / float(grid.sum()) / height**2
    found = []
    if ink > _BOLD_INK:
        found.append("bold")
    elif ink < _THIN_INK:
        found.append("thin")
    if width > _WIDE * height:
        found.append("wide")
    elif width < _NARROW * height:
        found.append("narrow")
    if abs(lean) > _LEAN:
        found.append("slanted")
    return found


def _article(phrase: str) -> str:
    """`a` or `an`, by the first sound of what follows."""
    vowel = phrase[0] in "aeioA8" and not phrase.startswith("one")
    return f"an {phrase}" if vowel else f"a {phrase}"


def _name(digit: int, draw: random.Random) -> str:
    return WORDS[digit] if draw.random() < 0.6 else str(digit)


def picture_phrase(digit: int, adjectives: Sequence[str], draw: random.Random) -> str:
    """What the picture shows."""
    adjective = draw.choice(adjectives) + " " if adjectives and draw.random() < 0.6 else ""
    name = _name(digit, draw)
    return draw.choice(_PICTURES).format(
        digit=name,
        adjective=adjective,
        a_adjective_digit=_article(f"{adjective}{name}"),
        a_adjective_white_digit=_article(f"{adjective}white {name}"),
        a_adjective_handwritten_digit=_article(f"{adjective}handwritten {name}"),
    )


def sound_phrase(digit: int, accent: str, speed: int, pitch: int, draw: random.Random) -> str:
    """What is heard. `speed` in words a minute and `pitch` 0..99 are espeak-ng's."""
    manner = "slowly" if speed < 140 else "quickly" if speed > 190 else "clearly"
    voice = "low voice" if pitch < 40 else "high voice" if pitch > 60 else "calm voice"
    return draw.choice(_SOUNDS).format(
        digit=_name(digit, draw),
        word=WORDS[digit],
        manner=manner,
        voice=voice,
        accent=accent_name(accent),
        an_accent=_article(accent_name(accent)),
    )


def caption(picture: str | None, sound: str | None, draw: random.Random) -> str:
    """One caption of what is there. With both there, one in three speaks of only one of them."""
    phrases = [phrase for phrase in (picture, sound) if phrase is not None]
    if len(phrases) == 2:
        choice = draw.random()
        if choice < 1 / 3:
            phrases = [phrases[choice < 1 / 6]]
        elif choice < 0.6:
            phrases.reverse()
    text = phrases[0] if len(phrases) == 1 else draw.choice(_JOINS).format(*phrases)
    if draw.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + "." if draw.random() < 0.3 else text

"""Captions as they should be: one Unicode form, no control characters, single spaces, and, if asked, no HTML.

Every step is linear in the text, whoever wrote it. Unicode normalization is not (a run of 40,000 combining marks takes
minutes), so runs are first cut to the 30 marks that Unicode's stream-safe format allows (UAX #15, section 13).
"""

from __future__ import annotations

import html
import re
import unicodedata

_MAX_MARKS = 30
# Known elements alone: `<PERSON>` in a caption is a placeholder, and `a<b` is none either.
_BLOCKS = "address article aside blockquote br dd div dl dt figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr"
_BLOCKS += " li main nav ol option p pre section select table tbody td tfoot th thead tr ul"
_INLINE = "a abbr acronym b bdi bdo big button cite code del dfn em embed font i iframe img input ins kbd label link"
_INLINE += " mark meta noscript object param picture q s samp script small source span strike strong style sub sup svg"
_INLINE += " time tt u var video wbr html head body title"
_SPACED = frozenset(_BLOCKS.split())
_ELEMENTS = _SPACED | frozenset(_INLINE.split())
_UNSEEN = re.compile(r"<(script|style)\b[^<>]*>[^<]*</\1\s*>", re.IGNORECASE)
_TAG = re.compile(r"<(?:!--[^<>]*|/?([a-zA-Z][a-zA-Z0-9]*)(?:[\s/][^<>]*)?)>")
# Python refuses to read a number of more than 4,300 digits, and seven are enough for any character.
_LONG_NUMBER = re.compile(r"&#([0-9]{8,});?")
# Controls, soft hyphens, zero-width spaces, direction marks, byte order marks. Joiners stay: scripts and emoji need
# them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufff9-\ufffb]"
)


def clean_caption(text: str, strip_html: bool = False) -> str | None:
    """Text in Unicode form NFC, on one line, without invisible characters; None when nothing is left.

    With `strip_html`, tags of HTML elements go and entities become characters first.
    """
    if strip_html:
        text = html.unescape(_LONG_NUMBER.sub(_shortened, _TAG.sub(_instead, _UNSEEN.sub(" ", text))))
    text = _INVISIBLE.sub("", text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", _cut_marks(text))
    return " ".join(text.split()) or None


def _instead(tag: re.Match[str]) -> str:
    if tag[1] is None:
        return ""
    name = tag[1].lower()
    if name not in _ELEMENTS:
        return tag[0]
    return " " if name in _SPACED else ""


def _shortened(entity: re.Match[str]) -> str:
    digits = entity[1].lstrip("0")
    return f"&#{digits or 0};" if len(digits) < 8 else "\ufffd"


def _cut_marks(text: str) -> str:
    kept: list[str] = []
    run = 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) else 0
        if run <= _MAX_MARKS:
            kept.append(character)
    return "".join(kept)

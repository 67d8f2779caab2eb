"""What the cells of a row may hold: the rules that every source shares for keys, texts, labels and metadata."""

from __future__ import annotations

import json
import re
from typing import Any

from data_pipelines.dataset import MAX_METADATA_BYTES, MAX_TEXT_BYTES
from data_pipelines.errors import BadInput
from data_pipelines.shard import check_key

# A ustar header holds 100 bytes of name, and `.jpeg` takes five of them.
_MAX_KEY_BYTES = 95
_MAX_PATH_KEY_BYTES = 1024
# Metadata is parsed again by readers of all kinds, each with a limit of its own.
_MAX_DEPTH = 64
_INTEGER = re.compile(r"[+-]?\d{1,18}")


def key_of(value: Any) -> str | None:
    """An id as a key: text, with whole numbers written as such."""
    if value is None:
        return None
    # pandas turns a column of whole numbers into floats as soon as one is missing.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def id_problem(key: str) -> str | None:
    """Why an id cannot be a sample's key, or None."""
    refused = sorted({character for character in key if character in "./\\" or not character.isprintable()})
    if refused:
        named = ", ".join(repr(character) for character in refused)
        return f"{named} is refused (no '.', '/', '\\' or control characters in an id)"
    if key.startswith("__"):
        return "a leading '__' marks what WebDataset readers pass over"
    if key != key.strip():
        return "white space at an end is refused"
    if len(key.encode("utf-8")) > _MAX_KEY_BYTES:
        return f"{len(key.encode('utf-8'))} bytes are too long (at most {_MAX_KEY_BYTES})"
    return None


def path_key(path: str) -> str:
    """The key of a relative path without its extension: folders stay, what a key cannot hold becomes `_`.

    Raises `BadInput` for a path that stays impossible.
    """
    folder, slash, name = path.rpartition("/")
    name = name.replace(".", "_")
    key = "".join("_" if c == "\\" or not c.isprintable() else c for c in f"{folder}{slash}{name}")
    if len(key.encode("utf-8", "surrogateescape")) > _MAX_PATH_KEY_BYTES:
        raise BadInput(f"a path of more than {_MAX_PATH_KEY_BYTES} bytes")
    check_key(key)
    return key


def clean_text(value: str | None) -> str | None:
    """Text without byte order mark and without white space around it; None when nothing is left."""
    return (value or "").removeprefix("\ufeff").strip() or None


def text_problem(text: str) -> str | None:
    """Why a text cannot be a member, or None."""
    if "\0" in text:
        return "contains a NUL"
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "contains half of a surrogate pair, which UTF-8 cannot hold"
    return f"has {size} bytes; the limit is {MAX_TEXT_BYTES}" if size > MAX_TEXT_BYTES else None


def label_of(value: Any) -> Any:
    """A label as a whole number where it is written as one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and _INTEGER.fullmatch(value.strip()) else value


def _is_deep(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deep(one, levels - 1) for one in inner)


def metadata_problem(metadata: dict[str, Any]) -> str | None:
    """Why metadata cannot be a member, or None."""
    size = 0
    for name, value in metadata.items():
        if _is_deep(value, _MAX_DEPTH):
            return f"column {name!r} is nested deeper than {_MAX_DEPTH} levels"
        try:
            size += len(json.dumps({name: value}, allow_nan=False, ensure_ascii=False).encode("utf-8"))
        except (TypeError, ValueError) as error:
            return f"column {name!r} does not go into JSON ({error})"
    too_long = size > MAX_METADATA_BYTES
    return f"the other columns hold {size} bytes of metadata; the limit is {MAX_METADATA_BYTES}" if too_long else None

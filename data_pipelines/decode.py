"""The only place where foreign bytes become arrays and text."""

from __future__ import annotations

import json
from typing import Any


class DecodeError(ValueError):
    """A member that cannot be used. `reason` is one word for counting, `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return DecodeError, (self.reason, self.detail)


def decode_text(data: bytes, max_bytes: int) -> str | None:
    """UTF-8 text without byte order mark and without white space around it; None when nothing is left.

    Raises `DecodeError` for more than `max_bytes`, for bytes that are not UTF-8 and for a NUL.
    """
    if len(data) > max_bytes:
        raise DecodeError("size", f"a text of {len(data)} bytes, more than {max_bytes}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DecodeError("encoding", f"not UTF-8 at byte {error.start}") from error
    if "\0" in text:
        raise DecodeError("encoding", f"a NUL at character {text.index(chr(0))}")
    return text.removeprefix("\ufeff").strip() or None


def decode_metadata(data: bytes, max_bytes: int) -> dict[str, Any]:
    """A JSON object. Raises `DecodeError` for anything else and for more than `max_bytes`."""
    if len(data) > max_bytes:
        raise DecodeError("size", f"metadata of {len(data)} bytes, more than {max_bytes}")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DecodeError("json", f"metadata is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DecodeError("json", f"metadata is a JSON {type(value).__name__}, not an object")
    return value

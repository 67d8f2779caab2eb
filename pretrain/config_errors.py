"""One line for what a schema refuses: the place, the key, what was found, and what would have been right."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pretrain.config_fields import find_field, list_settings, type_name

Keys = tuple[str | int, ...]

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a section of key: value lines",
    "model_type": "a section of key: value lines",
}


def describe_errors(schema: type[BaseModel], value: Any, places: dict[Keys, str], errors: list[ErrorDetails]) -> str:
    """One line about the first error, which names the keys of the others.

    `places` maps the keys of each value to where it was written, with `()` for the file itself.
    """
    found: dict[Keys, ErrorDetails] = {}
    # An unknown key goes first: where it is a slip of the pen, it is also why another one is missing.
    for error in sorted(errors, key=lambda error: error["type"] != "extra_forbidden"):
        found.setdefault(keys_of(value, error), error)
    # A field of several types has an error for each type; one further down is about the type that was meant.
    found = {keys: error for keys, error in found.items() if not any(_above(keys, other) for other in found)}
    keys, first = next(iter(found.items()))
    others = [dotted(other) for other in found if other != keys]
    more = f" (also wrong: {', '.join(others[:4])}{', ...' if len(others) > 4 else ''})" if others else ""
    return _describe(schema, places, keys, first) + more


def keys_of(value: Any, error: ErrorDetails) -> Keys:
    """Where in the data an error is: pydantic's location also names the branch of a union, or `[key]`."""
    keys: Keys = ()
    for part in error["loc"]:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            keys, value = (*keys, part), value[part]  # type: ignore[index]
    return (*keys, error["loc"][-1]) if error["type"] == "missing" else keys


def dotted(keys: Keys) -> str:
    """Keys as they are written on the command line."""
    return ".".join(str(key) for key in keys)


def short(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return "nothing (null)" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(schema: type[BaseModel], places: dict[Keys, str], keys: Keys, error: ErrorDetails) -> str:
    label = dotted(keys)
    kind = error["type"]
    if kind == "value_error":
        # A check over several fields belongs to none of them, but its text starts with the key of one.
        text = str(error["ctx"]["error"])
        subject = (*keys, *re.split(r"[^\w.]", text)[0].rstrip(".").split("."))
        return f"{_place(places, subject)}: {label}{': ' if label else ''}{text}"
    if kind == "missing":
        return f"{_place(places, keys)}: {label} is missing, and it has no default"
    if kind == "extra_forbidden":
        return f"{_place(places, keys)}: unknown key {label}{_nearest(schema, keys)}"
    if error["loc"][-1] == "[key]":
        return f"{_place(places, keys)}: unknown key {label}; expected {error['ctx']['expected']}"
    field = find_field(schema, keys)
    hint = ""
    if kind == "literal_error":
        expected = error["ctx"]["expected"]
        near = difflib.get_close_matches(str(error["input"]), re.findall(r"'([^']*)'", expected), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
    elif error["loc"][-1] != keys[-1] and field is not None:
        expected = type_name(field.annotation)
    else:
        expected = _EXPECTED.get(kind) or error["msg"].replace("Input should be ", "a value ", 1)
    return f"{_place(places, keys)}: {label}: expected {expected}, got {short(error['input'])}{hint}"


def _nearest(schema: type[BaseModel], keys: Keys) -> str:
    """The key that was probably meant: a sibling, or one of that name in another section."""
    paths = [setting.path for setting in list_settings(schema)]
    paths += sorted({path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)})
    parent = re.sub(r"\.\d+", "[]", dotted(keys[:-1]))
    inside = f"{parent}." if parent else ""
    siblings = {path.removeprefix(inside): path for path in paths if path.startswith(inside)}
    siblings = {name: path for name, path in siblings.items() if "." not in name and not name.endswith("[]")}
    elsewhere = {path.rsplit(".", 1)[-1]: path for path in reversed(paths) if "[]" not in path}
    if str(keys[-1]) in paths:
        return f"; write its parts below each other, or use --set {keys[-1]}=..."
    name = str(keys[-1]).rsplit(".", 1)[-1]
    for candidates, cutoff in ((siblings, 0.6), (elsewhere, 0.75)):
        close = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
        if close:
            return f"; did you mean {candidates[close[0]].replace('[]', f'.{keys[-2]}' if len(keys) > 1 else '')}?"
    return f"; {parent or 'the file'} may have {', '.join(siblings)}"


def _place(places: dict[Keys, str], keys: Keys) -> str:
    while keys and keys not in places:
        keys = keys[:-1]
    return places[keys]


def _above(keys: Keys, other: Keys) -> bool:
    return len(keys) < len(other) and other[: len(keys)] == keys

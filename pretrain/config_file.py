"""From a YAML file and `--set` overrides to checked settings, and back.

Knows no particular schema: `pretrain.config` passes its own. Whatever is wrong becomes one `BadInput` line with the
place (`file:line`, or the override), the key, what was found there, and the nearest key that would have been right.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from data_pipelines.errors import BadInput
from pretrain import yaml_lines
from pretrain.config_errors import Keys, describe_errors, dotted, keys_of, short

Schema = TypeVar("Schema", bound=BaseModel)

MAX_BYTES = 1_000_000


def load_settings(schema: type[Schema], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Schema:
    """Read `path`, apply overrides such as `train.max_steps=20`, and check everything against `schema`.

    Override values are YAML. Paths in the file stay as they are written, so a relative one is relative to the current
    directory. Raises `BadInput`, in one line, for whatever is wrong.
    """
    source = _Source(str(path), _read(Path(path)))
    for override in overrides:
        source.override(override)
    try:
        return schema.model_validate(source.value)
    except ValidationError as error:
        first = error
    # The environment has no types: what it put in is text, until a field turns out to want something else.
    if source.retype([keys_of(source.value, error) for error in first.errors()]):
        try:
            return schema.model_validate(source.value)
        except ValidationError as error:
            first = error
    raise BadInput(describe_errors(schema, source.value, source.places, first.errors(include_url=False)))


def dump_settings(settings: BaseModel) -> str:
    """YAML text with every field, defaults included, that `load_settings` reads back as equal settings."""
    return yaml_lines.dump(settings.model_dump(mode="python"))


class _Source:
    """The values of the file and the overrides, and the place of each."""

    def __init__(self, name: str, text: str) -> None:
        document = yaml_lines.parse(text, name)
        if document.value is None:
            raise BadInput(f"{name}: is empty; configs/ has examples")
        if not isinstance(document.value, dict):
            raise BadInput(f"{name}:1: expected sections of key: value lines, got {short(document.value)}")
        self.value: dict[str, Any] = document.value
        self.places: dict[Keys, str] = {keys: f"{name}:{line}" for keys, line in document.lines.items()}
        self.places[()] = name
        self.expanded = document.expanded

    def override(self, override: str) -> None:
        """Put the value of one `a.b=c` in its place, making sections on the way where the file has none."""
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not all(key.split(".")):
            raise BadInput(f"--set {override}: expected key=value, for example --set train.max_steps=200")
        place = f"--set {key}"
        given = yaml_lines.parse(text, place)
        node: Any = self.value
        keys: Keys = ()
        *sections, last = key.split(".")
        for name in sections:
            step = self._step(node, keys, name, place)
            if isinstance(node, dict) and node.get(name) is None:
                node[name] = {}
            node, keys = node[step], (*keys, step)
        step = self._step(node, keys, last, place)
        node[step], keys = given.value, (*keys, step)
        # What the file said at and below that key is gone, and so are its lines.
        self.places = {old: line for old, line in self.places.items() if old[: len(keys)] != keys}
        self.places |= {(*keys, *below): place for below in (given.lines or {(): 1})}
        self.expanded = {old for old in self.expanded if old[: len(keys)] != keys}
        self.expanded |= {(*keys, *below) for below in given.expanded}

    def retype(self, wrong: Sequence[Keys]) -> bool:
        """Read environment values at `wrong` as YAML would have; True if there were any."""
        found = [keys for keys in wrong if keys in self.expanded]
        for keys in found:
            node: Any = self.value
            for key in keys[:-1]:
                node = node[key]
            node[keys[-1]] = yaml_lines.scalar(node[keys[-1]])
        return bool(found)

    def _step(self, node: Any, keys: Keys, name: str, place: str) -> str | int:
        if isinstance(node, dict):
            return name
        if not isinstance(node, list):
            raise BadInput(f"{place}: {dotted(keys)} is {short(node)}, so it has no {name!r}")
        if not name.isdigit() or int(name) >= len(node):
            raise BadInput(f"{place}: {dotted(keys)} is a list of {len(node)}, so {name!r} is no place in it")
        return int(name)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _neighbours(path), n=1)
        raise BadInput(
            f"{path}: no such config file" + (f"; did you mean {path.with_name(near[0])}?" if near else "")
        ) from None
    except OSError as error:
        raise BadInput(f"{path}: cannot read the config: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise BadInput(f"{path}: larger than {MAX_BYTES} bytes, which no config is")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from None


def _neighbours(path: Path) -> list[str]:
    try:
        return sorted(other.name for other in path.parent.iterdir() if other.suffix in (".yaml", ".yml"))
    except OSError:
        return []

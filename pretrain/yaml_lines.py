"""YAML that remembers where each value stood.

PyYAML composes the node graph; this module turns it into plain values itself, so that no tag can construct anything, a
key given twice is an error instead of the last one winning in silence, and every value keeps its line for messages.

Scalars follow YAML 1.2 where 1.1 surprises: `3e-4` is a number, `24:00:00` and `yes` are strings (1.1 makes them 86400
and true). `${NAME}` and `${NAME:-default}` inside a value are replaced from the environment; `$${` is a literal `${`.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from data_pipelines.errors import BadInput

Path = tuple[str | int, ...]

MAX_NODES = 100_000
MAX_DEPTH = 50
# No leading zeros: `010` is eight in YAML 1.1 and ten in 1.2, so here it is text, which no number field takes.
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)$")
_HEX = re.compile(r"0x[0-9a-fA-F_]+$")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$")
_CONSTANTS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_CONSTANTS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_VARIABLE = re.compile(r"\$?\$\{([^}]*)\}?")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?$", re.DOTALL)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)


@dataclass
class Document:
    """The values of one YAML text, and where they came from."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)
    """First line, counted from 1, of each value, by its path of keys and indices."""
    expanded: set[Path] = field(default_factory=set)
    """Values into which the environment was put; they are strings, whatever they look like."""


class _Loader(yaml.SafeLoader):
    """Composes only; every plain scalar stays a string until `scalar` looks at it."""


_Loader.yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what `scalar` would otherwise read as something else than a string."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse(text: str, name: str) -> Document:
    """Read one YAML document. `name` is what messages call it; anything wrong is a `BadInput` with `name:line`."""
    try:
        node = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise BadInput(f"{name}{line}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise BadInput(f"{name}: nested more than {MAX_DEPTH} deep") from None
    document = Document(None)
    if node is not None:
        document.value = _Reader(name, document).read(node, ())
    return document


def scalar(text: str) -> Any:
    """The value of one plain (unquoted) scalar: null, a bool, an int, a float, or the text itself.

    An overflowing number such as `1e999` stays text, so that a check of types refuses it.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _HEX.match(text):
        return int(text.replace("_", ""), 16)
    if _FLOAT.match(text):
        number = float(text.replace("_", ""))
        return number if math.isfinite(number) else text
    return text


def expand(text: str, where: str) -> str:
    """Replace `${NAME}` and `${NAME:-default}`; `where` starts the message when that cannot be done."""

    def replace(match: re.Match[str]) -> str:
        if match.group().startswith("$$"):
            return match.group()[1:]
        inside = _NAME.match(match.group(1))
        if inside is None or not match.group().endswith("}"):
            raise BadInput(
                f"{where}: cannot read {match.group()!r}: write ${{NAME}} or ${{NAME:-default}}, or $${{ for itself"
            )
        variable, default = inside.groups()
        # A run copies its config into the run directory, and an export carries it on.
        if _SECRET.search(variable):
            raise BadInput(
                f"{where}: ${{{variable}}} looks like a secret, and configs are copied into runs and exports"
            )
        value = os.environ.get(variable) or default
        if value is None:
            raise BadInput(
                f"{where}: environment variable {variable} is not set; set it or write ${{{variable}:-default}}"
            )
        return value

    return _VARIABLE.sub(replace, text)


def dump(value: Any) -> str:
    """YAML text that `parse` reads back as the same value, with the environment left alone."""
    return str(yaml.dump(_escaped(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value


class _Reader:
    """Walks the node graph of one document."""

    def __init__(self, name: str, document: Document) -> None:
        self.name = name
        self.document = document
        self.num_nodes = 0

    def read(self, node: yaml.Node, path: Path) -> Any:
        line = node.start_mark.line + 1
        where = f"{self.name}:{line}"
        self.num_nodes += 1
        # Aliases may repeat a node: a few lines can stand for more values than there is memory, or contain themselves.
        if self.num_nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise BadInput(f"{where}: more than {MAX_NODES} values or nested more than {MAX_DEPTH} deep")
        self.document.lines[path] = line
        if node.tag not in _PLAIN_TAGS:
            raise BadInput(f"{where}: tags are not allowed here, got {node.tag!r}")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, where)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(child, (*path, index)) for index, child in enumerate(node.value)]
        text = str(node.value)
        if "${" in text:
            self.document.expanded.add(path)
            label = ".".join(str(part) for part in path)
            return expand(text, f"{where}: {label}" if label else where)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return scalar(text) if plain else text

    def _mapping(self, node: yaml.MappingNode, path: Path, where: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise BadInput(f"{self.name}:{line}: a key must be a word")
            key = key_node.value
            if key in result:
                label = ".".join(str(part) for part in (*path, key))
                raise BadInput(f"{self.name}:{line}: {label} is given twice, first in line {first_line[key]}")
            first_line[key] = line
            result[key] = self.read(value_node, (*path, key))
            # The key's own line is where a reader looks, also when its value starts below it.
            self.document.lines[(*path, key)] = line
        return result


_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}

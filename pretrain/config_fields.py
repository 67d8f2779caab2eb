"""What settings there are: one flat list of every field of a schema, for the command line, docs and errors."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything"}


@dataclass(frozen=True)
class Setting:
    """One field of a schema, as a reader of the config file sees it."""

    path: str
    """Keys joined by dots; `[]` stands for the items of a list."""
    type: str
    required: bool
    default: Any
    """None where the field is required."""
    description: str
    value: Any = None
    """What the settings at hand say; None where none were given."""


def list_settings(schema: type[BaseModel], settings: BaseModel | None = None) -> Iterator[Setting]:
    """Every field of `schema` that holds a value, in order, with its value in `settings`.

    The fields of list items come after the list, as `data.build[].source` and without a value.
    """
    yield from _walk(schema, settings, "")


def find_field(schema: type[BaseModel], keys: tuple[str | int, ...]) -> FieldInfo | None:
    """The field at a path of keys and list indices, or None where the schema has none there."""
    model: type[BaseModel] | None = schema
    field = None
    for key in keys:
        if isinstance(key, int):
            continue
        if model is None or key not in model.model_fields:
            return None
        field = model.model_fields[key]
        inner = _models(field.annotation)
        model = inner[0] if inner else None
    return field


def type_name(annotation: Any) -> str:
    """A type in the words of the config file, for example `whole number or null`."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"section of {type_name(arguments[0])}: {type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return _NAMES.get(annotation, str(annotation))


def _walk(schema: type[BaseModel], settings: BaseModel | None, prefix: str) -> Iterator[Setting]:
    for name, field in schema.model_fields.items():
        path = f"{prefix}{name}"
        value = getattr(settings, name, None)
        inner = _models(field.annotation)
        if inner and field.annotation is inner[0]:
            yield from _walk(inner[0], value, f"{path}.")
            continue
        required = field.is_required()
        default = None if required else field.get_default(call_default_factory=True)
        yield Setting(path, type_name(field.annotation), required, default, field.description or "", value)
        for model in inner:
            yield from _walk(model, None, f"{path}[].")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]

"""Backbone families: one module each, chosen by `model.family`."""

from __future__ import annotations

import importlib
from types import ModuleType

FAMILIES = {"gemma4": "pretrain.model.backbones.gemma4"}


def family(name: str) -> ModuleType:
    """The module that builds and drives a family of native transformers backbones."""
    return importlib.import_module(FAMILIES[name])

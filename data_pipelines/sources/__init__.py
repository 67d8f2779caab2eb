"""Kinds of raw input: what a dataset can be built from."""

from data_pipelines.sources.choose import open_source
from data_pipelines.sources.source import Change, Drop, Item, Note, Row, RowFault, Source

__all__ = ["Change", "Drop", "Item", "Note", "Row", "RowFault", "Source", "open_source"]

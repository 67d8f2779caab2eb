"""Kinds of raw input: what a dataset can be built from."""

from data_pipelines.sources.source import Note, Row, RowFault, Source, open_source

__all__ = ["Note", "Row", "RowFault", "Source", "open_source"]

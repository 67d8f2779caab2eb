"""A manifest: a CSV, JSONL or Parquet file with one sample a row.

Columns `id`, `image`, `text`, `audio` and `split` have a meaning (`columns` maps other names onto them); every other
column goes into the sample's metadata. Image and sound are paths, relative to the manifest's folder.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample
from data_pipelines.sources.cells import clean_text, id_problem, key_of, label_of, metadata_problem, text_problem
from data_pipelines.sources.files import FileFault, check_reference, read_sample
from data_pipelines.sources.records import Record, read_records
from data_pipelines.sources.source import Note, Row, RowFault

_MEMBERS = ("image", "text", "audio")
_MEANINGFUL = ("id", *_MEMBERS)
_MAX_SPLITS_SHOWN = 20


@dataclass(frozen=True)
class ManifestSource:
    """The manifest at `path` (absolute). `columns` maps a name of ours to a column of the file.

    `split` keeps the rows whose `split` cell has this value. `allowed` are folders, beside the manifest's own, that its
    files may lie in. With `is_partial`, rows and the whole file may have metadata alone: another source has the rest.
    """

    path: Path
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    allowed: tuple[Path, ...] = ()
    is_partial: bool = False

    @property
    def label(self) -> str:
        """The manifest's path."""
        return str(self.path)

    @property
    def default_name(self) -> str:
        """The manifest's folder, then its own name where that says more, then the split."""
        own = [] if self.path.stem == "manifest" else [self.path.stem]
        parts = [self.path.parent.name, *own, *([self.split] if self.split else [])]
        return "-".join(part for part in parts if part) or "dataset"

    @property
    def shard_prefix(self) -> str:
        """The split, or the manifest's own name."""
        return self.split or self.path.stem

    def identity(self) -> dict[str, Any]:
        """Kind, file name, split and column mapping."""
        mapping = dict(sorted(self.columns.items()))
        return {"kind": "manifest", "manifest": self.path.name, "split": self.split, "columns": mapping}

    def rows(self) -> Iterator[Row | RowFault | Note]:
        """Rows of the split. See `Source.rows`."""
        header, records = read_records(self.path)
        columns = dict.fromkeys(header or ())
        if header is not None:
            self._check_columns(columns)
        first_seen: dict[str, int] = {}
        splits: Counter[str] = Counter()
        num_records = 0
        for record in records:
            num_records += 1
            if isinstance(record, RowFault):
                yield record
                continue
            if header is None:
                columns.update(dict.fromkeys(record.cells))
            if self.split is not None:
                split = str(record.cells.get(self._column("split"), ""))
                splits[split] += 1
                if split != self.split:
                    continue
            row = self._row(record)
            if isinstance(row, Row) and row.key in first_seen:
                detail = f"the id {row.key!r} is row {first_seen[row.key]}'s already; ids must be unique"
                row = RowFault.of(row, "id", "duplicate", detail)
            elif isinstance(row, Row):
                first_seen[row.key] = row.number
            yield row
        if num_records == 0:
            raise BadInput(f"{self.path}: no rows")
        if header is None:
            self._check_columns(columns)
        if self.split is not None and self.split not in splits:
            raise BadInput(f"{self.path}: no split {self.split!r}; {_say_splits(splits)}")
        yield from self._notes(columns)

    def read(self, row: Row) -> Sample:
        """The row's files, byte for byte. Raises `RowFault`."""
        return read_sample(row, self.path.parent, self.allowed)

    def _column(self, name: str) -> str:
        return self.columns.get(name, name)

    def _check_columns(self, found: dict[str, None]) -> None:
        listed = ", ".join(found) or "none"
        for name in (*self.columns, "id", *(["split"] if self.split is not None else [])):
            column = self._column(name)
            if column not in found:
                near = difflib.get_close_matches(column, found, 1)
                hint = f"nearest: --column {name}={near[0]}" if near else f"name it with --column {name}=COLUMN"
                raise BadInput(f"{self.path}: no column {column!r}; found: {listed}; {hint}")
        if not self.is_partial and not any(self._column(member) in found for member in _MEMBERS):
            near = [f"--column {m}={n}" for m in _MEMBERS for n in difflib.get_close_matches(m, found, 1)]
            hint = f"nearest: {near[0]}" if near else "name one with --column image=COLUMN"
            raise BadInput(f"{self.path}: no column 'image', 'text' or 'audio'; found: {listed}; {hint}")

    def _notes(self, found: dict[str, None]) -> Iterator[Note]:
        for member in _MEMBERS:
            near = difflib.get_close_matches(member, [name for name in found if name not in _MEANINGFUL], 1)
            if self._column(member) not in found and near:
                yield Note(f"{self.path}: no column {member!r}; if {near[0]!r} is it, add --column {member}={near[0]}")

    def _row(self, record: Record) -> Row | RowFault:
        named = {name: record.cells.get(self._column(name)) for name in (*_MEANINGFUL, *self.columns)}
        # A column whose name a mapping gives to another would be read as what it is not.
        taken = {*named, *map(self._column, named)}
        metadata = {name: cell for name, cell in record.cells.items() if name not in taken}
        metadata |= {n: c for n, c in named.items() if n not in _MEANINGFUL and c is not None}
        key = key_of(named["id"])

        def fault(member: str | None, reason: str, detail: str) -> RowFault:
            return RowFault(record.number, record.line, key, member, reason, detail)

        if key is None:
            return fault("id", "key", f"no {self._column('id')!r}: every row needs an id")
        # A partial row's key is only looked up; the sample takes that of the row it joins.
        problem = None if self.is_partial else id_problem(key)
        if problem is not None:
            return fault("id", "key", f"the id {key!r} cannot be a sample's key: {problem}")
        for member in _MEMBERS:
            value = named[member]
            if value is not None and not isinstance(value, str):
                return fault(member, "type", f"{self._column(member)!r} must be text, but is {type(value).__name__}")
        text = clean_text(named["text"])
        if text is not None and (problem := text_problem(text)):
            return fault("text", "text", f"text {problem}")
        for member in ("image", "audio"):
            reference = named[member]
            if reference is not None:
                try:
                    check_reference(reference, member)
                except FileFault as error:
                    return fault(member, error.reason, error.detail)
        if not self.is_partial and text is None and named["image"] is None and named["audio"] is None:
            return fault(None, "empty", "no image, no text and no audio: nothing to learn from")
        if "label" in metadata:
            metadata["label"] = label_of(metadata["label"])
        problem = metadata_problem(metadata)
        if problem is not None:
            return fault(None, "metadata", problem)
        return Row(record.number, key, named["image"], text, named["audio"], metadata, record.line)


def _say_splits(splits: Counter[str]) -> str:
    shown = [f"{name!r} ({count} rows)" if name else f"none ({count} rows)" for name, count in sorted(splits.items())]
    more = f" and {len(shown) - _MAX_SPLITS_SHOWN} more" if len(shown) > _MAX_SPLITS_SHOWN else ""
    return f"the splits are {', '.join(shown[:_MAX_SPLITS_SHOWN])}{more}"

"""CSV, JSONL and Parquet as one stream of records: number, line, and a dict of the cells that are not empty.

Nothing is guessed: a CSV cell is text, JSONL and Parquet keep their types. An empty cell, a null and a NaN (how pandas
writes a missing number) are all "missing", and are left out of the dict.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, AnyStr

from data_pipelines.errors import BadInput
from data_pipelines.sources.source import RowFault

# Longer than any caption or transcript; the csv module's own limit is 128 KiB.
_MAX_CELL_CHARACTERS = 1 << 24
# Of a file without line ends, no more than this is ever held.
_MAX_LINE = 1 << 26


@dataclass(frozen=True)
class Record:
    """One row of a manifest. `cells` holds what is there; a missing cell is absent."""

    number: int
    line: int | None
    cells: dict[str, Any]


def read_records(path: Path) -> tuple[list[str] | None, Iterator[Record | RowFault]]:
    """The columns, where the file names them before its rows (None for JSONL), and the records.

    Raises `BadInput` for a file that is not what its suffix says.
    """
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    if path.suffix.lower() == ".jsonl":
        return None, _read_jsonl(path)
    return _read_parquet(path)


def is_missing(value: Any) -> bool:
    """Whether a cell stands for nothing: a null, an empty text, a NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _read_csv(path: Path) -> tuple[list[str], Iterator[Record | RowFault]]:
    rows = _csv_rows(path)
    _, header = next(rows, (0, []))
    if not any(header):
        raise BadInput(f"{path}: no header: the first line of a CSV manifest names its columns")
    _refuse_repeated(path, header)
    return header, _csv_records(rows, header)


def _refuse_repeated(path: Path, header: list[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise BadInput(f"{path}: the header names column {repeated[0]!r} more than once")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line on which the row starts, cells) of each row that is not blank, the header first."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(path, file), strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise BadInput(f"{path}: line {line}: not CSV ({error})") from error
            except UnicodeDecodeError as error:
                raise BadInput(f"{path}: near line {line}: not UTF-8 ({error.reason})") from error
            if cells is None:
                return
            if cells:
                yield line, cells


def _lines(path: Path, file: IO[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file. Raises `BadInput` for one of more than `_MAX_LINE` characters (text) or bytes."""
    number = 0
    while line := file.readline(_MAX_LINE + 1):
        number += 1
        if len(line) > _MAX_LINE:
            raise BadInput(f"{path}: line {number} is longer than {_MAX_LINE}; is this the right file?")
        yield line


def _csv_records(rows: Iterator[tuple[int, list[str]]], header: list[str]) -> Iterator[Record | RowFault]:
    for number, (line, cells) in enumerate(rows, start=1):
        if len(cells) != len(header):
            detail = f"{len(cells)} cells, but the header names {len(header)} columns (a comma in a text needs quotes)"
            yield RowFault(number, line, None, None, "columns", detail)
        else:
            yield Record(number, line, {n: c for n, c in zip(header, cells, strict=True) if not is_missing(c)})


def _read_jsonl(path: Path) -> Iterator[Record | RowFault]:
    number = 0
    with open(path, "rb") as file:
        for line, raw in enumerate(_lines(path, file), start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
            if not raw.strip():
                continue
            number += 1
            try:
                value = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield RowFault(number, line, None, None, "json", f"not UTF-8 at byte {error.start} of the line")
                continue
            except (ValueError, RecursionError) as error:
                yield RowFault(number, line, None, None, "json", f"not JSON ({error})")
                continue
            if not isinstance(value, dict):
                yield RowFault(number, line, None, None, "json", f"a JSON {type(value).__name__}, not an object")
                continue
            yield Record(number, line, {name: cell for name, cell in value.items() if not is_missing(cell)})


def _read_parquet(path: Path) -> tuple[list[str], Iterator[Record | RowFault]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path}: not Parquet ({error})") from error
    _refuse_repeated(path, file.schema_arrow.names)
    return list(file.schema_arrow.names), _parquet_records(path, file)


def _parquet_records(path: Path, file: Any) -> Iterator[Record | RowFault]:
    import pyarrow as pa

    number = 0
    try:
        for batch in file.iter_batches(batch_size=1024):
            for cells in batch.to_pylist():
                number += 1
                yield Record(number, None, {n: plain(c) for n, c in cells.items() if not is_missing(c)})
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path}: damaged after row {number} ({error})") from error


def plain(value: Any) -> Any:
    """Dates and decimals, also within lists and dicts, as text: JSON has neither."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, dict):
        return {name: plain(cell) for name, cell in value.items()}
    if isinstance(value, list):
        return [plain(cell) for cell in value]
    return value

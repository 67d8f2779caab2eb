"""What a build will do, decided before it starts: rows cut into shards, and a hash that tells two builds apart.

A plan is made in one pass over the source. As a file it is Parquet with a row group a shard, so that a worker reads its
own shard's rows and no others.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.errors import BadInput
from data_pipelines.index import Quarantined
from data_pipelines.sources.source import Change, Drop, Note, Row, RowFault, Source

PLAN_VERSION = 1
_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("line", pa.int64()),
        ("key", pa.string()),
        ("image", pa.string()),
        ("text", pa.string()),
        ("audio", pa.string()),
        ("metadata", pa.string()),
    ]
)


@dataclass(frozen=True)
class Fault:
    """A row that was left out: its number in the source, and its line for quarantine.jsonl."""

    row: int
    line: Quarantined

    @classmethod
    def of(cls, fault: RowFault, shard: str) -> Fault:
        """`shard` is the path of the shard that would have held the row."""
        detail = f"{fault.where}: {fault.detail}"
        return cls(fault.number, Quarantined(shard, fault.key, fault.member, fault.reason, detail))

    @classmethod
    def again(cls, line: Quarantined) -> Fault:
        """The fault that became a line of quarantine.jsonl."""
        row = re.match(r"row (\d+)", line.detail)
        return cls(0 if row is None else int(row[1]), line)


@dataclass(frozen=True)
class Plan:
    """Rows a shard, what was left out, and the hash (hex) over name, cut, settings and rows.

    `dropped` counts rows that were left out because the user asked for it, by reason, and `changed` texts that were
    cleaned. Two plans with the same hash give the same shards, as long as the files that the rows name stay as they
    are.
    """

    sha256: str
    prefix: str
    shard_sizes: list[int]
    faults: list[Fault]
    notes: list[str]
    dropped: dict[str, int]
    changed: dict[str, int]

    @property
    def num_rows(self) -> int:
        """Rows that samples will be made of."""
        return sum(self.shard_sizes)

    @property
    def shard_paths(self) -> list[str]:
        """Paths of the shards within the dataset folder, in their order (that of names ends at a million)."""
        return [shard_path(self.prefix, number) for number in range(len(self.shard_sizes))]


def shard_path(prefix: str, number: int) -> str:
    """`shards/train-000003.tar`."""
    return f"shards/{prefix}-{number:06d}.tar"


def make_plan(
    source: Source,
    *,
    name: str,
    prefix: str,
    shard_size: int,
    skip_faults: bool,
    file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    tick: Callable[[int], None] | None = None,
) -> Plan:
    """Read every row of a source; with `file`, write them there for `read_rows`.

    `settings` (JSON) are what, beside the rows, the bytes of the samples depend on; `tick` is called with 1 for each
    row that was looked at. Raises `BadInput` for a source that cannot be planned, and for its first bad row unless
    `skip_faults`.
    """
    header = [PLAN_VERSION, name, prefix, shard_size, *([settings] if settings else [])]
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    sizes: list[int] = []
    faults: list[Fault] = []
    notes: list[str] = []
    dropped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    pending: list[dict[str, Any]] = []
    writer = None if file is None else pq.ParquetWriter(file, _SCHEMA, compression="zstd")

    def cut() -> None:
        sizes.append(len(pending))
        if writer is not None:
            writer.write_table(pa.Table.from_pylist(pending, schema=_SCHEMA), row_group_size=len(pending))
        pending.clear()

    try:
        for row in source.rows():
            if isinstance(row, Note):
                notes.append(row.message)
                continue
            if isinstance(row, Change):
                changed[row.what] += 1
                continue
            if tick is not None:
                tick(1)
            if isinstance(row, Drop):
                dropped[row.reason] += 1
                continue
            if isinstance(row, RowFault):
                if not skip_faults:
                    raise row.as_bad_input(source.label)
                faults.append(Fault.of(row, shard_path(prefix, len(sizes))))
                continue
            cells = _cells(row)
            digest.update(json.dumps([cells[name] for name in _SCHEMA.names[2:]]).encode() + b"\n")
            pending.append(cells)
            if len(pending) == shard_size:
                cut()
        if pending:
            cut()
    finally:
        if writer is not None:
            writer.close()
    if not sizes:
        why = f"; the first: {faults[0].line.detail}" if faults else ""
        why += f"; {describe_dropped(dropped)}" if dropped else ""
        raise BadInput(f"{source.label}: no row gives a sample{why}")
    return Plan(digest.hexdigest(), prefix, sizes, faults, notes, dict(sorted(dropped.items())), dict(changed))


def describe_dropped(dropped: Mapping[str, int]) -> str:
    """`7 rows left out (4 keep.language, 3 min_image_side)`."""
    total = sum(dropped.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return f"{total} row{'s' if total != 1 else ''} left out ({reasons})"


def _cells(row: Row) -> dict[str, Any]:
    metadata = json.dumps(row.metadata, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return {**vars(row), "metadata": metadata}


def read_rows(file: Path, shard: int) -> list[Row]:
    """The rows of one shard."""
    status = file.stat()
    # Reading the footer takes 12 us a shard of the plan: not for each of its shards again.
    with pq.ParquetFile(file, metadata=_footer(file, status.st_ino, status.st_mtime_ns)) as plan:
        cells = plan.read_row_group(shard).to_pylist()
    return [Row(**{**row, "metadata": json.loads(row["metadata"])}) for row in cells]


@functools.lru_cache(maxsize=1)
def _footer(file: Path, _inode: int, _changed: int) -> pq.FileMetaData:
    return pq.read_metadata(file)

"""The index of one shard: where each sample's members lie and what they cost.

Rebuildable from the tar alone. An Arrow IPC file, memory-mapped when read, so that a worker pays for the rows that it
touches. A damaged tar gives up its whole samples; each of the others becomes a `Quarantined` line with the reason.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipelines.atomic import atomic_file
from data_pipelines.decode import MAX_AUDIO_BYTES, MAX_IMAGE_BYTES
from data_pipelines.errors import BadInput
from data_pipelines.headers import audio_seconds, image_size
from data_pipelines.shard import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, split_member_name
from data_pipelines.tar import Damage, Member, open_tar, walk

FORMAT_VERSION = 1
MODALITIES = ("image", "text", "audio")
MEMBERS = (*MODALITIES, "json")
_HEAD_BYTES = 1 << 16
# What the decoders of webdataset, torch and numpy unpickle, by extension; numpy alone says so in a header.
_PICKLED = frozenset({"pickle", "pkl", "pt", "pth", "pyd"})
_OBJECT_DTYPE = re.compile(rb"'descr': *'\|O")
_NPY_HEAD_BYTES = 256
_MOST_NAMED = 5
_MOST_DETAIL = 200
_MAGIC = b"ARROW1\0\0"
_SCHEMA = pa.schema(
    [pa.field("key", pa.string(), nullable=False)]
    + [pa.field(f"{member}_{what}", pa.int64(), nullable=False) for member in MEMBERS for what in ("offset", "size")]
    + [
        pa.field("image_extension", pa.int8(), nullable=False),
        pa.field("audio_extension", pa.int8(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("audio_seconds", pa.float32(), nullable=False),
    ]
)
_NUMPY: dict[str, type[np.generic]] = {"int64": np.int64, "int32": np.int32, "int8": np.int8, "float": np.float32}
COLUMN_TYPES = {name: _NUMPY[str(_SCHEMA.field(name).type)] for name in _SCHEMA.names[1:]}
"""The columns that are arrays, which is all but the keys."""


def _view(column: pa.ChunkedArray, dtype: type[np.generic]) -> npt.NDArray[Any]:
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype, count=chunk.offset + len(chunk))[chunk.offset :]
        for chunk in column.chunks
        if len(chunk)
    ]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype)


@dataclass(frozen=True)
class Quarantined:
    """One line of quarantine.jsonl: what is left out, and why. `key` and `member` are None where unknown."""

    shard: str
    key: str | None
    member: str | None
    reason: str
    detail: str


class ShardIndex:
    """The rows of one shard's index. Columns are read-only numpy arrays of length `len(index)`.

    `{image,text,audio,json}_{offset,size}` int64 in bytes (size -1: the sample has no such member), `width`, `height`
    int32 in pixels (0: unknown), `audio_seconds` float32, `{image,audio}_extension` int8, an index into
    `shard.IMAGE_EXTENSIONS` and `shard.AUDIO_EXTENSIONS`.
    """

    def __init__(self, table: pa.Table, quarantined: tuple[Quarantined, ...] = ()) -> None:
        self._table = table
        self.quarantined = quarantined
        # Straight from Arrow's buffers: its own conversion imports pandas, a second in every worker.
        self._columns = {name: _view(table.column(name), kind) for name, kind in COLUMN_TYPES.items()}
        self._spans = [(name, self._columns[f"{name}_offset"], self._columns[f"{name}_size"]) for name in MEMBERS]
        keys = table.column("key").combine_chunks()
        keys = keys.chunk(0) if isinstance(keys, pa.ChunkedArray) else keys
        self._key_ends: npt.NDArray[np.int32] = (
            np.frombuffer(keys.buffers()[1], np.int32) if len(keys) else np.zeros(1, np.int32)
        )
        self._key_bytes = memoryview(keys.buffers()[2] or b"") if len(keys) else memoryview(b"")
        self._first_key = keys.offset

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, column: str) -> npt.NDArray[Any]:
        return self._columns[column]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that are arrays, which is all but the keys."""
        return tuple(self._columns)

    def key(self, row: int) -> str:
        """Key of the sample in this row."""
        place = self._first_key + row
        return str(self._key_bytes[self._key_ends.item(place) : self._key_ends.item(place + 1)], "utf-8")

    def spans(self, row: int) -> list[tuple[str, int, int]]:
        """(member, offset, size) of `MEMBERS` in this row, as the columns have them."""
        return [(name, offsets.item(row), sizes.item(row)) for name, offsets, sizes in self._spans]

    def keys(self) -> list[str]:
        """All keys, in the order of the tar."""
        return [self.key(row) for row in range(len(self))]

    @property
    def num_bytes(self) -> int:
        """Size of the tar that this index was made from, in bytes; -1 when it was not recorded."""
        return int((self._table.schema.metadata or {}).get(b"num_bytes", b"-1"))

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the tar that this index was made from; empty when it was not recorded."""
        return str((self._table.schema.metadata or {}).get(b"sha256", b"").decode())

    def count(self, modality: str) -> int:
        """Samples that have this modality; an empty text does not count."""
        sizes = self._columns[f"{modality}_size"]
        return int(np.count_nonzero(sizes > 0 if modality == "text" else sizes >= 0))

    def save(self, path: Path, num_bytes: int, sha256: str) -> None:
        """Write the index, bound to the tar with this size and hash. It appears whole or not at all."""
        schema = _SCHEMA.with_metadata(
            {"format_version": str(FORMAT_VERSION), "num_bytes": str(num_bytes), "sha256": sha256}
        )
        with atomic_file(path) as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_table(self._table.cast(schema))

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Memory-map an index. Raises `BadInput` when there is none or it is not one of ours."""
        try:
            with pa.memory_map(str(path)) as source:
                return cls._read(source, str(path))
        except FileNotFoundError as error:
            raise BadInput(f"{path}: the index is missing; make it again with `triptych data index`") from error
        except OSError as error:
            raise _no_index(str(path), error) from error

    @classmethod
    def parse(cls, data: bytes, where: str) -> ShardIndex:
        """The index in these bytes, which come from `where`. Raises `BadInput` when it is not one of ours."""
        return cls._read(pa.BufferReader(data), where)

    @classmethod
    def _read(cls, source: pa.NativeFile, where: str) -> ShardIndex:
        try:
            # For its footer: a file that lost its end is damaged, whatever still stands before.
            pa.ipc.open_file(source)
            source.seek(len(_MAGIC))
            messages = pa.ipc.MessageReader.open_stream(source)
            schema = pa.ipc.read_schema(messages.read_next_message())
            if not schema.equals(_SCHEMA):
                raise BadInput(f"{where}: an index of another version; make it again with `triptych data index`")
            table = pa.Table.from_batches(_batches(messages, schema), schema)
            table.validate(full=True)
            index = cls(table)
            index._check_values()
        except (OSError, ValueError, IndexError, TypeError, StopIteration, struct.error, pa.ArrowException) as error:
            raise _no_index(where, error) from error
        return index

    def _check_values(self) -> None:
        """Raise ValueError for what no tar gives: the file may come from a stranger."""
        _ = self.num_bytes, self.sha256
        least = {f"{member}_size": -1 for member in MEMBERS}
        most = {"image_extension": len(IMAGE_EXTENSIONS) - 1, "audio_extension": len(AUDIO_EXTENSIONS) - 1}
        for name, column in self._columns.items():
            within = (column >= least.get(name, 0)) & (column <= most.get(name, np.inf)) & np.isfinite(column)
            if not within.all():
                raise ValueError(f"{name} {column[~within][0]}")


def _no_index(where: str, error: Exception) -> BadInput:
    detail = " ".join(str(error).split())[:_MOST_DETAIL]
    return BadInput(f"{where}: not an index ({detail}); make it again with `triptych data index`")


def _batches(messages: pa.ipc.MessageReader, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows, message by message: a buffer that says it is compressed would be inflated to whatever size it says."""
    for message in messages:
        if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
            raise ValueError(f"a compressed part, or one that holds no rows ({message.type})")
        yield pa.ipc.read_record_batch(message, schema)


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch's flatbuffer (Arrow's format/Message.fbs) has its `compression`."""
    message: int = struct.unpack_from("<I", metadata)[0]
    header = _field(metadata, message, 2)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return bool(_field(metadata, batch, 3) != batch)


def _field(buffer: bytes, table: int, number: int) -> int:
    """Offset of a flatbuffer table's field; the table's own where the field is absent."""
    fields = table - struct.unpack_from("<i", buffer, table)[0]
    place = 4 + 2 * number
    there = place < struct.unpack_from("<H", buffer, fields)[0]
    return int(table + (struct.unpack_from("<H", buffer, fields + place)[0] if there else 0))


@dataclass
class _Group:
    """Members that share a key, in a row, and what is known to be wrong with them."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    fault: tuple[str | None, str, str] | None = None
    gap_before: Damage | None = None
    gap_after: Damage | None = None

    def refuse(self, member: str | None, reason: str, detail: str) -> None:
        self.fault = self.fault or (member, reason, detail)


class _Grouper:
    """Turns the walk over a tar into groups, deciding which groups a gap may have robbed of members."""

    def __init__(self) -> None:
        self.groups: list[_Group] = []
        self.loose: list[Damage] = []
        self._pending: Damage | None = None

    def _group(self, key: str) -> _Group:
        last = self.groups[-1] if self.groups else None
        if last is not None and last.key == key:
            if self._pending is not None:
                last.refuse(self._pending.name, self._pending.reason, self._pending.detail)
            self._pending = None
            return last
        group = _Group(key)
        if self._pending is not None:
            group.gap_before = self._pending
            if last is not None:
                last.gap_after = self._pending
            self._pending = None
        self.groups.append(group)
        return group

    def member(self, member: Member) -> None:
        parts = split_member_name(member.name)
        if parts is None:
            return
        group = self._group(parts[0])
        if parts[1] in group.members:
            group.refuse(member.name, "duplicate", f"two members called {member.name!r}")
        group.members.setdefault(parts[1], member)

    def damage(self, damage: Damage) -> None:
        self.loose.append(damage)
        parts = split_member_name(damage.name) if damage.name is not None else None
        if not damage.gap:
            if parts is not None:
                self._group(parts[0]).refuse(damage.name, damage.reason, damage.detail)
            return
        if parts is not None and damage.reason == "truncated":
            self._group(parts[0]).refuse(damage.name, damage.reason, damage.detail)
            return
        last = self.groups[-1] if self.groups else None
        if parts is not None and last is not None and last.key == parts[0] and parts[1] not in last.members:
            # The header is broken, but its name can be read and fits: this sample lost it, and no other.
            last.refuse(damage.name, damage.reason, damage.detail)
            return
        self._pending = damage

    def finish(self) -> None:
        if self._pending is not None and self.groups:
            self.groups[-1].gap_after = self._pending
        for before, after in zip([None, *self.groups], self.groups, strict=False):
            gap = after.gap_before
            parts = split_member_name(gap.name) if gap is not None and gap.name is not None else None
            if gap is not None and parts is not None and parts[0] == after.key and parts[1] not in after.members:
                after.refuse(gap.name, gap.reason, gap.detail)
                if before is not None:
                    before.gap_after = None
        # Writers keep the members of a sample in one order. So a group that ends at a gap is whole if what it ends with
        # always comes last in this tar, and one that begins there if what it begins with always comes first.
        whole = [tuple(g.members) for g in self.groups if g.members and not (g.fault or g.gap_before or g.gap_after)]
        always = {end: _always_at(end, whole) for end in (0, -1)}
        for group in self.groups:
            names = tuple(group.members)
            for gap, end in ((group.gap_after, -1), (group.gap_before, 0)):
                if gap is None or (names and names[end] in always[end]):
                    continue
                group.refuse(gap.name, gap.reason, f"{gap.detail}; the sample beside it may have lost members")


def _always_at(end: int, whole: list[tuple[str, ...]]) -> set[str]:
    """Extensions that stand first (`end` 0) or last (-1) in every sample that has them."""
    elsewhere = {name for names in whole for name in (names[1:] if end == 0 else names[:-1])}
    return {names[end] for names in whole} - elsewhere


def index_shard(tar: Path) -> ShardIndex:
    """Read a tar's headers, and the headers of its images and sounds, into an index.

    Raises `BadInput` when the file is no plain tar. Whatever is damaged or refused inside stands in `.quarantined`.
    """
    tar = Path(tar)
    descriptor = open_tar(tar)
    try:
        grouper = _Grouper()
        for found in walk(descriptor):
            if isinstance(found, Member):
                grouper.member(found)
            else:
                grouper.damage(found)
        grouper.finish()
        return _build(tar.name, descriptor, grouper)
    finally:
        os.close(descriptor)


def _build(shard: str, descriptor: int, grouper: _Grouper) -> ShardIndex:
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    quarantined: list[Quarantined] = []
    for group in grouper.groups:
        row = _row(descriptor, group)
        if row is None:
            group.refuse(None, "empty", f"neither image nor text nor sound among {_named(group.members)}")
        if group.fault is not None or row is None:
            member, reason, detail = group.fault or (None, "empty", "")
            quarantined.append(Quarantined(shard, group.key, member, reason, detail))
            continue
        for name, value in row.items():
            columns[name].append(value)
        for extension, found in group.members.items():
            if _holds_pickle(descriptor, extension, found):
                detail = "may hold a pickle, which runs code when it is read; never opened, the sample stays"
                quarantined.append(Quarantined(shard, group.key, found.name, "pickle", detail))
    told = {(line.member, line.reason) for line in quarantined}
    for damage in grouper.loose:
        if (damage.name, damage.reason) not in told:
            parts = split_member_name(damage.name) if damage.name is not None else None
            quarantined.append(Quarantined(shard, parts and parts[0], damage.name, damage.reason, damage.detail))
    return ShardIndex(pa.table(columns, schema=_SCHEMA), tuple(quarantined))


def _named(members: dict[str, Member]) -> str:
    more = f" and {len(members) - _MOST_NAMED} more" if len(members) > _MOST_NAMED else ""
    return f"{sorted(members)[:_MOST_NAMED]}{more}"


def _holds_pickle(descriptor: int, extension: str, member: Member) -> bool:
    parts = extension.split(".")
    if not _PICKLED.isdisjoint(parts):
        return True
    return "npy" in parts and _OBJECT_DTYPE.search(os.pread(descriptor, _NPY_HEAD_BYTES, member.offset)) is not None


def _first(members: dict[str, Member], extensions: tuple[str, ...]) -> tuple[int, Member | None]:
    for number, extension in enumerate(extensions):
        if extension in members:
            return number, members[extension]
    return 0, None


def _row(descriptor: int, group: _Group) -> dict[str, Any] | None:
    """One row of the index, or None for a group without any of the three modalities.

    Members above the reader's limits are not looked into: reading such a sample says what is wrong with it.
    """
    image_extension, image = _first(group.members, IMAGE_EXTENSIONS)
    audio_extension, audio = _first(group.members, AUDIO_EXTENSIONS)
    text, metadata = group.members.get("txt"), group.members.get("json")
    if image is None and audio is None and (text is None or text.size == 0):
        return None
    row: dict[str, Any] = {"key": group.key, "image_extension": image_extension, "audio_extension": audio_extension}
    for name, member in (("image", image), ("text", text), ("audio", audio), ("json", metadata)):
        row[f"{name}_offset"] = 0 if member is None else member.offset
        row[f"{name}_size"] = -1 if member is None else member.size
    size = None
    if image is not None:
        head = os.pread(descriptor, min(image.size, _HEAD_BYTES), image.offset)
        size = image_size(head)
        if size is None and head.startswith(b"\xff\xd8") and _HEAD_BYTES < image.size <= MAX_IMAGE_BYTES:
            # Colour profiles and thumbnails may push a JPEG's frame header far back.
            size = image_size(os.pread(descriptor, image.size, image.offset))
    row["width"], row["height"] = (0, 0) if size is None else (min(size[1], 2**31 - 1), min(size[2], 2**31 - 1))
    row["audio_seconds"] = 0.0
    if audio is not None and audio.size <= MAX_AUDIO_BYTES:
        row["audio_seconds"] = audio_seconds(os.pread(descriptor, audio.size, audio.offset))
    return row

"""A dataset folder: `dataset.json`, tars, and one index a tar.

`open_dataset` reads dataset.json alone; a shard's index is memory-mapped and its tar opened when a sample of it is
first asked for. A `Dataset` may be pickled, forked and shared between threads: reads are by offset, and what is cached
can be made again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipelines.atomic import atomic_file
from data_pipelines.config import RemoteConfig
from data_pipelines.decode import MAX_AUDIO_BYTES, MAX_IMAGE_BYTES, DecodeError, decode_metadata, decode_text
from data_pipelines.errors import BadInput, check_utf8
from data_pipelines.index import COLUMN_TYPES, FORMAT_VERSION, MEMBERS, MODALITIES, Quarantined, ShardIndex, index_shard
from data_pipelines.shard import (
    AUDIO_EXTENSIONS,
    IMAGE_EXTENSIONS,
    Sample,
    hash_shard,
    write_shard,
)
from data_pipelines.store import LocalStore, MemberReader, ShardStore

MAX_TEXT_BYTES = 1_000_000
MAX_METADATA_BYTES = 1_000_000
LIMITS = {
    "image": MAX_IMAGE_BYTES,
    "audio": MAX_AUDIO_BYTES,
    "text": MAX_TEXT_BYTES,
    "json": MAX_METADATA_BYTES,
}
"""Most bytes of a member that is read."""
# Each open tar holds a descriptor; the usual soft limit is 1,024.
_MOST_OPEN = 256
# An index holds a mapping. All ranks look into the indexes of all shards in use, which are some 1,300 by default.
_MOST_INDEXES = 4096
_MOST_AT_ONCE = 1 << 20

# What dataset.json may say of one shard: far more than there is, and sums that fit 64 bits.
_MOST_SAMPLES, _MOST_BYTES = 1 << 40, 1 << 60

IntArray = npt.NDArray[np.int64]
Kept = TypeVar("Kept")


class ShardEntry(BaseModel):
    """One shard in dataset.json: `path` and `index` within the dataset folder, `bytes` and `sha256` of the tar."""

    model_config = ConfigDict(frozen=True)

    path: str
    num_samples: int = Field(ge=0, le=_MOST_SAMPLES)
    bytes: int = Field(ge=0, le=_MOST_BYTES)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    index: str
    modalities: dict[str, int]


class _DatasetFile(BaseModel):
    format_version: Literal[1]
    name: str
    num_samples: int
    modalities: dict[str, int]
    fingerprint: str
    reencoded: list[str] = []
    shards: list[ShardEntry]


class Costs(NamedTuple):
    """What samples cost, known from the index: arrays of the same length, 0 where the modality is missing.

    `width` and `height` are in pixels, before any EXIF orientation.
    """

    text_bytes: IntArray
    pixels: IntArray
    audio_seconds: npt.NDArray[np.float32]
    width: IntArray
    height: IntArray


class RawSample(NamedTuple):
    """A sample's members as they lie in the tar, None where missing; `shard` is the tar's path within the dataset.

    `too_large` names a member that was not read because it exceeds the reader's limit.
    """

    key: str
    shard: str
    image: bytes | None
    text: bytes | None
    audio: bytes | None
    json: bytes | None
    image_extension: str
    audio_extension: str
    too_large: str | None


def fingerprint(shards: Iterable[ShardEntry]) -> str:
    """Hash (hex) over the shards' SHA-256 and counts, in order: equal data in equal order, and nothing else."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.sha256} {shard.num_samples}\n".encode())
    return digest.hexdigest()


def commit_shard(samples: Iterable[Sample], folder: Path, path: str) -> ShardEntry:
    """Write one shard at `path` within a dataset folder, then its index: with the index there, the shard is complete.

    Raises `BadInput` for samples that a shard cannot hold.
    """
    written = write_shard(samples, folder / path)
    index = index_shard(folder / path)
    assert len(index) == written.num_samples and not index.quarantined, (path, index.quarantined)
    return _commit_index(index, folder, path, index_path(path), written.num_bytes, written.sha256)


def index_path(path: str) -> str:
    """Where the index of the shard at `path` lies, relative to the dataset folder."""
    return f"index/{PurePosixPath(path).stem}.arrow"


def _commit_index(
    index: ShardIndex, folder: Path, path: str, index_file: str, num_bytes: int, sha256: str
) -> ShardEntry:
    index.save(folder / index_file, num_bytes, sha256)
    modalities = {name: index.count(name) for name in MODALITIES}
    return ShardEntry(
        path=path, num_samples=len(index), bytes=num_bytes, sha256=sha256, index=index_file, modalities=modalities
    )


def write_dataset(folder: Path, name: str, shards: Sequence[ShardEntry], reencoded: Sequence[str] = ()) -> str:
    """Write dataset.json, the last file of a dataset, atomically; returns the fingerprint.

    `reencoded` names the modalities whose bytes are not the source's own.
    """
    counts = {name: sum(shard.modalities.get(name, 0) for shard in shards) for name in MODALITIES}
    content: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "num_samples": sum(shard.num_samples for shard in shards),
        "modalities": {name: count for name, count in counts.items() if count},
        "fingerprint": fingerprint(shards),
    }
    if reencoded:
        content["reencoded"] = sorted(reencoded)
    content["shards"] = [shard.model_dump() for shard in shards]
    with atomic_file(Path(folder) / "dataset.json") as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
    return str(content["fingerprint"])


def index_folder(folder: Path) -> tuple[Dataset, list[Quarantined]]:
    """Make a dataset of the tars below a folder: `dataset.json` and `index/` there, the tars unchanged.

    What is damaged or refused goes to `quarantine.jsonl` beside dataset.json, and is returned. Raises `BadInput`, with
    nothing written, when there is no tar or a file called .tar is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: not a folder")
    tars = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.tar")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not tars:
        raise BadInput(f"{folder}: no .tar file in it or below it")
    check_utf8(str(folder.resolve()), *tars)
    # All are read before anything is written, so that a file that is no tar leaves the folder as it was.
    indexed = [(path, index_shard(folder / path)) for path in tars]
    entries: list[ShardEntry] = []
    quarantined: list[Quarantined] = []
    taken: set[str] = set()
    for path, index in indexed:
        index_file = index_path(path)
        if index_file in taken:
            stem = PurePosixPath(path).stem
            index_file = f"index/{stem}-{hashlib.sha256(path.encode()).hexdigest()[:12]}.arrow"
        taken.add(index_file)
        num_bytes, sha256 = hash_shard(folder / path)
        entries.append(_commit_index(index, folder, path, index_file, num_bytes, sha256))
        quarantined += [Quarantined(path, *tuple(vars(line).values())[1:]) for line in index.quarantined]
    quarantine_file = folder / "quarantine.jsonl"
    if quarantined:
        with atomic_file(quarantine_file) as file:
            for line in quarantined:
                file.write((json.dumps(vars(line), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    else:
        quarantine_file.unlink(missing_ok=True)
    if not sum(entry.num_samples for entry in entries):
        raise BadInput(f"{folder}: no whole sample in {len(tars)} tar(s); first reason: {_first_reason(quarantined)}")
    write_dataset(folder, folder.resolve().name, entries)
    return open_dataset(folder), quarantined


def _first_reason(quarantined: Sequence[Quarantined]) -> str:
    return f"{quarantined[0].reason} ({quarantined[0].detail})" if quarantined else "the tars are empty"


def open_dataset(path: str | Path, remote: RemoteConfig | None = None) -> Dataset:
    """Open the dataset in a folder, or behind a URL, that holds dataset.json.

    `remote` are the settings for a URL; None takes the defaults. Raises `BadInput` when there is no dataset, when it
    contradicts itself, and for a URL that may not be read.
    """
    from data_pipelines.remote.urls import check_url, is_url, local_path

    if is_url(path):
        url = check_url(str(path))
        if not url.startswith("file://"):
            from data_pipelines.remote.store import open_store

            store, raw = open_store(url, remote or RemoteConfig())
            return Dataset(store, _parse(raw, f"{store.location}/dataset.json"))
        path = local_path(url)
    folder = Path(path)
    file = folder / "dataset.json"
    if not file.is_file():
        hint = "make one with `triptych data build`, or of tars with `triptych data index`"
        raise BadInput(f"{folder}: {'no dataset.json in it' if folder.is_dir() else 'no such dataset folder'}; {hint}")
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from error
    return Dataset(LocalStore(folder), _parse(raw, str(file)))


def _parse(raw: bytes, where: str) -> _DatasetFile:
    """The content of the dataset.json at `where`. Raises `BadInput`."""
    try:
        content = _DatasetFile.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise BadInput(f"{where}: cannot be read ({place}: {first['msg']})") from error
    for shard in content.shards:
        for name in (shard.path, shard.index):
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise BadInput(f"{where}: the path {name!r} leads out of the dataset folder")
            if not name.isprintable():
                raise BadInput(f"{where}: the path {name!r} holds a character that does not print")
    if content.num_samples != sum(shard.num_samples for shard in content.shards):
        raise BadInput(f"{where}: num_samples is {content.num_samples}, but the shards add up to something else")
    if content.fingerprint != fingerprint(content.shards):
        raise BadInput(f"{where}: the fingerprint does not fit the shards; the file was edited")
    if not content.num_samples:
        raise BadInput(f"{where}: the dataset is empty")
    return content


def _keep(kept: dict[int, Kept], number: int, made: Kept, most: int) -> Kept:
    """Keep `made`, and let go of what was kept first."""
    # No lock: threads may make one twice, which is harmless, and a fork cannot inherit a held lock. What is let go of
    # closes when its last reader does.
    kept[number] = made
    while len(kept) > most:
        kept.pop(next(iter(list(kept))), None)
    return made


class Dataset:
    """Samples 0..N-1 in shard order. Open one with `open_dataset`."""

    def __init__(self, store: ShardStore, content: _DatasetFile) -> None:
        self.store = store
        self.name = content.name
        self.fingerprint = content.fingerprint
        self.modalities = dict(content.modalities)
        self.reencoded = tuple(content.reencoded)
        self.shards = tuple(content.shards)
        self.shard_sizes: IntArray = np.array([shard.num_samples for shard in self.shards], dtype=np.int64)
        self._starts: IntArray = np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)
        self._indexes: dict[int, ShardIndex] = {}
        self._readers: dict[int, MemberReader] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"Dataset({self.location!r}, {len(self)} samples, {len(self.shards)} shards, {self.modalities})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": {}, "_readers": {}}

    @property
    def location(self) -> str:
        """The folder or URL, fit to be shown."""
        return self.store.location

    @property
    def is_local(self) -> bool:
        """Whether it lies in a folder of this machine, not behind a URL."""
        return isinstance(self.store, LocalStore)

    @property
    def path(self) -> Path:
        """The folder. Raises `BadInput` for a dataset behind a URL."""
        if not isinstance(self.store, LocalStore):
            raise BadInput(f"{self.location}: this needs a dataset in a local folder")
        return self.store.folder

    def index(self, shard: int) -> ShardIndex:
        """The index of shard number `shard`. Raises `BadInput` when it cannot be had or is of another tar."""
        index = self._indexes.get(shard)
        if index is None:
            index = _keep(self._indexes, shard, self.store.index(self.shards[shard]), _MOST_INDEXES)
        return index

    @contextmanager
    def _reading(self, shard: int) -> Iterator[MemberReader]:
        """The open tar. Raises `BadInput` when it is gone or has another size than dataset.json says."""
        if self.store.keeps_open:
            reader = self._readers.get(shard)
            yield reader or _keep(self._readers, shard, self.store.open(self.shards[shard]), _MOST_OPEN)
            return
        reader = self.store.open(self.shards[shard])
        try:
            yield reader
        finally:
            reader.close()

    def locate(self, ids: npt.ArrayLike) -> tuple[IntArray, IntArray]:
        """(shard number, row in the shard) of sample ids, both int64. Raises IndexError outside 0..N-1."""
        wanted = np.atleast_1d(np.asarray(ids, dtype=np.int64))
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"sample ids must lie in 0..{len(self) - 1}")
        shard = np.searchsorted(self._starts, wanted, side="right") - 1
        return shard, wanted - self._starts[shard]

    def _columns(self, names: Sequence[str], ids: npt.ArrayLike) -> list[npt.NDArray[Any]]:
        """Columns of the index at these samples; each shard's index is looked at once."""
        shards, rows = self.locate(ids)
        found = [np.empty(len(rows), dtype=COLUMN_TYPES[name]) for name in names]
        for number in np.unique(shards).tolist():
            here = shards == number
            index = self.index(number)
            for column, name in zip(found, names, strict=True):
                column[here] = index[name][rows[here]]
        return found

    def costs(self, ids: npt.ArrayLike) -> Costs:
        """What these samples cost: text bytes, pixels and seconds of sound, from the index alone."""
        text, wide, high, seconds = self._columns(("text_size", "width", "height", "audio_seconds"), ids)
        width, height = wide.astype(np.int64), high.astype(np.int64)
        return Costs(np.maximum(text, 0), width * height, seconds, width, height)

    def sizes(self, member: str, ids: npt.ArrayLike) -> IntArray:
        """Bytes of `image`, `text`, `audio` or `json` in these samples; -1 where missing."""
        return self._columns((f"{member}_size",), ids)[0]

    def keys(self, ids: npt.ArrayLike) -> list[str]:
        """Keys of these samples."""
        shards, rows = self.locate(ids)
        return [self.index(s).key(r) for s, r in zip(shards.tolist(), rows.tolist(), strict=True)]

    def read(
        self, ids: npt.ArrayLike, members: Sequence[str] = MEMBERS, limits: Mapping[str, int] | None = None
    ) -> list[RawSample]:
        """The encoded members of many samples, in the order asked for; each shard is read front to back.

        Members that are not asked for are None. A sample with a member of more than `limits[member]` bytes is not read:
        it says so in `too_large`. Raises `BadInput` when a tar is gone or not the one that was indexed.
        """
        found = dict(self.iter_read(ids, members, limits))
        return [found[place] for place in range(len(found))]

    def iter_read(
        self, ids: npt.ArrayLike, members: Sequence[str] = MEMBERS, limits: Mapping[str, int] | None = None
    ) -> Iterator[tuple[int, RawSample]]:
        """What `read` returns, one by one as (place in `ids`, sample): one sample's bytes are held at a time."""
        shards, rows = self.locate(ids)
        for number, places in itertools.groupby(np.lexsort((rows, shards)).tolist(), lambda place: int(shards[place])):
            index, path = self.index(number), self.shards[number].path
            with self._reading(number) as reader:
                for place in places:
                    yield place, _read_row(index, path, reader, int(rows[place]), members, limits or {})

    def __getitem__(self, position: int) -> Sample:
        """Sample `position`, negative from the end.

        Raises IndexError, and `DecodeError` for a text or JSON that is bad and for a member above `LIMITS`.
        """
        raw = self._read_whole(position, MEMBERS)
        return Sample(
            key=raw.key,
            image=raw.image,
            text=None if raw.text is None else decode_text(raw.text, MAX_TEXT_BYTES),
            audio=raw.audio,
            metadata={} if raw.json is None else decode_metadata(raw.json, MAX_METADATA_BYTES),
            image_extension=raw.image_extension,
            audio_extension=raw.audio_extension,
        )

    def metadata(self, position: int) -> dict[str, Any]:
        """Metadata of one sample, empty when it has none; image and sound are not read. Raises `DecodeError`."""
        raw = self._read_whole(position, ("json",))
        return {} if raw.json is None else decode_metadata(raw.json, MAX_METADATA_BYTES)

    def _read_whole(self, position: int, members: Sequence[str]) -> RawSample:
        raw = self.read([self._position(position)], members, LIMITS)[0]
        if raw.too_large is not None:
            raise DecodeError("size", f"{raw.key}: the {raw.too_large} has more than {LIMITS[raw.too_large]} bytes")
        return raw

    def _position(self, position: int) -> int:
        wanted = position + len(self) if position < 0 else position
        if not 0 <= wanted < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        return wanted


def _read_row(
    index: ShardIndex, path: str, reader: MemberReader, row: int, members: Sequence[str], limits: Mapping[str, int]
) -> RawSample:
    there = [span for span in index.spans(row) if span[2] >= 0 and span[0] in members]
    data: dict[str, bytes] = {}
    too_large = next((name for name, _, size in there if size > limits.get(name, size)), None)
    if there and too_large is None:
        first = min([offset for _, offset, _ in there])
        length = max([offset + size for _, offset, size in there]) - first
        # Members lie side by side, so one read takes the sample; not so where a large one is left out between. The
        # bytes are held twice then, which a large sample must not cost.
        if length <= min(sum([size for *_, size in there]) + 8192, _MOST_AT_ONCE):
            block = reader.read(first, length)
            data = {name: block[offset - first : offset - first + size] for name, offset, size in there}
        else:
            data = {name: reader.read(offset, size) for name, offset, size in there}
    return RawSample(
        index.key(row),
        path,
        data.get("image"),
        data.get("text"),
        data.get("audio"),
        data.get("json"),
        IMAGE_EXTENSIONS[index["image_extension"].item(row)],
        AUDIO_EXTENSIONS[index["audio_extension"].item(row)],
        too_large,
    )

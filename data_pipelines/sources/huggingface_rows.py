"""Rows of a Hugging Face dataset by reference, as plain values, in any process.

The only file that imports `datasets`. A dataset is opened once a process; a stream goes on where it stands when the
rows are asked for in order, as those of one shard are.
"""

from __future__ import annotations

import functools
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_pipelines.errors import BadInput
from data_pipelines.remote.urls import hide_credentials

if TYPE_CHECKING:
    from data_pipelines.sources.huggingface import HuggingFaceSource

Cells = dict[str, Any]
# A stream's state is noted after this many rows; a shard that begins between two of them reads the rows before it too.
_ROWS_A_STATE = 256
_ROWS_A_BATCH = 1000


@dataclass(frozen=True)
class Columns:
    """Columns of a dataset: all `names`, which hold images, sounds and other things that are no JSON, and, once chosen,
    which is what (`named`) and which go into the metadata, as pairs of a name and a column.
    """

    names: tuple[str, ...]
    images: tuple[str, ...]
    sounds: tuple[str, ...]
    binary: tuple[str, ...]
    class_names: dict[str, tuple[str, ...]]
    named: dict[str, str]
    metadata: tuple[tuple[str, str], ...] = ()

    def chosen(self, named: dict[str, str], renamed: dict[str, str]) -> Columns:
        """With `named` as what samples are made of, `renamed` and all other columns as metadata."""
        taken = {*named.values(), *renamed.values(), *self.binary}
        rest = [(name, name) for name in self.names if name not in taken and name not in renamed]
        return replace(self, named=named, metadata=(*rest, *renamed.items()))

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """What the whole numbers of the metadata's `label` stand for, where the dataset says so."""
        return self.class_names.get(dict(self.metadata).get("label", ""))


class Rows(Protocol):
    """A dataset that is open. `folders` are those in which its own files lie."""

    columns: Columns
    folders: tuple[Path, ...]

    def walk(self, columns: Columns) -> Iterator[tuple[str, Cells]]:
        """(reference, cells) of each row in order; images and sounds are only told from None."""

    def read(self, reference: str, columns: Columns) -> Cells:
        """The image and the sound of a row, as stored."""


class _TableRows:
    """A dataset with a length: Arrow files on the disk, memory-mapped."""

    def __init__(self, dataset: Any, folders: tuple[Path, ...]) -> None:
        self.columns, self.folders = _columns(dataset.features), folders
        self._dataset = dataset

    def walk(self, columns: Columns) -> Iterator[tuple[str, Cells]]:
        media = {columns.named[name] for name in ("image", "audio") if name in columns.named}
        wanted = list(dict.fromkeys([*columns.named.values(), *(column for _, column in columns.metadata)]))
        position = 0
        with _worker_without_torch():
            tables = self._dataset.with_format("arrow").select_columns(wanted).iter(batch_size=_ROWS_A_BATCH)
        for table in tables:
            # Whether there is an image shows without its bytes.
            cells = {name: table.column(name).to_pylist() for name in wanted if name not in media}
            cells |= {name: [there or None for there in _is_there(table.column(name))] for name in media}
            for row in range(table.num_rows):
                yield str(position), {name: column[row] for name, column in cells.items()}
                position += 1

    def read(self, reference: str, columns: Columns) -> Cells:
        table = self._arrow[int(reference)]
        names = [columns.named[name] for name in ("image", "audio") if name in columns.named]
        return {name: table.column(name)[0].as_py() for name in names}

    @functools.cached_property
    def _arrow(self) -> Any:
        with _worker_without_torch():
            return self._dataset.with_format("arrow")


class _StreamRows:
    """A dataset that is only read from front to back. References are `[rows after the state, state]` as JSON."""

    def __init__(self, opener: Callable[[], Any], folders: tuple[Path, ...]) -> None:
        self._open, self.folders = opener, folders
        with _worker_without_torch():
            dataset = opener()
            features = dataset.features or dict.fromkeys(next(iter(dataset), {}))
        self.columns = _columns(features)
        self._reader = _Stream(opener)
        self._last: tuple[str, Cells] | None = None

    def walk(self, columns: Columns) -> Iterator[tuple[str, Cells]]:
        stream = _Stream(self._open)
        while True:
            reference = stream.reference
            cells = stream.next()
            if cells is None:
                return
            # What a filter asks for next is mostly this row.
            self._last = reference, cells
            yield reference, cells

    def read(self, reference: str, columns: Columns) -> Cells:
        if self._last is not None and self._last[0] == reference:
            return self._last[1]
        return self._reader.row(reference)


class _Stream:
    """One pass over a stream, and where it stands."""

    def __init__(self, opener: Callable[[], Any]) -> None:
        self._open = opener
        self._dataset: Any = None
        self._iterators: list[Any] = []
        self._state, self._rows = "null", 0
        # An open generator that the interpreter comes upon at its end complains.
        weakref.finalize(self, _close_all, self._iterators)

    @property
    def reference(self) -> str:
        """That of the row which `next` gives."""
        return json.dumps([self._rows, self._state])

    def next(self) -> Cells | None:
        """The next row, None at the end."""
        if not self._iterators:
            self._go_to("null")
        with _worker_without_torch():
            cells: Cells | None = next(self._iterators[0], None)
            self._rows += 1
            if self._rows == _ROWS_A_STATE and cells is not None:
                self._state, self._rows = json.dumps(self._dataset.state_dict(), sort_keys=True), 0
        return cells

    def row(self, reference: str) -> Cells:
        """The row of a reference. Raises `BadInput` when the stream has no such row."""
        rows, state = json.loads(reference)
        if state != self._state or rows < self._rows or not self._iterators:
            self._go_to(state)
        cells = None
        for _ in range(rows + 1 - self._rows):
            cells = self.next()
        if cells is None:
            raise BadInput("a stream ended before a row that was planned; the dataset changed since")
        return cells

    def _go_to(self, state: str) -> None:
        _close_all(self._iterators)
        with _worker_without_torch():
            if self._dataset is None or state == "null":
                self._dataset = self._open()
            if state != "null":
                self._dataset.load_state_dict(json.loads(state))
            self._iterators.append(iter(self._dataset))
        self._state, self._rows = state, 0


def _close_all(iterators: list[Any]) -> None:
    for iterator in iterators:
        iterator.close()
    iterators.clear()


def _is_there(column: Any) -> list[bool]:
    """Whether each cell holds something. A struct whose bytes and path are null is nothing, too."""
    import pyarrow as pa
    import pyarrow.compute as pc

    there = pc.is_valid(column)
    if pa.types.is_struct(column.type):
        fields = [pc.is_valid(pc.struct_field(column, [number])) for number in range(column.type.num_fields)]
        there = pc.and_(there, functools.reduce(pc.or_, fields))
    return [bool(value) for value in there.to_pylist()]


def open_rows(source: HuggingFaceSource) -> Rows:
    """Open a dataset. Raises `BadInput`, in one line, for whatever is wrong with it."""
    folders = _folders(source)

    def opener() -> Any:
        return _choose_split(source, _load(source)).decode(False)

    with explained(source), _without_bars(), _worker_without_torch():
        if not source.streaming:
            return _TableRows(_choose_split(source, _load(source)), folders)
        return _StreamRows(opener, folders)


@contextmanager
def explained(source: HuggingFaceSource) -> Iterator[None]:
    """Turn what `datasets` raises into one line."""
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - there is no list of what it raises
        # The first line alone may be "Config name is missing.", and the names in the second.
        lines = [line for line in str(error).splitlines() if line.strip()]
        detail = hide_credentials(" ".join(lines[:2]))
        raise BadInput(f"{source.label}: cannot be read ({type(error).__name__}: {detail})") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the progress bars of `datasets` to itself."""
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


@contextmanager
def _worker_without_torch() -> Iterator[None]:
    """Within a build worker, which bars torch, `datasets` must not find the bar: it would try to import it."""
    is_barred = "torch" in sys.modules and sys.modules["torch"] is None
    if is_barred:
        del sys.modules["torch"]
    try:
        yield
    finally:
        if is_barred:
            sys.modules["torch"] = None  # type: ignore[assignment]


def _load(source: HuggingFaceSource) -> Any:
    """The dataset with all its splits."""
    import datasets
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

    folder = Path(source.name)
    if folder.is_absolute() and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_from_disk(source.name)
    asked = {"path": source.name, "name": source.config, "revision": source.commit or source.revision}
    builder = datasets.load_dataset_builder(**asked)
    if not folder.is_absolute():
        _refuse_unknown_revision(source, builder)
        source.pin(builder.hash)
        asked["revision"] = source.commit
    if isinstance(builder, AudioFolder):
        # Its sounds are paths, and `Audio` wants torchcodec even to note a path. `Image` notes one as it is. The cache
        # is one of our own, for no other reader of this folder may find such a column in its own.
        builder = datasets.load_dataset_builder(**asked, cache_dir=f"{datasets.config.HF_DATASETS_CACHE}/triptych")
        builder.BASE_FEATURE = datasets.Image
    if source.streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


def _refuse_unknown_revision(source: HuggingFaceSource, builder: Any) -> None:
    """Raise `BadInput` where `datasets` met a failure by its cache, of whatever revision, and nobody asked for that."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    if not isinstance(builder, Cache) or source.commit is not None or builder.hash == source.revision:
        return
    if not datasets.config.HF_HUB_OFFLINE:
        raise BadInput(
            f"{source.label}: the Hub has no such dataset for this token, or could not be reached; "
            f"HF_HUB_OFFLINE=1 takes commit {builder.hash} from the cache"
        )
    if source.revision is not None:
        raise BadInput(
            f"{source.label}: offline, nobody can tell whether commit {builder.hash} in the cache is "
            f"{source.revision!r}; give the commit after the @"
        )


def _choose_split(source: HuggingFaceSource, loaded: Any) -> Any:
    """The split that was asked for, or the only one."""
    import datasets

    if source.streaming and isinstance(loaded, datasets.Dataset):
        loaded = loaded.to_iterable_dataset()
    if not isinstance(loaded, dict):
        if source.split is not None and str(loaded.split) != source.split:
            raise BadInput(f"{source.label}: holds one split and no {source.split!r}: leave out --split")
        return loaded
    names = ", ".join(map(repr, loaded))
    if source.split is None and len(loaded) > 1:
        raise BadInput(f"{source.label}: name a split with --split; the splits are {names}")
    if source.split is not None and source.split not in loaded:
        raise BadInput(f"{source.label}: no split {source.split!r}; the splits are {names}")
    chosen = loaded[source.split or next(iter(loaded))]
    if source.streaming and isinstance(chosen, datasets.Dataset):
        return chosen.to_iterable_dataset()
    return chosen


def _folders(source: HuggingFaceSource) -> tuple[Path, ...]:
    """Where a dataset's own files may lie: its folder, and the caches that `datasets` downloads to."""
    import datasets
    from huggingface_hub import constants

    own = [Path(source.name)] if Path(source.name).is_absolute() else []
    caches = [datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE]
    return tuple(Path(folder).resolve() for folder in (*own, *caches))


def _columns(features: Mapping[str, Any]) -> Columns:
    """What the columns are, by their features."""
    import datasets

    def is_media(feature: Any) -> bool:
        if isinstance(feature, dict):
            return any(map(is_media, feature.values()))
        if isinstance(feature, list | tuple):
            return any(map(is_media, feature))
        inner = getattr(feature, "feature", None)
        return hasattr(feature, "decode") or "binary" in str(getattr(feature, "dtype", "")) or is_media(inner or ())

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    sounds = [name for name, feature in features.items() if isinstance(feature, datasets.Audio)]
    names = {n: tuple(f.names) for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
    binary = [name for name, feature in features.items() if is_media(feature)]
    return Columns(tuple(features), tuple(images), tuple(sounds), tuple(binary), names, {})

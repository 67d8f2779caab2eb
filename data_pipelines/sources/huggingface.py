"""A Hugging Face dataset: saved with `save_to_disk`, a folder that `load_dataset` knows, or a name on the Hub.

Images and sounds are taken as the bytes or files that they are stored as: nothing is decoded here, and torchcodec is
never needed. A row that is planned is a position, or, in a stream, the state from which `datasets` itself goes on
(https://huggingface.co/docs/datasets/stream#save-a-dataset-checkpoint-and-resume-iteration) and the rows after it.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.dataset import LIMITS
from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample
from data_pipelines.sources.cells import clean_text, id_problem, key_of, label_of, metadata_problem, text_problem
from data_pipelines.sources.files import FileFault, extension_of, make_sample, read_file
from data_pipelines.sources.huggingface_rows import Cells, Columns, Rows, explained, open_rows
from data_pipelines.sources.records import is_missing, plain
from data_pipelines.sources.source import Item, Note, Row, RowFault

_MEANINGFUL = ("id", "image", "text", "audio")
# ORG/NAME, and what may follow it: `:CONFIG` and `@REVISION`.
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@:]+))?(?:@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class HuggingFaceSource:
    """The dataset `name`: an absolute path, or a name on the Hub with `config` and `revision`.

    `commit` is what the revision of a name on the Hub stood for when the build was begun: every process reads that one,
    whatever is pushed meanwhile. None until the dataset is opened for the first time, and for folders.

    `columns` are pairs of a name of ours and one of the dataset's. `allowed` are folders, beside the dataset's own and
    the cache of `datasets`, in which files that its rows name may lie. With `is_partial`, rows may have metadata alone:
    another source has the rest.
    """

    name: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    columns: tuple[tuple[str, str], ...] = ()
    allowed: tuple[Path, ...] = ()
    streaming: bool = False
    is_partial: bool = False
    commit: str | None = None

    @property
    def label(self) -> str:
        """The prefix `hf:` and the name."""
        return f"hf:{self.name}"

    @property
    def default_name(self) -> str:
        """The last part of the name, and the split."""
        return "-".join(part for part in (Path(self.name).name, self.split) if part)

    @property
    def shard_prefix(self) -> str:
        """The split, or the last part of the name."""
        return self.split or Path(self.name).name

    def identity(self) -> dict[str, Any]:
        """Kind, name (a folder's without where it lies), config, revision, commit, split, columns."""
        name = Path(self.name).name if Path(self.name).is_absolute() else self.name
        asked = {"config": self.config, "revision": self.revision, "split": self.split, "streaming": self.streaming}
        if self.commit is not None:
            asked["commit"] = self.commit
        return {"kind": "huggingface", "dataset": name, **asked, "columns": dict(sorted(self.columns))}

    def rows(self) -> Iterator[Item]:
        """A row for each row of the split. See `Source.rows`."""
        opened, columns = self._opened, self._columns
        first_seen: dict[str, int] = {}
        number = 0
        walk = opened.walk(columns)
        while True:
            with explained(self):
                found = next(walk, None)
            if found is None:
                break
            reference, cells = found
            number += 1
            item = self._row(number, self._reference_prefix + reference, cells, columns)
            if isinstance(item, Row) and item.key in first_seen:
                detail = f"the id {item.key!r} is row {first_seen[item.key]}'s already; ids must be unique"
                item = RowFault.of(item, "id", "duplicate", detail)
            elif isinstance(item, Row):
                first_seen[item.key] = number
            yield item
        if not number:
            raise BadInput(f"{self.label}: no rows")
        yield from self._notes(opened.columns, columns)

    def read(self, row: Row) -> Sample:
        """The row's members, byte for byte. Raises `RowFault`."""
        opened, columns = self._opened, self._columns
        reference = row.image if row.image is not None else row.audio
        with explained(self):
            cells = {} if reference is None else opened.read(reference.removeprefix(self._reference_prefix), columns)
        members: dict[str, tuple[bytes, str] | None] = {}
        for modality, there in (("image", row.image), ("audio", row.audio)):
            members[modality] = None
            if there is not None:
                try:
                    data = self._bytes(cells.get(columns.named[modality]), modality, opened.folders)
                    members[modality] = data, extension_of(data, modality)
                except FileFault as fault:
                    raise RowFault.of(row, modality, fault.reason, fault.detail) from fault
        return make_sample(row, members["image"], members["audio"])

    def pin(self, commit: str) -> None:
        """Keep to this commit from now on. Raises `BadInput` when it is not the one that the build was begun with."""
        if self.commit is not None and self.commit != commit:
            raise BadInput(
                f"{self.label}: the build was begun with commit {self.commit}, and only {commit} is to be had"
            )
        object.__setattr__(self, "commit", commit)

    @property
    def _reference_prefix(self) -> str:
        """What references begin with: plans of two commits differ, even where their rows do not."""
        return f"{self.commit[:12]}:" if self.commit is not None else ""

    @functools.cached_property
    def _opened(self) -> Rows:
        return open_rows(self)

    @functools.cached_property
    def _columns(self) -> Columns:
        return self._find_columns(self._opened.columns)

    def __getstate__(self) -> dict[str, Any]:
        # What is open stays in its process.
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _bytes(self, cell: Any, modality: str, folders: tuple[Path, ...]) -> bytes:
        if isinstance(cell, bytes):
            return cell
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        data = cell.get("bytes") if isinstance(cell, Mapping) else None
        if isinstance(data, bytes):
            return data
        if not isinstance(path, str):
            raise FileFault("missing", f"the {modality} has neither bytes nor a path")
        # The user's token may read more than the rows of a stranger's dataset should name.
        if path.startswith((f"hf://datasets/{self.name}@", f"hf://datasets/{self.name}/")) and ".." not in path:
            return _read_remote(path, modality)
        if "://" in path or ".." in Path(path).parts:
            where = "files of the dataset itself" if Path(self.name).is_absolute() else f"hf://datasets/{self.name}"
            raise FileFault("path", f"{modality} path {path!r} is refused; only {where} may be named")
        roots = (*folders, *self.allowed)
        return read_file(path, modality, roots[0], roots[1:], LIMITS[modality])

    def _find_columns(self, found: Columns) -> Columns:
        """Which column is the id, the image, the text and the sound, and which are metadata."""
        mapping = dict(self.columns)
        listed = ", ".join(found.names) or "none"
        for name, column in mapping.items():
            if column not in found.names:
                near = difflib.get_close_matches(column, found.names, 1)
                hint = f"; nearest: --column {name}={near[0]}" if near else ""
                raise BadInput(f"{self.label}: no column {column!r}; found: {listed}{hint}")
        named = {name: mapping.get(name, name) for name in _MEANINGFUL if mapping.get(name, name) in found.names}
        for modality, typed in (("image", found.images), ("audio", found.sounds)):
            if modality not in named and len(typed) == 1 and typed[0] not in named.values():
                named[modality] = typed[0]
        if not self.is_partial and not any(member in named for member in ("image", "text", "audio")):
            raise BadInput(f"{self.label}: no image, text or audio among the columns {listed}; name one with --column")
        return found.chosen(named, {name: column for name, column in mapping.items() if name not in _MEANINGFUL})

    def _notes(self, found: Columns, chosen: Columns) -> Iterator[Note]:
        if "text" not in chosen.named and not self.is_partial:
            near = [name for name in found.names if name in ("caption", "captions", "transcript", "transcription")]
            hint = f"; if {near[0]!r} is it, add --column text={near[0]}" if near else ""
            yield Note(f"{self.label}: no column 'text'{hint}")
        left = [name for name in found.binary if name not in chosen.named.values()]
        if left:
            yield Note(f"{self.label}: columns that JSON cannot hold stay behind: {', '.join(left)}")

    def _row(self, number: int, reference: str, cells: Cells, columns: Columns) -> Row | RowFault:
        cells = {name: cell for name, cell in cells.items() if not _is_nothing(cell)}
        named = {name: cells.get(column) for name, column in columns.named.items()}
        key = key_of(named["id"]) if "id" in columns.named else f"{number - 1:09d}"

        def fault(member: str | None, reason: str, detail: str) -> RowFault:
            return RowFault(number, None, key, member, reason, detail)

        if key is None:
            return fault("id", "key", f"no {columns.named['id']!r}: every row needs an id")
        problem = None if self.is_partial else id_problem(key)
        if problem is not None:
            hint = "; --column id=COLUMN takes another column"
            return fault("id", "key", f"the id {key!r} cannot be a sample's key: {problem}{hint}")
        if not isinstance(named.get("text"), str | None):
            kind = type(named["text"]).__name__
            return fault("text", "type", f"{columns.named['text']!r} must be text, but is {kind}")
        text = clean_text(named.get("text"))
        if text is not None and (problem := text_problem(text)):
            return fault("text", "text", f"text {problem}")
        image, audio = (reference if named.get(name) is not None else None for name in ("image", "audio"))
        if not self.is_partial and text is None and image is None and audio is None:
            return fault(None, "empty", "no image, no text and no audio: nothing to learn from")
        metadata = {name: plain(cells[column]) for name, column in columns.metadata if column in cells}
        if isinstance(metadata.get("label"), int) and columns.label_names is not None:
            names = columns.label_names
            if 0 <= metadata["label"] < len(names):
                metadata.setdefault("label_name", names[metadata["label"]])
        elif "label" in metadata:
            metadata["label"] = label_of(metadata["label"])
        problem = metadata_problem(metadata)
        if problem is not None:
            return fault(None, "metadata", problem)
        return Row(number, key, image, text, audio, metadata)


def _is_nothing(cell: Any) -> bool:
    """Whether a cell is missing; an image or a sound whose bytes and path are null is, too."""
    is_media = isinstance(cell, Mapping) and cell.keys() == {"bytes", "path"}
    return is_missing(cell) or (is_media and all(value is None for value in cell.values()))


def _read_remote(path: str, modality: str) -> bytes:
    from huggingface_hub import HfFileSystem

    try:
        with HfFileSystem().open(path, "rb") as file:
            data = file.read(LIMITS[modality] + 1)
    except Exception as error:  # noqa: BLE001 - the hub's client raises of every kind
        raise FileFault("unreadable", f"{modality} {path} cannot be read ({type(error).__name__}: {error})") from error
    if len(data) > LIMITS[modality]:
        raise FileFault("size", f"{modality} {path} has more than {LIMITS[modality]} bytes")
    return bytes(data)


def open_huggingface(
    target: str,
    *,
    split: str | None,
    columns: dict[str, str],
    allowed: tuple[Path, ...],
    streaming: bool,
    is_partial: bool = False,
    commits: Mapping[tuple[str, str | None], str] | None = None,
) -> HuggingFaceSource:
    """The dataset at a path, or the one that a Hub name (`ORG/NAME:CONFIG@REVISION`) stands for. Raises `BadInput`.

    `commits` are those of names and revisions that a build, which now goes on, was begun with.
    """
    settings = (split, tuple(sorted(columns.items())), allowed, streaming, is_partial)
    path = Path(target)
    if path.exists():
        if not path.is_dir():
            raise BadInput(f"hf:{target}: not a folder; give a saved dataset, or a folder of data files")
        return HuggingFaceSource(str(path.resolve()), None, None, *settings)
    match = _HUB_NAME.fullmatch(target)
    if match is None or target.startswith((".", "/")):
        raise BadInput(f"hf:{target}: no such folder, and no name on the Hub (ORG/NAME, ORG/NAME:CONFIG@REVISION)")
    commit = (commits or {}).get((match["name"], match["revision"]))
    return HuggingFaceSource(match["name"], match["config"], match["revision"], *settings, commit=commit)

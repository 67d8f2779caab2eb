"""A folder of files that share a stem: `a/1.jpg`, `a/1.txt` and `a/1.flac` are the sample with the key `a/1`.

Extensions say what a file is: an image, a sound, `.txt` for the text, `.json` for the metadata. Files of other kinds
and hidden ones are passed over. Folders below are part of the key; links to folders are not followed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.dataset import MAX_METADATA_BYTES, MAX_TEXT_BYTES
from data_pipelines.decode import DecodeError, decode_metadata, decode_text
from data_pipelines.errors import BadInput
from data_pipelines.shard import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, Sample
from data_pipelines.sources.cells import path_key
from data_pipelines.sources.files import FileFault, read_file, read_sample
from data_pipelines.sources.source import Item, Note, Row, RowFault

_MEMBER_OF = {**dict.fromkeys(IMAGE_EXTENSIONS, "image"), **dict.fromkeys(AUDIO_EXTENSIONS, "audio")}
_MEMBER_OF |= {"txt": "text", "json": "json"}
_NUM_SHOWN = 5


@dataclass(frozen=True)
class FolderSource:
    """The folder at `path` (absolute). `allowed` are further folders that links among its files may lead to.

    With `is_partial`, a stem may have metadata alone: another source has the rest.
    """

    path: Path
    allowed: tuple[Path, ...] = ()
    is_partial: bool = False

    @property
    def label(self) -> str:
        """The folder's path."""
        return str(self.path)

    @property
    def default_name(self) -> str:
        """The folder's name."""
        return self.path.name or "dataset"

    @property
    def shard_prefix(self) -> str:
        """The folder's name."""
        return self.default_name

    def identity(self) -> dict[str, Any]:
        """Kind and the folder's name."""
        return {"kind": "files", "folder": self.path.name}

    def rows(self) -> Iterator[Item]:
        """A row for each stem, folder by folder: a folder's own files by name, then the folders in it by name."""
        number = 0
        others: Counter[str] = Counter()
        first_seen: dict[str, str] = {}
        for stem, files in _stems(self.path, others):
            if not self.is_partial and files.keys() == {"json"}:
                others[".json alone"] += 1
                continue
            number += 1
            item = self._row(number, stem, files)
            if isinstance(item, Row) and item.key in first_seen:
                detail = f"files of {stem!r} and of {first_seen[item.key]!r} would have the same key; rename one"
                item = RowFault.of(item, None, "duplicate", detail)
            elif isinstance(item, Row):
                first_seen[item.key] = stem
            yield item
        if not number:
            raise BadInput(f"{self.path}: no image, text or sound in this folder")
        if others:
            shown = ", ".join(f"{suffix or 'no extension'} {count}" for suffix, count in others.most_common(_NUM_SHOWN))
            yield Note(f"{self.path}: files of other kinds are passed over ({shown})")

    def read(self, row: Row) -> Sample:
        """The row's files, byte for byte. Raises `RowFault`."""
        return read_sample(row, self.path, self.allowed)

    def _row(self, number: int, stem: str, files: dict[str, list[str]]) -> Row | RowFault:
        try:
            # The plan holds names as UTF-8.
            stem.encode()
            key = path_key(stem)
        except (BadInput, UnicodeEncodeError) as error:
            return RowFault(number, None, None, None, "key", f"files of {stem!r} cannot be a sample: {error}")
        for member, names in files.items():
            if len(names) > 1:
                detail = f"{' and '.join(map(repr, names))} share a stem, and only one can be the {member}"
                return RowFault(number, None, key, member, "duplicate", detail)
        text: str | None = None
        metadata: dict[str, Any] = {}
        try:
            if "text" in files:
                data = read_file(files["text"][0], "text", self.path, self.allowed, MAX_TEXT_BYTES)
                text = decode_text(data, MAX_TEXT_BYTES)
            if "json" in files:
                data = read_file(files["json"][0], "json", self.path, self.allowed, MAX_METADATA_BYTES)
                metadata = decode_metadata(data, MAX_METADATA_BYTES)
        except (FileFault, DecodeError) as error:
            member = "json" if "text" not in files or text is not None else "text"
            return RowFault(number, None, key, member, error.reason, error.detail)
        image, audio = (files.get(member, [None])[0] for member in ("image", "audio"))
        if not self.is_partial and text is None and image is None and audio is None:
            return RowFault(number, None, key, None, "empty", f"files of {stem!r}: no image, no text and no sound")
        return Row(number, key, image, text, audio, metadata)


def _stems(folder: Path, others: Counter[str]) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """(relative path without extension, its files by member) for each stem, folder by folder; counts `others`."""
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(parent).relative_to(folder).as_posix()
        stems: dict[str, dict[str, list[str]]] = {}
        for name in sorted(names):
            if name.startswith("."):
                continue
            stem, suffix = os.path.splitext(name)
            member = _MEMBER_OF.get(suffix.lower().removeprefix("."))
            if member is None:
                others[suffix] += 1
                continue
            path = name if here == "." else f"{here}/{name}"
            stems.setdefault(path.removesuffix(suffix), {}).setdefault(member, []).append(path)
        yield from stems.items()


def _refuse(error: OSError) -> None:
    raise BadInput(f"{error.filename}: cannot be read ({error.strerror})") from error

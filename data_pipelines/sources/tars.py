"""WebDataset tars that are there already, cut into new shards: one tar, a brace list, a folder, or a dataset of ours.

The tars are read by our own distrustful walk and never changed. Image, text, sound and JSON members come over byte for
byte; an extension that its bytes contradict is put right; members of other kinds stay behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.dataset import MAX_METADATA_BYTES, MAX_TEXT_BYTES, open_dataset
from data_pipelines.decode import DecodeError, decode_metadata, decode_text
from data_pipelines.errors import BadInput
from data_pipelines.index import Quarantined, ShardIndex, index_shard
from data_pipelines.shard import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, Sample, ShardReader, check_key, expand_shards
from data_pipelines.sources.files import FileFault, extension_of, make_sample
from data_pipelines.sources.source import Item, Note, Row, RowFault

_EXTENSIONS = {"image": IMAGE_EXTENSIONS, "audio": AUDIO_EXTENSIONS}


@dataclass(frozen=True)
class TarSource:
    """Tars at `paths` below `folder` (absolute), in this order.

    With `prefix_keys`, a key is the tar's stem and the sample's own: for tars that each count from zero.
    """

    folder: Path
    paths: tuple[str, ...]
    name: str
    prefix_keys: bool = False

    @property
    def label(self) -> str:
        """The folder of the tars, or the one tar."""
        return str(self.folder / self.paths[0] if len(self.paths) == 1 else self.folder)

    @property
    def default_name(self) -> str:
        """The name of the folder or of the one tar."""
        return self.name

    @property
    def shard_prefix(self) -> str:
        """The same."""
        return self.name

    def identity(self) -> dict[str, Any]:
        """Kind, the tars' names, and whether they are part of the keys."""
        return {"kind": "tars", "tars": list(self.paths), "prefix_keys": self.prefix_keys}

    def rows(self) -> Iterator[Item]:
        """A row for each whole sample, tar by tar; what is damaged in a tar is a fault of the place where it stands."""
        number = num_pickles = 0
        first_seen: dict[str, str] = {}
        for path in self.paths:
            index = index_shard(self.folder / path)
            for place in range(len(index)):
                number += 1
                item = self._row(number, path, index, place)
                if isinstance(item, Row) and item.key in first_seen:
                    hint = "" if self.prefix_keys else "; --prefix-keys puts the tar's name before each key"
                    detail = f"{path}: the key {item.key!r} is in {first_seen[item.key]} already{hint}"
                    item = RowFault.of(item, None, "duplicate", detail)
                elif isinstance(item, Row):
                    first_seen[item.key] = path
                yield item
            for line in index.quarantined:
                if line.reason == "pickle":
                    # The sample is whole without it.
                    num_pickles += 1
                    continue
                number += 1
                yield _damage(number, path, line)
        if num_pickles:
            yield Note(f"{self.label}: members that may hold pickles stay behind, unopened ({num_pickles})")
        if not number:
            raise BadInput(f"{self.label}: no sample in {len(self.paths)} tar(s)")

    def read(self, row: Row) -> Sample:
        """The row's members, byte for byte. Raises `RowFault`, and `BadInput` when a tar is gone or was cut."""
        members: dict[str, tuple[bytes, str] | None] = {}
        for modality, reference in (("image", row.image), ("audio", row.audio)):
            members[modality] = None
            if reference is not None:
                path, offset, size, named = json.loads(reference)
                data = ShardReader(self.folder / path).read(offset, size)
                try:
                    members[modality] = data, extension_of(data, modality, named)
                except FileFault as fault:
                    raise RowFault.of(row, modality, fault.reason, f"{path}: {fault.detail}") from fault
        return make_sample(row, members["image"], members["audio"])

    def _row(self, number: int, path: str, index: ShardIndex, place: int) -> Row | RowFault:
        own_key = index.key(place)
        key = f"{PurePosixPath(path).stem.replace('.', '_')}/{own_key}" if self.prefix_keys else own_key
        references: dict[str, str | None] = {}
        for modality in ("image", "audio"):
            offset, size = int(index[f"{modality}_offset"][place]), int(index[f"{modality}_size"][place])
            named = _EXTENSIONS[modality][int(index[f"{modality}_extension"][place])]
            references[modality] = None if size < 0 else json.dumps([path, offset, size, named])

        def read(member: str, max_bytes: int) -> bytes | None:
            offset, size = int(index[f"{member}_offset"][place]), int(index[f"{member}_size"][place])
            if size > max_bytes:
                raise DecodeError("size", f"a member of {size} bytes, more than {max_bytes}")
            return None if size < 0 else ShardReader(self.folder / path).read(offset, size)

        member = "text"
        try:
            check_key(key)
            text = decode_text(read("text", MAX_TEXT_BYTES) or b"", MAX_TEXT_BYTES)
            member = "json"
            metadata = decode_metadata(read("json", MAX_METADATA_BYTES) or b"{}", MAX_METADATA_BYTES)
        except BadInput as error:
            return RowFault(number, None, own_key, None, "key", f"{path}: {error}")
        except DecodeError as error:
            return RowFault(number, None, key, member, error.reason, f"{path}: {error.detail}")
        if text is None and references["image"] is None and references["audio"] is None:
            return RowFault(number, None, key, None, "empty", f"{path}: no image, no text and no sound")
        return Row(number, key, references["image"], text, references["audio"], metadata)


def open_tars(target: str, prefix_keys: bool = False) -> TarSource:
    """The tars that a path or a brace list names. Raises `BadInput` when there is none."""
    path = Path(target)
    if path.is_dir():
        folder = path.resolve()
        if (folder / "dataset.json").is_file():
            dataset = open_dataset(folder)
            return TarSource(folder, tuple(shard.path for shard in dataset.shards), dataset.name, prefix_keys)
        below = (tar.relative_to(folder) for tar in folder.rglob("*.tar"))
        tars = sorted(tar.as_posix() for tar in below if not any(part.startswith(".") for part in tar.parts))
        if not tars:
            raise BadInput(f"{target}: no .tar file in it or below it")
        return TarSource(folder, tuple(tars), folder.name or "dataset", prefix_keys)
    files = [Path(name).resolve() for name in expand_shards(target)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BadInput(f"{missing[0]}: no such file{more}; give a tar, a brace list, or a folder of tars")
    folder = Path(os.path.commonpath([file.parent for file in files]))
    name = files[0].stem if len(files) == 1 else folder.name
    return TarSource(
        folder, tuple(file.relative_to(folder).as_posix() for file in files), name or "dataset", prefix_keys
    )


def _damage(number: int, path: str, line: Quarantined) -> RowFault:
    return RowFault(number, None, line.key, line.member, line.reason, f"{path}: {line.detail}")

"""What can be wrong with one shard: the file, its index, what dataset.json says of it, its samples, their members.

`KINDS` lists it all. The index is made again from the tar and compared; members are decoded by `decode`, as for a run.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipelines.config import AudioConfig, ImageConfig
from data_pipelines.dataset import MAX_METADATA_BYTES, MAX_TEXT_BYTES, ShardEntry
from data_pipelines.decode import (
    MAX_AUDIO_BYTES,
    MAX_IMAGE_BYTES,
    DecodeError,
    decode_metadata,
    decode_text,
    load_audio,
    load_image,
)
from data_pipelines.engines.local import Tick
from data_pipelines.errors import BadInput
from data_pipelines.index import MEMBERS, MODALITIES, ShardIndex, index_shard
from data_pipelines.shard import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, ShardReader, hash_shard, split_member_name
from data_pipelines.tar import Member, open_tar, walk

KINDS = {
    "dataset": "dataset.json contradicts itself or a tar",
    "unlisted": "a tar that dataset.json does not name",
    "missing": "a tar that is not there",
    "tar": "a file that is no plain tar",
    "size": "a tar of another size than dataset.json says",
    "sha256": "a tar of other content than dataset.json says",
    "damage": "a place in a tar that cannot be read, or is refused",
    "index": "an index that is missing, or says something else than its tar",
    "interleaved": "a sample whose members do not lie side by side",
    "duplicate-key": "a key that comes more than once",
    "duplicate-member": "a member that comes more than once",
    "ambiguous": "several pictures or sounds in one sample: only one is read",
    "incomplete": "neither picture nor text nor sound, or not all that is required",
    "empty-text": "a text with nothing in it",
    "undecodable": "a member that does not decode",
    "silent": "a sound that stays below -80 dB of full scale",
}
"""Every kind of finding, in the order of a report, and what it means."""

SILENCE = 1e-4
"""Peak, of 1, below which a sound counts as silent."""
# What is wrong a million times is told a thousand times, and counted.
_MOST_A_KIND = 1000
_QUARANTINE_KINDS = {"duplicate": "duplicate-member", "empty": "incomplete"}
_IMAGE = ImageConfig()
# Ten minutes bound the memory of a worker; training hears less than that.
_AUDIO = AudioConfig(max_seconds=600)
_LIMITS = {"image": MAX_IMAGE_BYTES, "audio": MAX_AUDIO_BYTES, "text": MAX_TEXT_BYTES, "json": MAX_METADATA_BYTES}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `shard` is a path within the dataset; `key` and `member` are None where unknown."""

    shard: str
    key: str | None
    member: str | None
    kind: str
    detail: str


@dataclass
class Notes:
    """Findings about one file: all are counted, and at most 1,000 a kind kept."""

    shard: str
    kept: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, detail: str, key: str | None = None, member: str | None = None) -> None:
        """Note one thing; `kind` is one of `KINDS`."""
        assert kind in KINDS, kind
        self.counts[kind] += 1
        if self.counts[kind] <= _MOST_A_KIND:
            self.kept.append(Finding(self.shard, key, member, kind, detail))


@dataclass(frozen=True)
class ShardResult:
    """What was found in a shard, its whole samples and bytes, and the sorted hashes (uint64) of its keys."""

    notes: Notes
    num_samples: int
    num_bytes: int
    key_hashes: npt.NDArray[np.uint64]


def hash_keys(keys: Sequence[str]) -> npt.NDArray[np.uint64]:
    """64-bit hashes of keys, in their order."""
    digests = b"".join(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype=np.uint64)


@dataclass(frozen=True)
class ShardLinter:
    """Lints one shard: what the workers are sent.

    `folder` is the dataset's, `fast` leaves pictures and sounds undecoded, `require` names modalities that every sample
    must have.
    """

    folder: Path
    fast: bool
    require: tuple[str, ...]

    def __call__(self, entry: ShardEntry, tick: Tick) -> ShardResult:
        """Look through one shard. `tick` is called with 1 for each whole sample. Nothing in the data raises."""
        notes = Notes(entry.path)
        tar = self.folder / entry.path
        try:
            index = index_shard(tar)
        except BadInput as error:
            notes.add("tar" if tar.exists() else "missing", str(error))
            return ShardResult(notes, 0, 0, np.empty(0, np.uint64))
        num_bytes, sha256 = hash_shard(tar)
        if num_bytes != entry.bytes:
            notes.add("size", f"{num_bytes} bytes, but dataset.json says {entry.bytes}")
        elif sha256 != entry.sha256:
            # The hash of a tar of another size would say nothing new.
            notes.add("sha256", f"is {sha256[:16]}..., but dataset.json says {entry.sha256[:16]}...")
        for line in index.quarantined:
            kind = _QUARANTINE_KINDS.get(line.reason, "damage")
            notes.add(kind, f"{line.reason}: {line.detail}" if kind == "damage" else line.detail, line.key, line.member)
        members = _members(tar)
        _check_groups(notes, members)
        _check_entry(notes, index, entry)
        _check_index(notes, index, self.folder, entry)
        for modality in self.require:
            for row in np.flatnonzero(index[f"{modality}_size"] < (1 if modality == "text" else 0)).tolist():
                notes.add("incomplete", f"has no {modality}", index.key(row))
        names = {member.offset: member.name for member in members if member.size}
        reader = ShardReader(tar)
        for row in range(len(index)):
            self._check_members(notes, index, row, reader, names)
            tick(1)
        return ShardResult(notes, len(index), num_bytes, np.unique(hash_keys(index.keys())))

    def _check_members(
        self, notes: Notes, index: ShardIndex, row: int, reader: ShardReader, names: dict[int, str]
    ) -> None:
        key = index.key(row)
        for part in ("text", "json") if self.fast else MEMBERS:
            offset, size = int(index[f"{part}_offset"][row]), int(index[f"{part}_size"][row])
            if size < 0:
                continue
            name = names.get(offset) or f"{key}.{_extension(index, row, part)}"
            try:
                if size > _LIMITS[part]:
                    raise DecodeError("size", f"{size} bytes, more than {_LIMITS[part]}")
                fault = _decode(part, reader.read(offset, size))
            except DecodeError as error:
                fault = ("undecodable", str(error))
            if fault is not None:
                notes.add(*fault, key, name)


def _decode(part: str, data: bytes) -> tuple[str, str] | None:
    """Decode one member; (kind, detail) when what came out is nothing. Raises `DecodeError`."""
    if part == "json":
        decode_metadata(data, MAX_METADATA_BYTES)
    elif part == "text" and decode_text(data, MAX_TEXT_BYTES) is None:
        return "empty-text", f"{len(data)} bytes and no character to read"
    elif part == "image":
        load_image(data, _IMAGE.max_pixels)
    elif part == "audio":
        wave = load_audio(data, _AUDIO)
        peak = float(np.abs(wave).max())
        if peak < SILENCE:
            return "silent", f"peak {peak:.1e} of 1 in {len(wave) / _AUDIO.sampling_rate:.2f} s"
    return None


def _extension(index: ShardIndex, row: int, part: str) -> str:
    if part == "image":
        return IMAGE_EXTENSIONS[int(index["image_extension"][row])]
    if part == "audio":
        return AUDIO_EXTENSIONS[int(index["audio_extension"][row])]
    return "txt" if part == "text" else part


def _members(tar: Path) -> list[Member]:
    descriptor = open_tar(tar)
    try:
        return [found for found in walk(descriptor) if isinstance(found, Member)]
    finally:
        os.close(descriptor)


def keys_in(tar: Path) -> list[str]:
    """Keys of a tar in order, from its headers alone, of damaged samples too; each once."""
    parts = (split_member_name(member.name) for member in _members(tar))
    return list(dict.fromkeys(part[0] for part in parts if part is not None))


def _check_groups(notes: Notes, members: Sequence[Member]) -> None:
    """Keys that come back after another one, and samples with two members of a modality."""
    runs: dict[str, list[list[str]]] = {}
    previous = None
    for member in members:
        parts = split_member_name(member.name)
        if parts is None:
            continue
        key, extension = parts
        places = runs.setdefault(key, [])
        if key != previous:
            places.append([])
        places[-1].append(extension)
        previous = key
    for key, places in runs.items():
        if len(places) > 1:
            distinct = [set(extensions) for extensions in places]
            if sum(map(len, distinct)) == len(set().union(*distinct)):
                where = " and ".join("+".join(extensions) for extensions in places)
                notes.add("interleaved", f"{where} lie apart, with other samples between", key)
            else:
                notes.add("duplicate-key", f"{len(places)} samples of this shard have it", key)
        for extensions in places:
            for known in (IMAGE_EXTENSIONS, AUDIO_EXTENSIONS):
                found = [extension for extension in known if extension in extensions]
                if len(found) > 1:
                    notes.add("ambiguous", f"{' and '.join(found)}; {found[0]} is read", key)


def _check_entry(notes: Notes, index: ShardIndex, entry: ShardEntry) -> None:
    if len(index) != entry.num_samples:
        notes.add("dataset", f"{len(index)} whole samples, but dataset.json says {entry.num_samples}")
    for modality in MODALITIES:
        count, told = index.count(modality), entry.modalities.get(modality, 0)
        if count != told:
            notes.add("dataset", f"{count} samples have {modality}, but dataset.json says {told}")


def _check_index(notes: Notes, index: ShardIndex, folder: Path, entry: ShardEntry) -> None:
    """Compare the index that is there with the one just made."""
    try:
        stored = ShardIndex.load(folder / entry.index)
    except BadInput as error:
        notes.add("index", str(error))
        return
    if (stored.sha256, stored.num_bytes) != (entry.sha256, entry.bytes):
        notes.add("index", f"{entry.index} was made of another tar than the one in dataset.json")
    keys, told = index.keys(), stored.keys()
    if keys != told:
        in_tar, in_index = set(keys), set(told)
        for key in dict.fromkeys([*keys, *told]):
            if key not in in_index:
                notes.add("index", "in the tar, but not in the index", key)
            elif key not in in_tar:
                notes.add("index", "in the index, but not as a whole sample in the tar", key)
        if in_tar == in_index:
            notes.add("index", "its keys come in another order, or another number of times, than in the tar")
        return
    differences: dict[int, list[str]] = {}
    for column in index.columns:
        ours, theirs = index[column], stored[column]
        # What an MP3 or OGG says of its length is an estimate, which differs between versions of libsndfile.
        same = np.isclose(ours, theirs, rtol=0.01, atol=0.01) if column == "audio_seconds" else ours == theirs
        for row in np.flatnonzero(~same).tolist():
            differences.setdefault(row, []).append(f"{column} is {theirs[row]} and not {ours[row]}")
    for row, what in sorted(differences.items()):
        notes.add("index", ", ".join(what), index.key(row))

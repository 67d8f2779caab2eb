"""One shard: a plain WebDataset tar of samples that share a key.

Written with webdataset's own `TarWriter`, so that webdataset and `datasets` read it; the bytes are a function of the
samples alone (times 0, fixed owner, members sorted by extension). Read by offset with `pread`, which is safe in threads
and after a fork because no file position is shared.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import stat
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

from data_pipelines.atomic import atomic_file
from data_pipelines.errors import BadInput
from data_pipelines.tar import MAX_NAME_BYTES

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
AUDIO_EXTENSIONS = ("flac", "wav", "mp3", "ogg")
# What every extension of a member fits behind.
_MAX_KEY_BYTES = MAX_NAME_BYTES - len(".webp")
_META_NAME = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Sample:
    """One image-text-audio tuple, as encoded bytes. Any of the three may be None.

    `text` has no byte order mark and no white space around it; empty is None. The extensions name the encoding of the
    bytes beside them and matter only where those are there.
    """

    key: str
    image: bytes | None = None
    text: str | None = None
    audio: bytes | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    image_extension: str = "jpg"
    audio_extension: str = "wav"


@dataclass(frozen=True)
class ShardSummary:
    """What was written: the count, the size in bytes and the SHA-256 (hex) of the tar, and samples a modality."""

    num_samples: int
    num_bytes: int
    sha256: str
    modalities: dict[str, int]


def split_member_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension) of a member's name, or None where webdataset passes the member over.

    The key is the path up to the first dot of the base name (webdataset's tariterators.base_plus_ext).
    """
    # webdataset's own rule is the pattern ((?:.*/|)[^.]+)[.]([^/]*), which takes quadratic time for a hostile name.
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    has_key = stem or (slash and "." not in folder.rpartition("/")[2])
    if not dot or not has_key or _META_NAME.match(name):
        return None
    return name[: len(name) - len(extension) - 1], extension.lower()


def check_key(key: str) -> None:
    """Raise `BadInput` unless a tar can hold the key and webdataset gives back the same one."""
    parts = split_member_name(f"{key}.txt")
    if parts is None or parts[0] != key or key.startswith("/") or ".." in key.split("/"):
        raise BadInput(f"key {key!r} cannot be a member's name: no dots in its last part, no '..', not absolute")
    if "\\" in key or not key.isprintable():
        raise BadInput(f"key {key!r} holds a backslash or a character that does not print")
    if len(key.encode("utf-8", "surrogateescape")) > _MAX_KEY_BYTES:
        raise BadInput(f"key {key[:40]!r}... of more than {_MAX_KEY_BYTES} bytes")


def _members(sample: Sample) -> dict[str, Any]:
    check_key(sample.key)
    members: dict[str, Any] = {"__key__": sample.key}
    if sample.image is not None:
        if sample.image_extension not in IMAGE_EXTENSIONS:
            raise BadInput(f"{sample.key}: image extension {sample.image_extension!r} is none of {IMAGE_EXTENSIONS}")
        members[sample.image_extension] = sample.image
    if sample.text is not None:
        members["txt"] = sample.text.encode("utf-8")
    if sample.audio is not None:
        if sample.audio_extension not in AUDIO_EXTENSIONS:
            raise BadInput(f"{sample.key}: sound extension {sample.audio_extension!r} is none of {AUDIO_EXTENSIONS}")
        members[sample.audio_extension] = sample.audio
    if len(members) == 1:
        raise BadInput(f"{sample.key}: has neither image nor text nor sound")
    if sample.metadata:
        members["json"] = _dump_metadata(sample)
    return members


def _dump_metadata(sample: Sample) -> bytes:
    try:
        text = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{sample.key}: metadata does not go into JSON ({error})") from error


def write_shard(samples: Iterable[Sample], path: Path) -> ShardSummary:
    """Write samples to a tar that appears at `path` whole or not at all.

    Raises `BadInput` for a sample that a shard cannot hold: its key or extension, nothing in it, a key twice in a row.
    """
    from webdataset.writer import TarWriter

    count = 0
    previous: str | None = None
    modalities = {"image": 0, "text": 0, "audio": 0}
    with atomic_file(Path(path)) as file:
        with TarWriter(file, encoder=False, compress=False, mtime=0) as writer:
            for sample in samples:
                if sample.key == previous:
                    raise BadInput(f"{path}: key {sample.key!r} comes twice in a row and would become one sample")
                writer.write(_members(sample))
                previous = sample.key
                count += 1
                for modality in modalities:
                    modalities[modality] += getattr(sample, modality) is not None
        file.flush()
        size, digest = _hash_file(file)
    return ShardSummary(count, size, digest, modalities)


def _hash_file(file: BufferedReader | BufferedRandom) -> tuple[int, str]:
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return file.tell(), digest


def hash_shard(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256 as hex) of a file."""
    with open(path, "rb") as file:
        return _hash_file(file)


class ShardReader:
    """Reads members of one tar by offset. Threads may share it; it closes when the last user lets go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A pipe without a writer would block the open for ever.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise BadInput(f"{path}: cannot be opened ({error.strerror})") from error
        # Not __del__, which at the end of the interpreter may come after `os` is gone.
        self._close = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{path}: not a regular file")
        self.num_bytes = status.st_size
        """Size of the tar in bytes."""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. Raises `BadInput` when the tar ends before that."""
        # Python allocates what is asked for before it reads, and an index may come from a stranger.
        if offset < 0 or size < 0 or offset + size > self.num_bytes:
            raise BadInput(f"{self.path}: ends before byte {offset + size}; it changed since it was indexed")
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise BadInput(f"{self.path}: ends before byte {offset + size}; it changed since it was indexed")
            data += more
        return data

    def close(self) -> None:
        """Close the tar; more than once does nothing."""
        self._descriptor = -1
        self._close()


def expand_shards(pattern: str, limit: int = 1_000_000) -> list[str]:
    """Expand a brace list (`shards-{0000..0012}.tar`, `{a,b}.tar`) the way webdataset does; plain names stay.

    Raises `BadInput` when the braces do not close or give more than `limit` names.
    """
    import braceexpand

    try:
        names = list(itertools.islice(braceexpand.braceexpand(pattern), limit + 1))
    except ValueError as error:
        raise BadInput(f"{pattern}: the braces do not match ({error})") from error
    if len(names) > limit:
        raise BadInput(f"{pattern}: gives more than {limit} names")
    return names

"""Files that a source names: found inside the allowed folders, read whole, and checked to be what they say.

A manifest may come from a stranger. A path in it reaches nothing outside the manifest's own folder and the folders that
the user allows by name, not through `..` and not through a symbolic link; pipes and devices are not opened; sizes are
known before a byte is read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from data_pipelines.dataset import LIMITS
from data_pipelines.headers import audio_seconds, image_size
from data_pipelines.shard import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS, Sample
from data_pipelines.sources.source import Row, RowFault

_EXTENSIONS = {"image": IMAGE_EXTENSIONS, "audio": AUDIO_EXTENSIONS}
_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
_FORMATS |= {"flac": "FLAC", "wav": "WAV", "mp3": "MP3", "ogg": "OGG"}


class FileFault(Exception):
    """A file that cannot become a member: one word to count by, and a line for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def check_reference(reference: str, modality: str) -> str:
    """The member's extension, in lower case. Raises `FileFault` for a reference that no file could satisfy."""
    if "://" in reference:
        raise FileFault("path", f"{modality} {reference!r} is a URL; download it and give the path of the file")
    if ".." in Path(reference).parts:
        raise FileFault("path", f"{modality} path {reference!r} contains '..', which is refused")
    if "\0" in reference:
        raise FileFault("path", f"{modality} path {reference!r} contains a NUL")
    try:
        reference.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"{modality} path {reference!r} contains half of a surrogate pair, which UTF-8 cannot hold"
        raise FileFault("path", detail) from error
    extension = Path(reference).suffix.lower().removeprefix(".")
    if extension not in _EXTENSIONS[modality]:
        kinds = ", ".join(f".{known}" for known in _EXTENSIONS[modality])
        raise FileFault("format", f"{modality} {reference!r} is none of {kinds}; convert it first")
    return extension


def read_member(reference: str, modality: str, folder: Path, allowed: tuple[Path, ...]) -> tuple[bytes, str]:
    """(bytes, extension) of the file that `reference` names, relative to `folder` or absolute.

    `allowed` are the further folders that files may lie in. Raises `FileFault`.
    """
    extension = check_reference(reference, modality)
    path = _find(reference, modality, folder, allowed)
    data = _read_regular(path, modality, LIMITS[modality])
    _check_content(data, extension, modality, folder / reference)
    return data, extension


def read_file(reference: str, what: str, folder: Path, allowed: tuple[Path, ...], max_bytes: int) -> bytes:
    """The bytes of the file that `reference` names, whatever they are; `what` is for messages. Raises `FileFault`."""
    return _read_regular(_find(reference, what, folder, allowed), what, max_bytes)


def read_sample(row: Row, folder: Path, allowed: tuple[Path, ...]) -> Sample:
    """The sample of a row whose references are files, byte for byte. Raises `RowFault`."""
    members: dict[str, tuple[bytes, str] | None] = {}
    for modality, reference in (("image", row.image), ("audio", row.audio)):
        try:
            members[modality] = None if reference is None else read_member(reference, modality, folder, allowed)
        except FileFault as fault:
            raise RowFault.of(row, modality, fault.reason, fault.detail) from fault
    return make_sample(row, members["image"], members["audio"])


def make_sample(row: Row, image: tuple[bytes, str] | None, audio: tuple[bytes, str] | None) -> Sample:
    """A sample of a row's key, text and metadata, and of (bytes, extension) of its image and its sound."""
    return Sample(
        key=row.key,
        image=image and image[0],
        text=row.text,
        audio=audio and audio[0],
        metadata=row.metadata,
        image_extension=image[1] if image else "jpg",
        audio_extension=audio[1] if audio else "wav",
    )


def extension_of(data: bytes, modality: str, named: str | None = None) -> str:
    """The extension of an image or a sound by its bytes; `named`, where that is one that fits them.

    Raises `FileFault` for what is empty or of no known format.
    """
    if not data:
        raise FileFault("empty", f"the {modality} is empty")
    found = _format_of(data, modality)
    if found is None:
        known = ", ".join(dict.fromkeys(_FORMATS[extension] for extension in _EXTENSIONS[modality]))
        raise FileFault("format", f"the {modality} is none of {known} (begins with {data[:8]!r})")
    if modality == "audio" and audio_seconds(data) <= 0:
        raise FileFault("format", f"the audio holds no sound, or its {found} header is damaged")
    if named is not None and _FORMATS.get(named) == found:
        return named
    return next(extension for extension in _EXTENSIONS[modality] if _FORMATS[extension] == found)


def _find(reference: str, modality: str, folder: Path, allowed: tuple[Path, ...]) -> Path:
    path = folder / reference
    try:
        resolved = path.resolve(strict=True)
    except FileNotFoundError as error:
        raise FileFault("missing", f"{modality} file {path} does not exist") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise FileFault("unreadable", f"{modality} file {path} cannot be reached ({error})") from error
    if not any(resolved.is_relative_to(root) for root in (folder, *allowed)):
        raise FileFault(
            "path",
            f"{modality} file {resolved} lies outside the folder {folder}; allow it with --allow {resolved.parent}",
        )
    return resolved


def _read_regular(path: Path, modality: str, max_bytes: int) -> bytes:
    try:
        # A pipe without a writer would block the open for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FileFault("unreadable", f"{modality} file {path} cannot be read ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileFault("type", f"{modality} file {path} is not a regular file")
        if status.st_size > max_bytes:
            raise FileFault("size", f"{modality} file {path} has {status.st_size} bytes; the limit is {max_bytes}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    except OSError as error:
        raise FileFault("unreadable", f"{modality} file {path} cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)


def _check_content(data: bytes, extension: str, modality: str, path: Path) -> None:
    if not data:
        raise FileFault("empty", f"{modality} file {path} is empty")
    found = _format_of(data, modality)
    expected = _FORMATS[extension]
    if found is None:
        raise FileFault("format", f"{modality} file {path} is no readable {expected} file")
    if found != expected:
        raise FileFault("format", f"{modality} file {path} holds {found}; rename it to .{found.lower()}")
    if modality == "audio" and audio_seconds(data) <= 0:
        raise FileFault("format", f"audio file {path} holds no sound, or its {expected} header is damaged")


def _format_of(data: bytes, modality: str) -> str | None:
    if modality == "audio":
        return _sound_format(data)
    size = image_size(data)
    return None if size is None else size[0]


def _sound_format(data: bytes) -> str | None:
    if data.startswith(b"fLaC"):
        return "FLAC"
    if data[:4] in (b"RIFF", b"RF64") and data[8:12] == b"WAVE":
        return "WAV"
    if data.startswith(b"OggS"):
        return "OGG"
    if data.startswith(b"ID3") or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0):
        return "MP3"
    return None

"""A source with rows left out, texts cleaned and members written anew, as the user asked.

Which rows stay is decided while the build is planned, in one pass in the source's order; where a rule needs the bytes
of images and sounds (sizes, duplicates), that pass reads them. What a row becomes depends on the row and the settings
alone. Rows that are left out on purpose are counted; they are no faults.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_pipelines.config import ImageConfig, PrepareConfig
from data_pipelines.decode import DecodeError, load_image
from data_pipelines.headers import audio_seconds, image_size
from data_pipelines.shard import Sample
from data_pipelines.sources.cells import key_of, text_problem
from data_pipelines.sources.source import Change, Drop, Item, Row, RowFault, Source

_MAX_PIXELS = ImageConfig().max_pixels


@dataclass(frozen=True)
class PreparedSource:
    """`source`, prepared as `settings` say."""

    source: Source
    settings: PrepareConfig

    @property
    def label(self) -> str:
        """The source's own."""
        return self.source.label

    @property
    def default_name(self) -> str:
        """The source's own."""
        return self.source.default_name

    @property
    def shard_prefix(self) -> str:
        """The source's own."""
        return self.source.shard_prefix

    def identity(self) -> dict[str, Any]:
        """The source's own, and the settings that are not at their defaults as `prepare`."""
        return {**self.source.identity(), "prepare": self.settings.model_dump(exclude_defaults=True)}

    def rows(self) -> Iterator[Item]:
        """The rows that stay, with their texts cleaned, and a `Drop` for each that does not."""
        duplicates = _Duplicates(self.settings)
        for item in self.source.rows():
            if not isinstance(item, Row):
                yield item
                continue
            row = self._cleaned(item)
            if row.text != item.text:
                yield Change("text")
                # Some characters are longer in NFC.
                if row.text is not None and (problem := text_problem(row.text)):
                    yield RowFault.of(row, "text", "text", f"text {problem}")
                    continue
            reason = self._by_row(row)
            if reason is None and (self._needs_bytes or self.settings.dedup):
                try:
                    sample = self.source.read(row) if self._needs_bytes else Sample(row.key, text=row.text)
                    reason = self._by_size(sample) or duplicates.reason(sample)
                except RowFault as fault:
                    yield fault
                    continue
                except DecodeError as error:
                    yield RowFault.of(row, "image", error.reason, f"image: {error.detail}")
                    continue
            yield row if reason is None else Drop(reason)

    def read(self, row: Row) -> Sample:
        """The source's sample with its image and sound as asked for. Raises `RowFault`."""
        from data_pipelines.reencode import reencode_audio, reencode_image

        sample, settings = self.source.read(row), self.settings
        member = "image"
        try:
            if sample.image is not None and (settings.image_side is not None or settings.image_format is not None):
                image, extension = reencode_image(sample.image, settings.image_side, settings.image_format)
                if image is not sample.image:
                    sample = replace(sample, image=image, image_extension=extension)
            member = "audio"
            if sample.audio is not None and settings.audio_rate is not None:
                audio = reencode_audio(sample.audio, settings.audio_rate)
                sample = replace(sample, audio=audio, audio_extension="flac")
        except DecodeError as error:
            raise RowFault.of(row, member, error.reason, f"{member}: {error.detail}") from error
        return sample

    @property
    def _needs_bytes(self) -> bool:
        settings = self.settings
        members = {member for names in settings.dedup for member in names.split("+")}
        sizes = settings.min_image_side is not None or settings.max_seconds is not None
        return sizes or settings.dedup_images is not None or bool(members - {"text"})

    def _cleaned(self, row: Row) -> Row:
        if row.text is None or not (self.settings.clean_text or self.settings.strip_html):
            return row
        from data_pipelines.caption_cleaning import clean_caption

        return replace(row, text=clean_caption(row.text, self.settings.strip_html))

    def _by_row(self, row: Row) -> str | None:
        """Why a row goes that need not be read for it."""
        if row.image is None and row.audio is None and row.text is None:
            return "empty_text"
        for member in self.settings.require:
            if getattr(row, member) is None:
                return f"require.{member}"
        for name, kept in self.settings.keep.items():
            value = row.metadata.get(name)
            found = value if isinstance(value, list) else [value]
            if not any(_written(one) in kept for one in found):
                return f"keep.{name}"
        return None

    def _by_size(self, sample: Sample) -> str | None:
        settings = self.settings
        if settings.min_image_side is not None and sample.image is not None:
            header = image_size(sample.image)
            if header is None or min(header[1:]) < settings.min_image_side:
                return "min_image_side"
        if settings.max_seconds is not None and sample.audio is not None:
            if audio_seconds(sample.audio) > settings.max_seconds:
                return "max_seconds"
        return None


def _written(value: Any) -> str | None:
    """A metadata value as a user writes it: `true`, and 2020 where pandas made a 2020.0 of it."""
    return str(value).lower() if isinstance(value, bool) else key_of(value)


class _Duplicates:
    """What came before, and whether a sample repeats it. Only samples that stay are remembered."""

    def __init__(self, settings: PrepareConfig) -> None:
        from data_pipelines.near_images import NearHashes

        self._combinations = [tuple(names.split("+")) for names in settings.dedup]
        self._seen: list[set[bytes]] = [set() for _ in self._combinations]
        self._near = None if settings.dedup_images is None else NearHashes(settings.dedup_images)

    def reason(self, sample: Sample) -> str | None:
        """Why the sample goes, or None; it then counts as seen. Raises `DecodeError` for an image that is none."""
        from data_pipelines.near_images import perceptual_hash

        digests = [_digest(sample, members) for members in self._combinations]
        for members, digest, seen in zip(self._combinations, digests, self._seen, strict=True):
            if digest in seen:
                return f"dedup.{'+'.join(members)}"
        if self._near is not None and sample.image is not None:
            if self._near.add(perceptual_hash(load_image(sample.image, _MAX_PIXELS))):
                return "dedup_images"
        for digest, seen in zip(digests, self._seen, strict=True):
            if digest is not None:
                seen.add(digest)
        return None


def _digest(sample: Sample, members: tuple[str, ...]) -> bytes | None:
    """128 bits of SHA-256 over the members; None where the sample has none of them."""
    digest = hashlib.sha256()
    values = [getattr(sample, member) for member in members]
    if all(value is None for value in values):
        return None
    for value in values:
        data = b"" if value is None else value.encode() if isinstance(value, str) else value
        digest.update(f"{-1 if value is None else len(data)} ".encode())
        digest.update(data)
    return digest.digest()[:16]

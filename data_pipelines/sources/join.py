"""Several sources as one, by key: images from one, captions from another.

The first source says which samples there are and in which order; the others add what they have for the same keys, and
are held in memory while the build is planned. What two of them say differently about one key is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample
from data_pipelines.sources.source import Item, Note, Row, RowFault, Source


@dataclass(frozen=True)
class JoinedSource:
    """`sources[0]` with members and metadata of the others. A reference is `[number of the source, its reference]`."""

    sources: tuple[Source, ...]

    @property
    def label(self) -> str:
        """The first source's."""
        return self.sources[0].label

    @property
    def default_name(self) -> str:
        """The first source's."""
        return self.sources[0].default_name

    @property
    def shard_prefix(self) -> str:
        """The first source's."""
        return self.sources[0].shard_prefix

    def identity(self) -> dict[str, Any]:
        """The first source's, and those of the others as `joined`."""
        return {**self.sources[0].identity(), "joined": [source.identity() for source in self.sources[1:]]}

    def rows(self) -> Iterator[Item]:
        """The first source's rows with what the others have for them, then the others' faults and rows left over."""
        tables: list[dict[str, Row]] = []
        left: list[Item] = []
        for source in self.sources[1:]:
            table: dict[str, Row] = {}
            for item in source.rows():
                if isinstance(item, Row):
                    table[item.key] = item
                elif isinstance(item, RowFault):
                    left.append(_of(item, source))
                else:
                    left.append(item)
            tables.append(table)
        yield from left
        num_joined = [0] * len(tables)
        for item in self.sources[0].rows():
            if not isinstance(item, Row):
                yield item
                continue
            parts = [(0, item)]
            for number, table in enumerate(tables):
                partner = table.pop(item.key, None)
                if partner is not None:
                    num_joined[number] += 1
                    parts.append((number + 1, partner))
            yield self._merge(item, parts)
        for source, table, count in zip(self.sources[1:], tables, num_joined, strict=True):
            if not count:
                example = f" (such as {next(iter(table))!r})" if table else ""
                raise BadInput(f"{source.label}: none of its keys{example} is one of {self.label}")
            if table:
                rows = "1 row is" if len(table) == 1 else f"{len(table)} rows are"
                yield Note(f"{source.label}: {rows} of no key in {self.label}, for example {next(iter(table))!r}")

    def read(self, row: Row) -> Sample:
        """The row's members from wherever they are. Raises `RowFault`."""
        images, sounds = (json.loads(ref) if ref is not None else (-1, None) for ref in (row.image, row.audio))
        parts: dict[int, Sample] = {}
        for number in sorted({number for number, _ in (images, sounds) if number >= 0}):
            image = images[1] if images[0] == number else None
            audio = sounds[1] if sounds[0] == number else None
            own = replace(row, image=image, text=None, audio=audio, metadata={})
            parts[number] = self.sources[number].read(own)
        with_image, with_audio = parts.get(images[0]), parts.get(sounds[0])
        return Sample(
            key=row.key,
            image=with_image.image if with_image else None,
            text=row.text,
            audio=with_audio.audio if with_audio else None,
            metadata=row.metadata,
            image_extension=with_image.image_extension if with_image else "jpg",
            audio_extension=with_audio.audio_extension if with_audio else "wav",
        )

    def _merge(self, row: Row, parts: list[tuple[int, Row]]) -> Row | RowFault:
        merged: dict[str, str | None] = {}
        metadata: dict[str, Any] = {}
        said_by: dict[str, int] = {}

        def conflict(what: str, number: int) -> RowFault:
            others = f"{self.sources[said_by[what]].label} and {self.sources[number].label}"
            member = what if what in ("image", "text", "audio") else None
            return RowFault.of(row, member, "conflict", f"{others} both have {what!r} for the key {row.key!r}")

        for number, part in parts:
            references = {n: v and json.dumps([number, v]) for n, v in (("image", part.image), ("audio", part.audio))}
            for name, value in {**references, "text": part.text}.items():
                if value is None or (name in merged and merged[name] == value):
                    continue
                if name in merged:
                    return conflict(name, number)
                merged[name], said_by[name] = value, number
            for name, value in part.metadata.items():
                if name in metadata and metadata[name] != value:
                    return conflict(name, number)
                if name not in metadata:
                    metadata[name], said_by[name] = value, number
        if not merged:
            return RowFault.of(row, None, "empty", "no image, no text and no audio, joined or not")
        return replace(
            row, image=merged.get("image"), text=merged.get("text"), audio=merged.get("audio"), metadata=metadata
        )


def _of(fault: RowFault, source: Source) -> RowFault:
    detail = f"{source.label}: {fault.detail}"
    return RowFault(fault.number, fault.line, fault.key, fault.member, fault.reason, detail)

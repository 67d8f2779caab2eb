"""Everything wrong with a dataset that a run, or somebody else's reader, would stumble over later.

What dataset.json, the indexes and the tars say must be the same thing, every sample must be whole, every member must
decode. Nothing is written and nothing is mended. Whatever is wrong with the data is a `Finding`, so that one look tells
all of it; `BadInput` is for folders that are no dataset. The idea is Energon's (`energon lint`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from data_pipelines.dataset import ShardEntry, fingerprint
from data_pipelines.engines import local
from data_pipelines.errors import BadInput
from data_pipelines.index import FORMAT_VERSION, MODALITIES
from data_pipelines.lint_shard import KINDS, Finding, Notes, ShardLinter, ShardResult, hash_keys, keys_in
from data_pipelines.progress import Progress

_DATASET_FILE = "dataset.json"


@dataclass(frozen=True)
class LintReport:
    """What `lint` found. `counts` (kind -> number) counts everything; `findings` has at most 1,000 a kind and shard."""

    path: str
    num_shards: int
    num_samples: int
    bytes: int
    fast: bool
    counts: dict[str, int]
    findings: list[Finding]

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.counts

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold: the fields, and `clean`."""
        return {**vars(self), "clean": self.clean, "findings": [vars(finding) for finding in self.findings]}


def lint(
    folder: str | Path,
    *,
    fast: bool = False,
    require: Sequence[str] = (),
    workers: int | None = None,
    progress: bool = True,
) -> LintReport:
    """Look through every shard of a dataset folder.

    Args:
        folder: holds dataset.json.
        fast: leave pictures and sounds undecoded. Every tar is still read once, for its hash.
        require: modalities that every sample must have; without, a sample needs any one of the three.
        workers: processes, a shard each at a time; by default one a core.
        progress: tell on standard error how far the work is.

    Raises:
        BadInput: no dataset.json, or not one of ours; a modality that does not exist; a worker died.

    Keys are compared between shards by 64-bit hashes first, so that takes 8 bytes of memory a sample.
    """
    folder = Path(folder)
    unknown = [name for name in require if name not in MODALITIES]
    if unknown:
        raise BadInput(f"--require {unknown[0]}: give one of {', '.join(MODALITIES)}")
    if workers is not None and workers < 1:
        raise BadInput(f"workers {workers}: give 1 or more")
    notes, entries = _read_dataset_file(folder)
    linter = ShardLinter(folder, fast, tuple(require))
    results: dict[str, ShardResult] = {}
    with Progress(f"linting {folder}", "samples", quiet=not progress) as shown:
        shown.start(sum(entry.num_samples for entry in entries))
        try:
            for entry, result in local.run(linter, entries, workers or local.num_cores(), shown.advance):
                results[entry.path] = result
        except local.WorkerDied as error:
            raise BadInput(f"{folder}: {error}; --fast decodes nothing") from error
    in_order = {entry.path: results[entry.path] for entry in entries}
    found = [notes, *(result.notes for result in in_order.values())]
    found += _keys_of_several_shards(folder, {path: result.key_hashes for path, result in in_order.items()})
    found += _unlisted(folder, set(in_order))
    counts = sum((notes.counts for notes in found), Counter[str]())
    return LintReport(
        path=str(folder),
        num_shards=len(entries),
        num_samples=sum(result.num_samples for result in in_order.values()),
        bytes=sum(result.num_bytes for result in in_order.values()),
        fast=fast,
        counts={kind: counts[kind] for kind in KINDS if counts[kind]},
        findings=_sorted([finding for notes in found for finding in notes.kept], [_DATASET_FILE, *in_order]),
    )


def _sorted(findings: list[Finding], shards: Sequence[str]) -> list[Finding]:
    shard_place = {name: number for number, name in enumerate(shards)}
    kind_place = {kind: number for number, kind in enumerate(KINDS)}
    return sorted(findings, key=lambda it: (shard_place.get(it.shard, len(shards)), it.shard, kind_place[it.kind]))


def _read_dataset_file(folder: Path) -> tuple[Notes, list[ShardEntry]]:
    """What is wrong with dataset.json itself, and those of its shards that can be looked at."""
    file = folder / _DATASET_FILE
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        what = "no dataset.json in it" if folder.is_dir() else "no such dataset folder"
        raise BadInput(f"{folder}: {what}; make one of tars with `triptych data index`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file}: cannot be read ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise BadInput(f"{file}: not one of ours, there is no list of shards in it")
    if content.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"{file}: format_version is {content.get('format_version')!r}, not {FORMAT_VERSION}")
    notes = Notes(_DATASET_FILE)
    entries: dict[str, ShardEntry] = {}
    for number, value in enumerate(content["shards"]):
        try:
            entry = ShardEntry.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            notes.add("dataset", f"shards.{'.'.join(map(str, [number, *first['loc']]))}: {first['msg']}")
            continue
        if not (_is_within(entry.path) and _is_within(entry.index)):
            notes.add("dataset", f"shards.{number}: {entry.path!r} or {entry.index!r} is no path within the folder")
        elif entry.path in entries:
            notes.add("dataset", f"shards.{number}: {entry.path!r} is listed twice")
        else:
            entries[entry.path] = entry
    if len(entries) == len(content["shards"]):
        _check_sums(notes, content, list(entries.values()))
    return notes, list(entries.values())


def _is_within(path: str) -> bool:
    return not (path.startswith("/") or ".." in PurePosixPath(path).parts or "\0" in path)


def _check_sums(notes: Notes, content: dict[str, Any], entries: Sequence[ShardEntry]) -> None:
    totals = {name: sum(entry.modalities.get(name, 0) for entry in entries) for name in MODALITIES}
    made = {
        "num_samples": sum(entry.num_samples for entry in entries),
        "modalities": {name: count for name, count in totals.items() if count},
        "fingerprint": fingerprint(entries),
    }
    if not made["num_samples"]:
        notes.add("dataset", "there is no sample in it")
    for name, value in made.items():
        if content.get(name) != value:
            notes.add("dataset", f"{name} is {content.get(name)!r}, but the shards make {value!r}")


def _keys_of_several_shards(folder: Path, hashes: Mapping[str, npt.NDArray[np.uint64]]) -> Iterator[Notes]:
    everything = np.sort(np.concatenate([np.empty(0, np.uint64), *hashes.values()]))
    repeated = np.unique(everything[1:][everything[1:] == everything[:-1]])
    first_shard: dict[str, str] = {}
    for path, of_shard in hashes.items():
        if not np.isin(of_shard, repeated).any():
            continue
        notes = Notes(path)
        keys = keys_in(folder / path)
        for key in np.array(keys, dtype=object)[np.isin(hash_keys(keys), repeated)].tolist():
            first = first_shard.setdefault(key, path)
            if first != path:
                notes.add("duplicate-key", f"{first} has it too", key)
        yield notes


def _unlisted(folder: Path, listed: set[str]) -> Iterator[Notes]:
    for path in sorted(folder.rglob("*.tar")):
        name = path.relative_to(folder)
        if name.as_posix() not in listed and not any(part.startswith(".") for part in name.parts):
            notes = Notes(name.as_posix())
            notes.add("unlisted", "dataset.json does not name this tar")
            yield notes

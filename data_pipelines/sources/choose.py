"""What a name, a path or a prefix stands for: which kind of source it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.errors import BadInput
from data_pipelines.shard import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from data_pipelines.sources.source import Source

SUFFIXES = (".csv", ".jsonl", ".parquet")
EMBEDDED = ("digits",)
PREFIXES = ("files", "hf", "tars")
_MEMBER_SUFFIXES = frozenset(f".{extension}" for extension in (*IMAGE_EXTENSIONS, *AUDIO_EXTENSIONS, "txt"))
_KNOWN = (
    f"a manifest ({', '.join(SUFFIXES)}), a folder of files, tars, `hf:` and a Hugging Face dataset, "
    f"or the embedded source `{EMBEDDED[0]}`"
)
# Enough names to tell folders of files from folders of tars, however large they are.
_MAX_NAMES_LOOKED_AT = 100_000


def open_source(
    source: str,
    *,
    split: str | None = None,
    columns: dict[str, str] | None = None,
    allowed: tuple[Path, ...] = (),
    seed: int = 0,
    streaming: bool = False,
    prefix_keys: bool = False,
    is_partial: bool = False,
    commits: Mapping[tuple[str, str | None], str] | None = None,
    out: Path | None = None,
) -> Source:
    """The source that a name, a path or a prefix (`files:`, `hf:`, `tars:`) stands for.

    `is_partial` is for a source that is joined to another: its rows may hold metadata alone. `commits` are those of
    names and revisions on the Hub that a build, which now goes on, was begun with. `out` is what is going to be
    written, which must not become part of the source. Raises `BadInput` when it stands for none, and for an option
    that this kind of source does not have.
    """
    kind, target = _kind_of(source)
    if out is not None and kind in ("files", "hf", "tars") and Path(target).is_dir():
        if out.resolve().is_relative_to(Path(target).resolve()):
            raise BadInput(
                f"{out}: lies within the source {target}, and would be read as part of it; give another --out"
            )
    if columns and kind in ("digits", "files", "tars"):
        raise BadInput(f"{source}: {_named(kind)} has no columns to map: leave out --column")
    if split is not None and kind in ("files", "tars"):
        raise BadInput(f"{source}: {_named(kind)} has no splits: leave out --split")
    if streaming and kind != "hf":
        raise BadInput(f"{source}: --streaming is for Hugging Face datasets")
    if prefix_keys and kind != "tars":
        raise BadInput(f"{source}: --prefix-keys is for tars")
    if kind == "digits":
        from data_pipelines.sources.digits import DigitsSource

        return DigitsSource(split=split, seed=seed)
    if kind == "hf":
        from data_pipelines.sources.huggingface import open_huggingface

        return open_huggingface(
            target,
            split=split,
            columns=columns or {},
            allowed=allowed,
            streaming=streaming,
            is_partial=is_partial,
            commits=commits,
        )
    if kind == "tars":
        from data_pipelines.sources.tars import open_tars

        return open_tars(target, prefix_keys=prefix_keys)
    if kind == "files":
        from data_pipelines.sources.folder import FolderSource

        if not Path(target).is_dir():
            raise BadInput(f"{target}: not a folder")
        return FolderSource(Path(target).resolve(), allowed=allowed, is_partial=is_partial)

    from data_pipelines.sources.manifest import ManifestSource

    return ManifestSource(
        Path(target).resolve(), split=split, columns=dict(columns or {}), allowed=allowed, is_partial=is_partial
    )


def open_joined(
    source: Source,
    others: Sequence[str],
    *,
    columns: dict[str, str] | None = None,
    allowed: tuple[Path, ...] = (),
    commits: Mapping[tuple[str, str | None], str] | None = None,
    out: Path | None = None,
) -> Source:
    """`source` with what further ones have for the same keys; itself when there are none. Raises `BadInput`."""
    if not others:
        if columns:
            raise BadInput("--join-column: there is no --join")
        return source
    from data_pipelines.sources.join import JoinedSource

    opened = [
        open_source(other, columns=columns, allowed=allowed, is_partial=True, commits=commits, out=out)
        for other in others
    ]
    return JoinedSource((source, *opened))


def _named(kind: str) -> str:
    return {"digits": "the embedded source", "files": "a folder of files", "tars": "a set of tars"}[kind]


def _kind_of(source: str) -> tuple[str, str]:
    """(kind, what is left of the name): `digits`, `files`, `hf`, `tars` or `manifest`."""
    prefix, colon, rest = source.partition(":")
    if colon and prefix in PREFIXES and not Path(source).exists():
        if not rest:
            raise BadInput(f"{source}: nothing follows the {prefix}:")
        return prefix, rest
    if source in EMBEDDED:
        return source, source
    path = Path(source)
    if path.is_dir():
        return _folder_kind(path), source
    # Before a look for the file: the braces of a list are no file's name.
    if path.suffix.lower() == ".tar":
        return "tars", source
    if not path.exists():
        raise BadInput(f"{source}: no such file; give {_KNOWN}")
    if not path.is_file():
        raise BadInput(f"{source}: not a regular file; give {_KNOWN}")
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{source}: unknown kind of manifest {path.suffix!r}; give {_KNOWN}")
    return "manifest", source


def _folder_kind(folder: Path) -> str:
    if (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    ):
        return "hf"
    if (folder / "dataset.json").is_file():
        return "tars"
    manifests = sorted(path.name for path in folder.glob("manifest.*") if path.suffix.lower() in SUFFIXES)
    if manifests:
        raise BadInput(
            f"{folder}: this is a folder with a manifest; give {folder / manifests[0]}, "
            f"or files:{folder} for the files that share a stem"
        )
    found: set[str] = set()
    for number, path in enumerate(folder.rglob("*")):
        suffix = path.suffix.lower()
        found |= {"tars"} if suffix == ".tar" else {"files"} if suffix in _MEMBER_SUFFIXES else set()
        if len(found) == 2 or number > _MAX_NAMES_LOOKED_AT:
            break
    if len(found) == 2:
        raise BadInput(f"{folder}: holds both tars and loose files; give tars:{folder} or files:{folder}")
    if not found:
        raise BadInput(f"{folder}: no image, text, sound or tar in this folder; give {_KNOWN}")
    return found.pop()

"""What a resume asks of a checkpoint besides its tensors: the trainer's state, and whether the run may go on from it.

The rule for `trainer.json`, from version to version: what it holds beyond what this version knows is left alone; what
it lacks is what a run had before there was such a thing, the field's default below. A field that changes its meaning
gets another name. `step`, `data` and `config` are always there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput
from pretrain import changes
from pretrain.config import Config

_READERS = ("torch", "deepspeed")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class TrainerState:
    """`trainer.json` of a checkpoint, as far as this version knows it."""

    step: int
    data: dict[str, Any]
    """State of the sample sequence."""
    config: dict[str, Any]
    watch: dict[str, Any] = field(default_factory=dict)
    """State of the loss watch; empty before there was one."""
    tokenizer: dict[str, str | None] = field(default_factory=dict)
    """`tokenizers_of` the run; empty before it was kept."""
    batch: int | None = None
    """Number of the next global batch; None before batches could be passed over."""
    passed_over: list[int] = field(default_factory=list)
    """Numbers of the batches that are passed over."""

    @property
    def cursor(self) -> dict[str, Any]:
        """State of the batch cursor."""
        return {"batch": self.step if self.batch is None else self.batch, "passed_over": self.passed_over}

    @classmethod
    def read(cls, checkpoint: Path) -> TrainerState:
        """The state in `checkpoints/step-N`.

        Raises:
            BadInput: it is no such state, or a field of it is missing.
        """
        try:
            found = json.loads((checkpoint / "trainer.json").read_text())
            given = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(f"{checkpoint.name}: trainer.json cannot be read ({error})") from error
        for name in ("step", "data", "config"):
            if name not in given:
                raise BadInput(f"{checkpoint.name}: trainer.json has no {name}")
        return cls(**given)


def check(checkpoint: Path, config: Config, allowed: Sequence[str]) -> list[changes.Difference]:
    """The settings that differ between a checkpoint and this run, once they all may.

    Raises:
        BadInput: some may not, or the tokenizer is another one; in at most five lines.
    """
    state = TrainerState.read(checkpoint)
    found = changes.differences(state.config, config)
    folder = config.data.text.tokenizer
    before = state.tokenizer.get("folder")
    if folder is not None and before is not None and before != (now := tokenizer_hash(Path(folder))):
        raise BadInput(
            f"{checkpoint.name} was trained with another tokenizer: {folder} (data.text.tokenizer) had the hash "
            f"{before[:12]} and has {now[:12] if now else 'no tokenizer.json'} now; put its files back, or use another "
            "run.dir"
        )
    if folder is not None and before is not None:
        # The same tokenizer in another place.
        found = [replace(each, kind="free") if each.field == "data.text.tokenizer" else each for each in found]
    refused = changes.refusal(found, allowed, checkpoint.name)
    if refused is not None:
        raise BadInput(refused)
    return found


def check_tokenizer(checkpoint: Path, state: TrainerState, now: dict[str, str | None]) -> None:
    """Refuse a run whose own tokenizer was made anew and came out otherwise.

    Raises:
        BadInput: naming the folder.
    """
    before = state.tokenizer.get("run")
    if before is not None and before != now["run"]:
        raise BadInput(
            f"{checkpoint.name} was trained with another tokenizer than RUN/tokenizer holds now (hash {before[:12]}, "
            f"now {(now['run'] or 'none')[:12]}): put that folder back, or use another run.dir"
        )


def tokenizers_of(config: Config) -> dict[str, str | None]:
    """Hashes of the tokenizer that the config names (None where it names none) and of the run's own copy."""
    folder = config.data.text.tokenizer
    return {
        "folder": tokenizer_hash(Path(folder)) if folder is not None else None,
        "run": tokenizer_hash(Path(config.run.dir) / "tokenizer"),
    }


def tokenizer_hash(folder: Path) -> str | None:
    """SHA-256 over the files that a tokenizer is loaded from; None where there is no tokenizer.json."""
    if not (folder / _TOKENIZER_FILES[0]).is_file():
        return None
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(f"{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def candidate(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that a resume will most likely start from, found without reading its tensors.

    It is the newest one whose manifest parses and whose trainer.json is the listed one; which one it will be in the
    end, only reading every byte says.
    """
    if resume == "never":
        return None
    folders = sorted((run_dir / "checkpoints").glob("step-*"), reverse=True) if resume == "auto" else [Path(resume)]
    for folder in folders:
        try:
            listed = json.loads((folder / "MANIFEST.json").read_text())["files"]["trainer.json"]["sha256"]
            if hashlib.sha256((folder / "trainer.json").read_bytes()).hexdigest() == listed:
                return folder
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def reader_versions() -> dict[str, str]:
    """Versions of what writes and reads the tensors of a checkpoint."""
    return {name: version(name) for name in _READERS}


def unreadable(checkpoint: Path, error: BaseException) -> str:
    """One line for a checkpoint that is whole but cannot be loaded: who wrote it, who tried, and what was wrong."""
    try:
        wrote = json.loads((checkpoint / "trainer.json").read_text()).get("versions", {})
    except (OSError, ValueError, AttributeError):
        wrote = {}
    names = [
        f"{name} {now} (written by {wrote.get(name, 'an unknown one')})" for name, now in reader_versions().items()
    ]
    what = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{checkpoint.name} cannot be loaded by {' and '.join(names)}: {type(error).__name__}: {what}"

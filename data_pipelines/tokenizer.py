"""One tokenizer for captions, transcripts and prompts.

A byte-level BPE that is trained on the run's own texts, or a Hugging Face folder. Byte-level means that no text is
unknown. The special tokens of the trained one have fixed ids, and their names are what Gemma4's processor asks a
tokenizer for, so that they are there after a reload as `tokenizer.image_token_id` and so on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.dataset import Dataset, open_dataset
from data_pipelines.decode import DecodeError, decode_text
from data_pipelines.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NAMED_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
EXTRA_TOKENS = {
    "image_token": "<image>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "audio_token": "<audio>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
    "video_token": "<video>",
}
# In this order they have the ids 0 to 10.
SPECIAL_TOKENS = (*NAMED_TOKENS.values(), *EXTRA_TOKENS.values())
_SMALLEST_VOCAB = len(SPECIAL_TOKENS) + 256
_MOST_TEXTS = 1_000_000
_ORIGIN_FILE = "triptych_origin.json"
_READ_TEXTS = 1024
# Training takes time in the square of a word's length: a megabyte without a space would hold a run up for an hour.
_MOST_CHARACTERS = 10_000


class _RunConfig(Protocol):
    @property
    def dir(self) -> str: ...


class TokenizerConfig(Protocol):
    """The part of a run's config that the tokenizer depends on."""

    @property
    def run(self) -> _RunConfig: ...

    @property
    def data(self) -> DataConfig: ...


def make_tokenizer(config: TokenizerConfig, datasets: Sequence[Dataset] | None = None) -> PreTrainedTokenizerFast:
    """The run's tokenizer: from `<run.dir>/tokenizer/` if it was made of the same data and settings, else made there.

    `datasets` are the training datasets where they are open already. Any number of ranks may call this at once: each
    makes the same one, and the folder appears whole. Raises `BadInput` for a folder that is no tokenizer and for a
    vocabulary too small for the bytes.
    """
    remote = config.data.remote
    opened = (
        list(datasets) if datasets is not None else [open_dataset(s.path, remote) for s in config.data.train_sources]
    )
    origin = _origin(config.data, opened)
    folder = Path(config.run.dir) / "tokenizer"
    cached = _load_cached(folder, origin)
    if cached is not None:
        return cached
    made = load_folder(config.data.text.tokenizer) if config.data.text.tokenizer else _train(config.data, opened)
    _store(made, folder, origin)
    return made


def _origin(data: DataConfig, datasets: Sequence[Dataset]) -> dict[str, object]:
    if data.text.tokenizer is not None:
        file = Path(data.text.tokenizer) / "tokenizer.json"
        if not file.is_file():
            raise BadInput(f"data.text.tokenizer: {data.text.tokenizer} holds no tokenizer.json")
        return {"folder_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    if data.text.vocab_size < _SMALLEST_VOCAB:
        raise BadInput(
            f"data.text.vocab_size: {data.text.vocab_size} is too small; 256 bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens take {_SMALLEST_VOCAB}"
        )
    return {"vocab_size": data.text.vocab_size, "fingerprints": [dataset.fingerprint for dataset in datasets]}


def _load_cached(folder: Path, origin: dict[str, object]) -> PreTrainedTokenizerFast | None:
    try:
        if json.loads((folder / _ORIGIN_FILE).read_text()) != origin:
            return None
        return load_folder(folder)
    except (OSError, ValueError):
        # Absent, or just being replaced by another rank; making it again gives the same one.
        return None


def load_folder(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a local Hugging Face tokenizer folder and add the special tokens that it lacks.

    Raises `BadInput` when it cannot be loaded. Nothing is fetched and no code of the folder runs.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise BadInput(f"{folder}: not a tokenizer folder ({error})") from error
    lacking = [name for name in NAMED_TOKENS if getattr(loaded, name, None) is None]
    lacking += [name for name in EXTRA_TOKENS if getattr(loaded, name, None) is None]
    return _wrap(loaded.backend_tokenizer, loaded) if lacking else loaded


def _wrap(backend: Tokenizer, source: PreTrainedTokenizerFast | None = None) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    names = {**NAMED_TOKENS, **EXTRA_TOKENS}
    if source is not None:
        names = {name: getattr(source, name, None) or token for name, token in names.items()}
    backend.add_special_tokens([token for token in names.values() if backend.token_to_id(token) is None])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        **{name: names[name] for name in NAMED_TOKENS},
        extra_special_tokens={name: names[name] for name in EXTRA_TOKENS},
        clean_up_tokenization_spaces=False,
    )


def _train(data: DataConfig, datasets: Sequence[Dataset]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=data.text.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(datasets, data.text.max_bytes), trainer)
    return _wrap(backend)


def _texts(datasets: Sequence[Dataset], max_bytes: int) -> Iterator[str]:
    total = sum(len(dataset) for dataset in datasets)
    for dataset in datasets:
        # Beyond a million texts the merges hardly move, but reading all of a large dataset would take hours.
        stride = max(1, -(-total // _MOST_TEXTS))
        wanted = np.arange(0, len(dataset), stride, dtype=np.int64)
        for start in range(0, len(wanted), _READ_TEXTS):
            for _, raw in dataset.iter_read(wanted[start : start + _READ_TEXTS], ("text",), {"text": max_bytes}):
                try:
                    text = None if raw.text is None else decode_text(raw.text, max_bytes)
                except DecodeError:
                    # The loader quarantines it, with a line; here it has nothing to teach.
                    continue
                if text is not None:
                    yield text[:_MOST_CHARACTERS]


def _store(tokenizer: PreTrainedTokenizerFast, folder: Path, origin: dict[str, object]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".tmp-tokenizer.{os.uname().nodename}.{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        tokenizer.save_pretrained(str(fresh))
        (fresh / _ORIGIN_FILE).write_text(json.dumps(origin) + "\n")
        for _ in range(100):
            try:
                os.rename(fresh, folder)
                return
            except OSError:
                if _same_origin(folder, origin):
                    return
            # One of other data is in the way. It is moved aside first: no reader may see a mixture of the two.
            stale = fresh.with_name(fresh.name + ".stale")
            try:
                os.rename(folder, stale)
                shutil.rmtree(stale, ignore_errors=True)
            except OSError:
                continue
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _same_origin(folder: Path, origin: dict[str, object]) -> bool:
    try:
        return bool(json.loads((folder / _ORIGIN_FILE).read_text()) == origin)
    except (OSError, ValueError):
        return False


def plain_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The fast tokenizer alone, for encoding foreign text: what looks like a special token there is plain text."""
    return _plain(tokenizer.backend_tokenizer.to_str())


def _plain(serialized: str) -> Tokenizer:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(serialized)
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return backend


class TextEncoder:
    """Foreign text into token ids, without begin and end. Needs no transformers; may be pickled and used in threads."""

    def __init__(self, serialized: str) -> None:
        self._serialized = serialized
        self._backend = _plain(serialized)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
        """The encoder of a tokenizer."""
        return cls(tokenizer.backend_tokenizer.to_str())

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def __reduce__(self) -> tuple[type[TextEncoder], tuple[str]]:
        # The pickle of a tokenizer forgets that special tokens are plain text.
        return TextEncoder, (self._serialized,)

"""One tokenizer: fixed ids, the same from every rank, and foreign text stays text."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import DataConfig, TextConfig
from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample
from data_pipelines.tokenizer import NAMED_TOKENS, SPECIAL_TOKENS, TextEncoder, make_tokenizer
from pretrain.config import Config, RunConfig

MakeDataset = Callable[..., Path]
WORDS = "a picture of the number zero one two three four five six seven eight nine spoken slowly by a voice".split()


def text_sample(number: int) -> Sample:
    words = [WORDS[(number * (place + 3)) % len(WORDS)] for place in range(6)]
    return Sample(f"k{number}", text=" ".join(words))


def config_of(tmp_path: Path, dataset: Path, run: str = "run", **text: Any) -> Config:
    return Config(run=RunConfig(dir=str(tmp_path / run)), data=DataConfig(train=str(dataset), text=TextConfig(**text)))


@pytest.fixture
def config(tmp_path: Path, make_dataset: MakeDataset) -> Config:
    return config_of(tmp_path, make_dataset(sizes=(40,), sample=text_sample), vocab_size=300)


def test_special_ids_are_fixed_and_survive_a_reload(config: Config) -> None:
    from transformers import AutoTokenizer

    made = make_tokenizer(config)
    again = AutoTokenizer.from_pretrained(Path(config.run.dir) / "tokenizer")
    for tokenizer in (made, again, make_tokenizer(config)):
        assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(11))
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
        assert (tokenizer.image_token_id, tokenizer.boi_token_id, tokenizer.eoi_token_id) == (4, 5, 6)
        assert (tokenizer.audio_token_id, tokenizer.boa_token_id, tokenizer.eoa_token_id) == (7, 8, 9)
        assert tokenizer.video_token_id == 10
        assert len(tokenizer) == 300
        assert tokenizer("a picture of the number one").input_ids == made("a picture of the number one").input_ids


def test_training_learns_words_and_any_text_comes_back(config: Config) -> None:
    made = make_tokenizer(config)
    encoder = TextEncoder.of(made)
    assert len(encoder("a picture of the number")) < len("a picture of the number") * 0.6

    @settings(max_examples=100, deadline=None)
    @given(st.text())
    def any_text(text: str) -> None:
        ids = encoder(text)
        assert all(id_ >= len(SPECIAL_TOKENS) for id_ in ids)
        assert made.decode(ids) == text

    any_text()


def test_what_looks_like_a_special_token_is_text(config: Config) -> None:
    made = make_tokenizer(config)
    encoder = TextEncoder.of(made)
    for one in (encoder, pickle.loads(pickle.dumps(encoder))):
        ids = one("see <image><eos> now")
        assert min(ids) >= len(SPECIAL_TOKENS) and made.decode(ids) == "see <image><eos> now"
    assert 4 in made("see <image> now").input_ids


def _hash_of(config: Config, queue: Any = None) -> str:
    make_tokenizer(config)
    digest = hashlib.sha256((Path(config.run.dir) / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    if queue is not None:
        queue.put(digest)
    return digest


@pytest.mark.timeout(240)
def test_ranks_that_race_make_the_same_one(config: Config, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_hash_of, args=(config, queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    digests = {queue.get(timeout=200) for _ in ranks}
    for rank in ranks:
        rank.join(30)
    data = config.data.train
    assert isinstance(data, str)
    assert digests == {_hash_of(config_of(tmp_path, Path(data), "other", vocab_size=300))}
    assert [path.name for path in Path(config.run.dir).iterdir()] == ["tokenizer"]


def test_one_of_other_data_is_replaced(config: Config, make_dataset: MakeDataset, tmp_path: Path) -> None:
    first = _hash_of(config)
    kept = (Path(config.run.dir) / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    assert _hash_of(config) == first
    assert (Path(config.run.dir) / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == kept
    other = make_dataset("other", sizes=(5,), sample=lambda n: Sample(f"k{n}", text="xyzzy plugh " * 3))
    assert _hash_of(config_of(tmp_path, other, vocab_size=300)) != first
    assert [path.name for path in Path(config.run.dir).iterdir()] == ["tokenizer"]


def test_a_folder_gets_the_special_tokens_that_it_lacks(config: Config, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "hello": 2, "[UNK]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
    bare.save_pretrained(tmp_path / "bare")
    data = config.data.train
    assert isinstance(data, str)
    made = make_tokenizer(config_of(tmp_path, Path(data), "run2", tokenizer=str(tmp_path / "bare")))
    assert (made.bos_token, made.eos_token, made.bos_token_id) == ("<s>", "</s>", 0)
    ids = [made.pad_token_id, made.image_token_id, made.boi_token_id, made.eoa_token_id]
    assert len(set(ids)) == 4 and min(ids) >= 4
    again = make_tokenizer(config_of(tmp_path, Path(data), "run2", tokenizer=str(tmp_path / "bare")))
    assert again.image_token_id == made.image_token_id and again("hello").input_ids == [2]


def test_bad_settings_are_named(config: Config, tmp_path: Path) -> None:
    data = config.data.train
    assert isinstance(data, str)
    with pytest.raises(BadInput, match="vocab_size"):
        make_tokenizer(config_of(tmp_path, Path(data), vocab_size=100))
    with pytest.raises(BadInput, match="tokenizer.json"):
        make_tokenizer(config_of(tmp_path, Path(data), tokenizer=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(BadInput, match="not a tokenizer folder"):
        make_tokenizer(config_of(tmp_path, Path(data), tokenizer=str(tmp_path)))
    assert set(NAMED_TOKENS.values()) <= set(SPECIAL_TOKENS)

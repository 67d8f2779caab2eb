"""Elasticity: the same set in every global batch, whatever reads it, and any resume under anything else goes on so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipelines.balance import deal
from data_pipelines.config import SourceConfig, TextConfig
from data_pipelines.errors import BadInput
from data_pipelines.loader import build_loader
from data_pipelines.sequence import SampleSequence
from data_pipelines.shard import Sample
from pretrain.config import Config
from tests.data_pipelines.test_loader import config_of
from tests.data_pipelines.test_sequence import sequence

MakeDataset = Callable[..., Path]
WORLDS = (1, 2, 3, 4, 6, 8, 12, 24, 48)
WORKERS = (0, 1, 2, 4)
BATCH, SIZES, STEPS = 48, (60, 50, 17), 12
SAMPLES = sum(SIZES)


def shares(made: SampleSequence, step: int, world_size: int) -> list[list[int]]:
    """What each rank takes of a step, by costs that are a function of the sample."""
    index = made.batch(step).index
    cost = 1 + (index * 7919) % 101
    return [index[hand].tolist() for hand in deal(cost, world_size)]


@pytest.mark.parametrize("tail", ["wrap", "drop"])
def test_every_world_shares_the_same_sets(tail: str) -> None:
    made = sequence(list(SIZES), global_batch=BATCH, tail=tail)
    for step in range(STEPS):
        whole = sorted(made.batch(step).index.tolist())
        for world_size in WORLDS:
            hands = shares(made, step, world_size)
            assert {len(hand) for hand in hands} == {BATCH // world_size}
            assert sorted(itertools.chain(*hands)) == whole
    each = made.samples_an_epoch
    ids = np.concatenate([made.batch(step).index for step in range(STEPS)])
    for epoch in range(len(ids) // each):
        seen = ids[epoch * each : (epoch + 1) * each]
        assert len(set(seen.tolist())) == each == (SAMPLES if tail == "wrap" else SAMPLES // BATCH * BATCH)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(1, 4)), min_size=1, max_size=8), st.integers(0, 99))
def test_any_chain_of_worlds_reads_what_one_rank_reads(legs: list[tuple[int, int]], seed: int) -> None:
    """A run that is stopped after any step and resumed on any other world, again and again."""
    through = sequence(list(SIZES), [40], weights=[2, 1], global_batch=BATCH, seed=seed)
    state, step = through.state(0), 0
    for world_size, length in legs:
        made = sequence(list(SIZES), [40], weights=[2, 1], global_batch=BATCH, seed=seed)
        made.resume(state)
        assert state["samples"] == step * BATCH
        for _ in range(length):
            taken = sorted(itertools.chain(*shares(made, step, world_size)))
            assert taken == sorted(through.batch(step).index.tolist())
            step += 1
        state = made.state(step)


def text_sample(number: int) -> Sample:
    return Sample(f"t{number:04d}", text="word " * (1 + number * 7 % 23))


def read(config: Config, world_size: int, start: int) -> list[list[list[int]]]:
    """[step][rank] -> the samples that the rank's loader gives, and its keys checked against them."""
    ranks: list[list[list[int]]] = []
    for rank in range(world_size):
        steps = []
        for batch in build_loader(config, rank, world_size, start_step=start):
            index = batch["index"].tolist()
            assert batch["keys"] == [f"t{number:04d}" for number in index]
            steps.append(index)
        ranks.append(steps)
    return [list(step) for step in zip(*ranks, strict=True)]


def check(config: Callable[..., Config], world_size: int, workers: int, kind: str, start: int, steps: int) -> None:
    made = config(steps=start + steps, num_workers=workers, worker_type=kind)
    found = read(made, world_size, start)
    assert len(found) == steps
    expected = sequence(list(SIZES), global_batch=BATCH, seed=5, shuffle_block=made.data.shuffle_block)
    for step, ranks in enumerate(found, start):
        assert {len(rank) for rank in ranks} == {BATCH // world_size}
        assert sorted(itertools.chain(*ranks)) == sorted(expected.batch(step).index.tolist()), (world_size, step)


@pytest.fixture
def texts(make_dataset: MakeDataset) -> Callable[..., Config]:
    """Config of a run over a dataset of texts: nothing to decode, so that many loaders are quick."""
    folder = make_dataset(sizes=SIZES, sample=text_sample)

    def config(**settings: Any) -> Config:
        return config_of(folder, global_batch=BATCH, **settings)

    return config


@pytest.mark.timeout(200)
def test_real_loaders_go_on_under_other_ranks_and_workers(texts: Callable[..., Config]) -> None:
    """One run, resumed again and again under other numbers of ranks and other workers."""
    legs = [(1, 2, "process"), (8, 0, "process"), (3, 2, "thread"), (2, 1, "process"), (48, 0, "thread")]
    start = 0
    for (world_size, workers, kind), steps in zip(legs, (2, 3, 2, 2, 1), strict=True):
        check(texts, world_size, workers, kind, start, steps)
        start += steps


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_whole_matrix(texts: Callable[..., Config], world_size: int) -> None:
    """Every world with every number of workers of both kinds, from the start and from a step in the second epoch."""
    for workers, kind in itertools.product(WORKERS, ("process", "thread")):
        check(texts, world_size, workers, kind, 0, 4)
        check(texts, world_size, workers, kind, 3, 3)


def test_a_changed_mixture_reaches_the_loader(make_dataset: MakeDataset) -> None:
    """Resumed with other weights: refused by name, or taken over at the end of the block, which is far away here."""
    folders = [make_dataset(name, sizes=(30,), sample=text_sample) for name in ("one", "two")]

    def loader(*weights: float, start: int = 0, state: Any = None, allow_change: bool = False) -> Any:
        sources = [SourceConfig(path=str(path), weight=weight) for path, weight in zip(folders, weights, strict=True)]
        return build_loader(config_of(sources, global_batch=BATCH, steps=4), 0, 1, start, state, allow_change)

    before = [batch["index"].tolist() for batch in loader(1, 1)]
    state = loader(1, 1).state(2)
    with pytest.raises(BadInput, match=r"mixture was \[2048, 2048\] and is \[1024, 3072\] now; .* --allow-change"):
        loader(1, 3, start=2, state=state)
    changed = loader(1, 3, start=2, state=state, allow_change=True)
    assert [batch["index"].tolist() for batch in changed] == before[2:]
    assert changed.state(3)["changes"] == [[4096, [2048, 2048]]]


def test_other_data_leave_the_tokens_of_a_run_alone(make_dataset: MakeDataset) -> None:
    """Weights know tokens by number: neither a source that is added nor a refused resume may train them anew."""
    folders = [
        make_dataset(name, sizes=(30,), sample=lambda n, word=word: Sample(f"t{n:04d}", text=word * (n % 5 + 1)))
        for name, word in (("one", "aardvark "), ("two", "zeppelin "))
    ]

    def loader(*paths: Path, run: str = "run", **options: Any) -> Any:
        sources = [SourceConfig(path=str(path)) for path in paths]
        config = config_of(sources, global_batch=BATCH, steps=4, text=TextConfig(vocab_size=280), run=run)
        return build_loader(config, 0, 1, **options)

    first = loader(folders[0])
    state, tokens = first.state(2), first.tokenizer("aardvark zeppelin").input_ids
    assert loader(*folders, run="fresh").tokenizer("aardvark zeppelin").input_ids != tokens
    file = folders[0].parent / "run" / "tokenizer" / "tokenizer.json"
    content = file.read_bytes()
    with pytest.raises(BadInput, match="fingerprint was"):
        loader(folders[1], start_step=2, state=state)
    assert file.read_bytes() == content
    for run in ("run", "another"):
        added = loader(*folders, run=run, start_step=2, state=state, allow_change=True)
        again = loader(*folders, run=run, start_step=3, state=added.state(3))
        assert [one.tokenizer("aardvark zeppelin").input_ids for one in (added, again)] == [tokens, tokens]
    assert file.read_bytes() == content


def test_epochs_and_temperature_reach_the_mixture(make_dataset: MakeDataset) -> None:
    folders = [
        make_dataset("one", sizes=(64,), sample=text_sample),
        make_dataset("two", sizes=(8,), sample=text_sample),
    ]
    by_epochs = [SourceConfig(path=str(path), epochs=epochs) for path, epochs in zip(folders, (1, 4), strict=True)]
    assert build_loader(config_of(by_epochs), 0, 1).state(0)["mixture"] == [2731, 1365]
    by_size = [SourceConfig(path=str(path)) for path in folders]
    assert build_loader(config_of(by_size, temperature=3.0), 0, 1).state(0)["mixture"] == [2731, 1365]
    with pytest.raises(ValidationError, match="given by epochs and temperature"):
        config_of(by_epochs, temperature=3.0)
    with pytest.raises(ValidationError, match="epochs of every source"):
        config_of([by_epochs[0], by_size[1]])

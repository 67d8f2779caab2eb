"""The loader: the same samples whatever the ranks, workers and restarts, and bad samples that never shift the order."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines import open_dataset
from data_pipelines.config import AudioConfig, AugmentConfig, DataConfig, ImageConfig, SourceConfig
from data_pipelines.errors import BadInput
from data_pipelines.loader import build_eval_loader, build_loader
from data_pipelines.order import Order
from data_pipelines.quarantine import BadSampleLimit
from data_pipelines.shard import Sample
from data_pipelines.tokenizer import make_tokenizer
from data_pipelines.workers import ordered_threads
from pretrain.config import Config, EvalConfig, RunConfig, TrainConfig
from tests.data_pipelines.tuples import encode_image, encode_sound, tuple_sample

MakeDataset = Callable[..., Path]
AUGMENT = AugmentConfig(
    image_shift=0.1,
    image_rotate=10,
    image_crop=0.8,
    image_noise=0.05,
    audio_speed=0.1,
    audio_gain_db=3,
    audio_noise=0.1,
    audio_shift_seconds=0.05,
)


def config_of(folder: Path | list[SourceConfig], *, steps: int = 6, run: str = "run", **data: Any) -> Config:
    where = folder if isinstance(folder, Path) else Path(folder[0].path)
    settings = {
        "global_batch": 12,
        "num_workers": 0,
        "image": ImageConfig(size=32, patch_size=4, pooling=2),
        "audio": AudioConfig(sampling_rate=8000, max_seconds=1.0),
    } | data
    return Config(
        run=RunConfig(dir=str(where.parent / run), seed=5),
        train=TrainConfig(max_steps=steps, warmup_steps=0),
        data=DataConfig(train=str(folder) if isinstance(folder, Path) else folder, **settings),
    )


def mixed_sample(number: int) -> Sample:
    return tuple_sample(number, missing=["", "audio", "", "image", "text"][number % 5])


def by_sample(batches: Iterable[dict[str, Any]]) -> list[dict[int, dict[str, Any]]]:
    """For each step: sample id -> what it is, without the padding that depends on its neighbours."""
    steps = []
    for batch in batches:
        rows = {}
        for row, index in enumerate(batch["index"].tolist()):
            rows[index] = {
                "key": batch["keys"][row],
                "seed": int(batch["seed"][row]),
                "image": batch["image"][row],
                "position": batch["image_position"][row],
                "audio": batch["audio"][row, : int(batch["audio_length"][row])],
                "text": batch["text"][row, : int(batch["text_length"][row])],
                "weight": float(batch["weight"][row]),
                "label": int(batch["label"][row]),
            }
        steps.append(rows)
    return steps


def assert_same(one: list[dict[int, dict[str, Any]]], other: list[dict[int, dict[str, Any]]]) -> None:
    assert [sorted(step) for step in one] == [sorted(step) for step in other]
    for mine, theirs in zip(one, other, strict=True):
        for index, sample in mine.items():
            for name, value in sample.items():
                same = (
                    torch.equal(value, theirs[index][name]) if torch.is_tensor(value) else value == theirs[index][name]
                )
                assert same, (index, name)


@pytest.fixture
def folder(make_dataset: MakeDataset) -> Path:
    return make_dataset(sizes=(20, 17), sample=mixed_sample)


def test_the_batch_contract(folder: Path) -> None:
    config = config_of(folder)
    batches = list(build_loader(config, 0, 1))
    assert len(batches) == len(build_loader(config, 0, 1)) == 6
    dataset, tokenizer = open_dataset(folder), make_tokenizer(config)
    for step, batch in enumerate(batches):
        kinds = {
            "index": (torch.int64, (12,)),
            "seed": (torch.int64, (12,)),
            "image": (torch.uint8, (12, 64, 48)),
            "image_position": (torch.int64, (12, 64, 2)),
            "audio": (torch.int16, (12, int(batch["audio_length"].max()))),
            "audio_length": (torch.int64, (12,)),
            "text": (torch.int64, (12, int(batch["text_length"].max()))),
            "text_length": (torch.int64, (12,)),
            "weight": (torch.float32, (12,)),
            "label": (torch.int64, (12,)),
        }
        assert {name: (batch[name].dtype, tuple(batch[name].shape)) for name in kinds} == kinds
        assert set(batch) == {*kinds, "keys", "step", "epoch"}
        assert (batch["step"], batch["epoch"]) == (step, step * 12 // 37)
        for row, index in enumerate(batch["index"].tolist()):
            sample = dataset[index]
            assert batch["keys"][row] == sample.key and batch["weight"][row] == 1
            assert batch["label"][row] == sample.metadata["label"]
            text = batch["text"][row, : batch["text_length"][row]]
            assert tokenizer.decode(text) == (sample.text or "")
            assert bool((batch["image_position"][row] == -1).all()) == (sample.image is None)
            assert not batch["audio"][row, batch["audio_length"][row] :].any()
            assert bool(batch["audio_length"][row] == 0) == (sample.audio is None)


def test_the_order_is_the_pure_one(folder: Path) -> None:
    found = [batch["index"].numpy() for batch in build_loader(config_of(folder), 0, 1)]
    expected = np.concatenate([Order([20, 17], 5, epoch).at(np.arange(37)) for epoch in range(2)])
    np.testing.assert_array_equal(np.concatenate(found), expected[:72])


@pytest.mark.timeout(120)
def test_ranks_workers_and_restarts_change_nothing(folder: Path) -> None:
    whole = by_sample(build_loader(config_of(folder, augment=AUGMENT), 0, 1))
    for workers, kind in ((1, "process"), (3, "process"), (2, "thread")):
        config = config_of(folder, augment=AUGMENT, num_workers=workers, worker_type=kind)
        assert_same(by_sample(build_loader(config, 0, 1)), whole)
        assert_same(by_sample(build_loader(config, 0, 1, start_step=4)), whole[4:])
    for world_size in (2, 3, 12):
        shares = [
            by_sample(build_loader(config_of(folder, augment=AUGMENT), rank, world_size)) for rank in range(world_size)
        ]
        assert all(len(step) == 12 // world_size for share in shares for step in share)
        joined = [{k: v for share in shares for k, v in share[step].items()} for step in range(6)]
        assert_same(joined, whole)


@pytest.mark.parametrize(("workers", "kind"), [(0, "process"), (1, "process"), (1, "thread")])
def test_loading_draws_no_number_of_the_runs_own_generators(folder: Path, workers: int, kind: str) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    batches = list(build_loader(config_of(folder, augment=AUGMENT, num_workers=workers, worker_type=kind), 0, 1))
    assert len(batches) == 6
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    np.testing.assert_equal(np.random.get_state(), before[2])


def test_augmentation_is_of_the_sample_and_the_epoch(folder: Path) -> None:
    plain = by_sample(build_loader(config_of(folder, steps=9), 0, 1))
    changed = by_sample(build_loader(config_of(folder, steps=9, augment=AUGMENT), 0, 1))
    index = next(i for i in changed[0] if i % 5 == 0)
    again = next(step[index] for step in changed[4:] if index in step)
    assert not torch.equal(changed[0][index]["image"], plain[0][index]["image"])
    assert not torch.equal(changed[0][index]["image"], again["image"])
    assert torch.equal(changed[0][index]["text"], again["text"])


def test_costs_are_even_over_ranks(make_dataset: MakeDataset) -> None:
    def sample(number: int) -> Sample:
        seconds = 0.05 if number % 4 else 0.9
        return Sample(
            f"k{number}", text="x", audio=encode_sound(np.full(int(8000 * seconds), 0.1)), audio_extension="flac"
        )

    config = config_of(make_dataset(sizes=(40,), sample=sample), global_batch=20)
    loads = [[int(b["audio_length"].sum()) for b in build_loader(config, rank, 4)] for rank in range(4)]
    spread = np.array(loads)
    assert (spread.max(0) - spread.min(0)).max() <= 7200
    assert (spread.max(0) / spread.mean(0)).mean() < 1.5


def test_mixtures_interleave_and_number_all_samples(make_dataset: MakeDataset) -> None:
    one = make_dataset("one", sizes=(8,))
    two = make_dataset("two", sizes=(30,), sample=lambda n: tuple_sample(n + 100))
    sources = [SourceConfig(path=str(one), weight=1.0), SourceConfig(path=str(two), weight=2.0)]
    batches = list(build_loader(config_of(sources, steps=10), 0, 1))
    index = torch.cat([batch["index"] for batch in batches])
    keys = [key for batch in batches for key in batch["keys"]]
    assert abs(float((index < 8).float().mean()) - 1 / 3) < 0.02
    assert all(
        key == tuple_sample(i if i < 8 else i - 8 + 100).key for i, key in zip(index.tolist(), keys, strict=True)
    )


def damaged(number: int) -> Sample:
    good = tuple_sample(number)
    bad = {
        3: Sample(good.key, image=b"GIF89a", text="x", image_extension="png"),
        7: Sample(
            good.key, image=good.image, audio=(good.audio or b"")[:60], image_extension="png", audio_extension="flac"
        ),
        11: Sample(good.key, text="  "),
        15: Sample(good.key, text="long " * 50),
    }
    return bad.get(number, good)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_become_placeholders_with_a_line(make_dataset: MakeDataset, workers: int) -> None:
    from data_pipelines.config import TextConfig

    folder = make_dataset(sizes=(30,), sample=damaged)
    config = config_of(folder, steps=5, num_workers=workers, text=TextConfig(max_bytes=100))
    good = by_sample(build_loader(config_of(make_dataset("good", sizes=(30,)), steps=5, run="other"), 0, 1))
    found = by_sample(build_loader(config, 0, 1))
    assert [sorted(step) for step in found] == [sorted(step) for step in good], "the order does not shift"
    for step in found:
        for index, sample in step.items():
            assert sample["weight"] == (0 if index in (3, 7, 11, 15) else 1)
            if not sample["weight"]:
                assert sample["key"] == tuple_sample(index).key and sample["label"] == -1
                assert not len(sample["audio"]) and not len(sample["text"]) and (sample["position"] == -1).all()
    lines = [json.loads(line) for line in (Path(config.run.dir) / "quarantine.jsonl").read_text().splitlines()]
    assert all(set(line) == {"shard", "key", "member", "reason", "detail"} for line in lines)
    reasons = {line["key"]: (line["member"], line["reason"]) for line in lines}
    assert len(lines) == 4, "one line a sample, though two epochs read them"
    assert reasons == {
        "sample-00003": ("sample-00003.png", "format"),
        "sample-00007": ("sample-00007.flac", "decode"),
        "sample-00011": (None, "empty"),
        "sample-00015": ("sample-00015.txt", "size"),
    }
    assert all(line["shard"] == str(folder / "shards" / "dataset-000000.tar") for line in lines)


def test_too_many_bad_samples_stop_the_run(make_dataset: MakeDataset) -> None:
    folder = make_dataset(sizes=(40,), sample=lambda n: tuple_sample(n) if n % 2 else Sample(f"k{n}", image=b"no"))
    config = config_of(folder, steps=1000)
    with pytest.raises(
        BadInput, match=r"samples are bad, more than data.max_bad_rate 0.01; for example k.*format"
    ) as caught:
        list(build_loader(config, 0, 1))
    assert "\n" not in str(caught.value) and str(Path(config.run.dir) / "quarantine.jsonl") in str(caught.value)
    with pytest.raises(BadInput, match="in a row, more than data.max_bad_run 3"):
        list(build_loader(config_of(folder, steps=1000, max_bad_rate=1.0, max_bad_run=3), 0, 1))
    assert len(list(build_loader(config_of(folder, steps=20, max_bad_rate=1.0), 0, 1))) == 20


def test_limits_count_in_order() -> None:
    limit = BadSampleLimit(0.5, 2, Path("q"))
    limit.see([True, True, False, True, True, False], None)
    with pytest.raises(BadInput, match="3 bad samples in a row"):
        limit.see([True, True, True], None)
    strict = BadSampleLimit(0.0, 100, Path("q"))
    strict.see([False] * 10, None)
    with pytest.raises(BadInput, match="1 of 11"):
        strict.see([True], None)


def test_bad_input_is_one_line_even_from_a_worker(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"data.global_batch: 12 .* 5 ranks"):
        build_loader(config_of(folder), 0, 5)
    with pytest.raises(BadInput, match="no such dataset folder"):
        build_loader(config_of(folder.parent / "absent"), 0, 1)
    make_tokenizer(config_of(folder))
    tar = next((folder / "shards").iterdir())
    tar.write_bytes(tar.read_bytes()[:-1024])
    with pytest.raises(BadInput, match="dataset.json says") as caught:
        list(build_loader(config_of(folder, num_workers=1), 0, 1))
    assert "\n" not in str(caught.value)


def test_state_goes_through_a_checkpoint(folder: Path) -> None:
    state = json.loads(json.dumps(build_loader(config_of(folder), 0, 2).state(4)))
    assert state["samples"] == 48 and state == build_loader(config_of(folder), 1, 2).state(4)
    build_loader(config_of(folder), 0, 3, 4, state)
    with pytest.raises(BadInput, match="global_batch was 12 and is 24"):
        build_loader(config_of(folder, global_batch=24), 0, 1, 2, state)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (2, 5), (3, 20)])
def test_evaluation_sees_each_sample_once_and_no_augmentation(folder: Path, world_size: int, batch_size: int) -> None:
    config = config_of(folder, augment=AUGMENT)
    tokenizer, dataset = make_tokenizer(config), open_dataset(folder)
    ranks = [
        list(build_eval_loader(config, dataset, tokenizer, rank, world_size, batch_size)) for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {-(-37 // (world_size * batch_size))}
    batches = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    assert {len(batch["keys"]) for batch in batches} == {batch_size}
    index, weight = (torch.cat([batch[name] for batch in batches]) for name in ("index", "weight"))
    assert index[weight > 0].tolist() == list(range(37))
    plain = by_sample(build_loader(config_of(folder), 0, 1))
    one = by_sample(ranks[0])[0]
    both = next(step for step in plain if set(step) & set(one))
    for number in set(both) & set(one):
        assert torch.equal(both[number]["image"], one[number]["image"])


def test_fewer_evaluation_samples_are_spread_over_the_data(folder: Path) -> None:
    config = config_of(folder).model_copy(update={"evaluation": EvalConfig(max_samples=10)})
    batches = list(build_eval_loader(config, open_dataset(folder), make_tokenizer(config), 0, 1, 10))
    assert len(batches) == 1 and batches[0]["index"].tolist() == [i * 37 // 10 for i in range(10)]


def test_images_of_any_shape(make_dataset: MakeDataset) -> None:
    def sample(number: int) -> Sample:
        if number == 4:
            return Sample("k4", text="no picture")
        pixels = np.full((40 + 30 * number, 200 - 30 * number, 3), 9 * number, dtype=np.uint8)
        return Sample(f"k{number}", image=encode_image(pixels), image_extension="png")

    config = config_of(make_dataset(sizes=(5,), sample=sample), global_batch=5, image=ImageConfig(), steps=1)
    batch = next(iter(build_loader(config, 0, 1)))
    patches = (batch["image_position"] >= 0).all(-1).sum(1)
    assert batch["image"].shape == (5, int(patches.max()), 768)
    assert (patches % 9 == 0).all() and int(patches.max()) <= 630
    assert patches[batch["keys"].index("k4")] == 0
    text_only = make_dataset("text", sizes=(5,), sample=lambda n: Sample(f"k{n}", text="a"))
    batch = next(iter(build_loader(config_of(text_only, global_batch=5, image=ImageConfig(), steps=1), 0, 1)))
    assert batch["image"].shape == (5, 9, 768) and batch["audio"].shape == (5, 1) and batch["text"].shape == (5, 1)


def test_threads_keep_the_order_and_stay_within_their_lead() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def work(item: int) -> int:
        with lock:
            begun.append(item)
        time.sleep(0.002 * (item % 3))
        if item == 17:
            raise BadInput("seventeen")
        return item

    stream = ordered_threads(work, range(100), 3, 5)
    assert [next(stream) for _ in range(10)] == list(range(10))
    assert max(begun) < 16
    with pytest.raises(BadInput, match="seventeen"):
        list(stream)
    stream = ordered_threads(work, range(3), 3, 5)
    assert list(stream) == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


PARENT = """
import json, os, sys, time
from pathlib import Path
from data_pipelines.loader import build_loader
from tests.data_pipelines.test_loader import config_of
stream = iter(build_loader(config_of(Path(sys.argv[1]), steps=100000, num_workers=2), 0, 1))
next(stream)
children = [int(c) for c in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
print(json.dumps(children), flush=True)
for _ in range(40):
    next(stream)
print("went on", flush=True)
time.sleep(60)
"""


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


LEAVER = """
import atexit, sys, time
began = 0.0
# Registered first, so it runs last.
atexit.register(lambda: print(time.monotonic() - began, flush=True))
from pathlib import Path
from data_pipelines.loader import build_loader
from tests.data_pipelines.test_loader import config_of
config = config_of(Path(sys.argv[1]), steps=100000, num_workers=2, worker_type=sys.argv[2])
stream = iter(build_loader(config, 0, 1))
next(stream)
began = time.monotonic()
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["process", "thread"])
def test_a_program_that_leaves_early_is_not_held_up(folder: Path, kind: str) -> None:
    left = subprocess.run(
        [sys.executable, "-c", LEAVER, str(folder), kind], capture_output=True, text=True, timeout=100, check=True
    )
    assert float(left.stdout) < 4
    assert left.stderr == ""


@pytest.mark.timeout(120)
def test_workers_ignore_the_schedulers_signals_and_die_with_their_parent(folder: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert parent.stdout is not None
        workers = json.loads(parent.stdout.readline())
        assert len(workers) >= 2 and all(alive(worker) for worker in workers)
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGUSR1)
        assert parent.stdout.readline() == "went on\n"
        parent.kill()
        parent.wait(10)
        deadline = time.monotonic() + 10
        while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(alive(worker) for worker in workers)
    finally:
        parent.kill()
        parent.wait(10)

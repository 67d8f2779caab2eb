"""Hostile bytes: one case a test, each with its reason; nothing runs, nothing shifts, nothing grows."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.build import build_dataset
from data_pipelines.collate import Collated, Collator
from data_pipelines.config import AudioConfig, DataConfig, ImageConfig, TextConfig
from data_pipelines.dataset import Dataset, index_folder, open_dataset
from data_pipelines.errors import BadInput
from data_pipelines.index import index_shard
from data_pipelines.loader import build_loader
from data_pipelines.shard import ShardReader, write_shard
from data_pipelines.tokenizer import TextEncoder
from pretrain.config import Config, RunConfig, TrainConfig
from tests.data_pipelines import hostile
from tests.data_pipelines.hostile import BLOCK, MEMBERS, TARS, Hostile, HostileTar
from tests.data_pipelines.tuples import encode_image, encode_sound, tuple_sample

BATCH = 8
KEYS = ("shard", "key", "member", "reason", "detail")


def config_of(folder: Path, samples: int, **data: Any) -> Config:
    """One epoch in batches of eight, at the default sizes of images but with lower limits; a token a byte."""
    values = {
        "global_batch": BATCH,
        "num_workers": 0,
        "max_bad_rate": 1.0,
        "image": ImageConfig(max_pixels=hostile.MAX_PIXELS),
        "audio": AudioConfig(max_seconds=2.0),
        "text": TextConfig(vocab_size=267, max_bytes=hostile.MAX_TEXT_BYTES),
    } | data
    return Config(
        run=RunConfig(dir=str(folder.parent / f"run-{folder.name}"), seed=3),
        train=TrainConfig(max_steps=-(-samples // BATCH), warmup_steps=0),
        data=DataConfig(train=str(folder), **values),
    )


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class Corpus:
    """The corpus as a dataset, read for one epoch, and the same with a good sample in each hostile one's place."""

    def __init__(self, folder: Path) -> None:
        for name, twin in (("corpus", False), ("twin", True)):
            (folder / name).mkdir()
            self.keys = hostile.corpus_tar(folder / name / "shard.tar", MEMBERS, twin)
        self.dataset, _ = index_folder(folder / "corpus")
        twin_dataset, _ = index_folder(folder / "twin")
        assert len(self.dataset) == len(twin_dataset) == len(self.keys)
        config, twin_config = config_of(folder / "corpus", len(self.keys)), config_of(folder / "twin", len(self.keys))
        started = time.process_time()
        self.batches = list(build_loader(config, 0, 1))
        self.cpu_seconds = time.process_time() - started
        self.twin_batches = list(build_loader(twin_config, 0, 1))
        self.lines = {line["key"]: line for line in lines_of(Path(config.run.dir) / "quarantine.jsonl")}

    def row(self, key: str) -> dict[str, Any]:
        """What the loader made of a sample."""
        batch = next(batch for batch in self.batches if key in batch["keys"])
        place = batch["keys"].index(key)
        return {name: value[place] for name, value in batch.items() if torch.is_tensor(value)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("case", MEMBERS, ids=lambda case: case.name)
def test_member(corpus: Corpus, case: Hostile) -> None:
    key = f"hostile-{MEMBERS.index(case):03d}"
    row, line = corpus.row(key), corpus.lines.get(key)
    if case.reason is None:
        assert line is None and row["weight"] == 1
        return
    assert row["weight"] == 0 and row["label"] == -1
    assert not row["audio_length"] and not row["text_length"] and bool((row["image_position"] == -1).all())
    assert line is not None and tuple(line) == KEYS
    assert (line["shard"], line["member"]) == (str(corpus.dataset.path / "shard.tar"), f"{key}.{case.extension}")
    assert line["reason"] == case.reason, line["detail"]
    assert "\n" not in line["detail"] and len(line["detail"]) < 300


def test_no_member_is_a_slow_way_to_nowhere(corpus: Corpus) -> None:
    assert corpus.cpu_seconds < 60, "all of them together; most take milliseconds"


def test_hostile_members_never_shift_the_order(corpus: Corpus) -> None:
    assert [batch["keys"] for batch in corpus.batches] == [batch["keys"] for batch in corpus.twin_batches]
    in_order = [key for batch in corpus.batches for key in batch["keys"]]
    assert sorted(in_order[: len(corpus.keys)]) == sorted(corpus.keys), "each once an epoch"
    for batch, twin in zip(corpus.batches, corpus.twin_batches, strict=True):
        good = torch.tensor([key.startswith("good") for key in batch["keys"]])
        assert bool((batch["weight"][good] == 1).all())
        for name in ("index", "seed", "audio_length", "text_length", "label"):
            assert torch.equal(batch[name][good], twin[name][good]), name
        for name in ("image", "image_position", "text"):
            width = min(batch[name].shape[1], twin[name].shape[1])
            assert torch.equal(batch[name][good, :width], twin[name][good, :width]), name
    assert set(corpus.lines) <= {key for key in corpus.keys if key.startswith("hostile")}


def test_odd_but_good_members_are_read_as_what_they_are(corpus: Corpus) -> None:
    def row(name: str) -> dict[str, Any]:
        return corpus.row(f"hostile-{[case.name for case in MEMBERS].index(name):03d}")

    upright = row("exif-rotated jpeg")["image_position"].amax(0)
    assert upright[1] > upright[0], "60 x 40 stands upright"
    for name in ("animated png", "animated webp"):
        picture = row(name)
        shown = picture["image"][(picture["image_position"] >= 0).all(-1)].reshape(-1, 3)
        assert (shown.float().mean(0) > 250).tolist() == [True, False, False], "the first frame is red"
    lengths = {
        "wav with a header of three hours": 4800,
        "8-bit wav": 4800,
        "24-bit wav": 4800,
        "wav of 8 channels": 4800,
        "wav at 192 kHz": 4800,
        "wav of one sample": 1,
    }
    assert {name: int(row(name)["audio_length"]) for name in lengths} == lengths
    for name in ("8-bit wav", "24-bit wav", "wav of 8 channels", "wav at 192 kHz", "flac called mp3"):
        spectrum = np.abs(np.fft.rfft(row(name)["audio"][:4800].double().numpy()))
        assert spectrum.argmax() * 16_000 / 4800 == pytest.approx(440, abs=4), name
    for name in ("json with NaN and infinities", "json with a number beyond 64 bits"):
        assert row(name)["label"] == -1
    assert not row("empty text beside a picture")["text_length"]


@pytest.mark.parametrize("case", [*TARS, hostile.pickle_tar(Path("/nonexistent"))], ids=lambda case: case.name)
def test_tar(tmp_path: Path, case: HostileTar) -> None:
    (tmp_path / "s.tar").write_bytes(case.make())
    started = time.process_time()
    dataset, quarantined = index_folder(tmp_path)
    assert time.process_time() - started < 5
    assert tuple(dataset.keys(range(len(dataset)))) == case.kept
    assert tuple((line.key, line.member, line.reason) for line in quarantined) == case.lines
    lines = lines_of(tmp_path / "quarantine.jsonl")
    assert lines == [vars(line) for line in quarantined]
    assert all(tuple(line) == KEYS and line["shard"] == "s.tar" and "\n" not in line["detail"] for line in lines)
    for number, key in enumerate(case.kept):
        if key in ("a", "b", "y", "z"):
            assert dataset[number].text == {"a": "the first", "b": "the second", "y": "the last but one"}.get(
                key, "the last"
            )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(hostile.GOOD_BEFORE + hostile.END), "gzip file, not a plain tar; unpack it first"),
        (b"", "shorter than one header"),
        (b"hello world " * 100, "no tar header in it"),
        (b"PK\x03\x04" + bytes(600), "zip file, not a plain tar"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd file, not a plain tar"),
        (bytes(10 * BLOCK), "no whole sample"),
    ],
    ids=["gzip", "empty", "text", "zip", "zstd", "zeros"],
)
def test_what_is_no_tar_ends_the_indexing_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        index_folder(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "dataset.json").exists()


@pytest.mark.timeout(60)
def test_pipes_and_devices_called_tar_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.tar")
    for path in (tmp_path / "s.tar", Path("/dev/zero")):
        for reader in (index_shard, ShardReader):
            with pytest.raises(BadInput, match="not a regular file"):
                reader(path)


def test_nothing_is_executed(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "s.tar").write_bytes(hostile.pickle_tar(witness).make())
    dataset, _ = index_folder(folder)
    assert len(list(dataset.read(range(len(dataset))))) == len([dataset[n] for n in range(len(dataset))])
    assert all(batch["weight"].all() for batch in build_loader(config_of(folder, len(dataset)), 0, 1))
    assert not witness.exists()
    np.load(hostile.io.BytesIO(hostile.pickled_members(witness)["npy"]), allow_pickle=True)
    assert witness.exists(), "the bytes are as dangerous as they claim"


def test_members_beyond_the_limits_are_not_read(tmp_path: Path) -> None:
    """The tar has holes, so that it takes no room: an image and a sound above their limits, and 1.5 GB of another."""
    sizes = {"m.txt": 5 << 20, "n.wav": 200 << 20, "o.jpg": 100 << 20, "p.jpg": 1536 << 20, "q.mp4": 1 << 29}
    with open(tmp_path / "s.tar", "wb") as file:
        file.write(hostile.GOOD_BEFORE)
        for name, size in sizes.items():
            file.write(hostile.entry(f"{name[0]}.json", b"{}"))
            file.write(hostile.entry(name, b"", size=b"%011o\0" % size))
            file.seek(size, os.SEEK_CUR)
        file.write(hostile.entry("q.txt", b"beside a film") + hostile.GOOD_AFTER + hostile.END)
    before = _peak_bytes()
    index = index_shard(tmp_path / "s.tar")
    assert index.keys() == ["a", "b", "m", "n", "o", "q", "y", "z"]
    assert [(line.key, line.member, line.reason) for line in index.quarantined] == [("p", "p.jpg", "size")]
    assert _peak_bytes() - before < 64 << 20


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def test_a_run_of_mostly_garbage_stops_with_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "garbage"
    folder.mkdir()
    bad = [case for case in MEMBERS if case.reason is not None]
    keys = hostile.corpus_tar(folder / "s.tar", bad)
    index_folder(folder)
    limits = {"max_bad_rate": 0.02, "max_bad_run": 100}
    with pytest.raises(
        BadInput, match=r"of \d+ samples are bad, more than data.max_bad_rate 0.02; for example"
    ) as rate:
        list(build_loader(config_of(folder, 100 * len(keys), **limits), 0, 1))
    with pytest.raises(BadInput, match=r"bad samples in a row, more than data.max_bad_run 2; for example") as run:
        list(build_loader(config_of(folder, 100 * len(keys), max_bad_run=2), 0, 1))
    assert "\n" not in str(rate.value) + str(run.value)


# Manifests: tests/data_pipelines/test_sources_manifest.py has the others.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('id,text\na,"two" words\n', "line 2: not CSV"),
        ('id,text\na,"never closed\nb,x\n', "line 2: not CSV"),
        ("id,text\na\0b,x\n", "line 2: not CSV|the id"),
        ('id,text\na,"' + "x" * (1 << 24) + 'y"\n', "line 2: not CSV"),
    ],
    ids=["text behind a quote", "open quote", "NUL", "cell of 16 MB"],
)
def test_csv_with_wrong_quoting(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        build_dataset(tmp_path / "m.csv", tmp_path / "out", on_error="fail", progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_without_line_ends_is_not_read_whole(tmp_path: Path, name: str) -> None:
    with open(tmp_path / name, "wb") as file:
        file.write(b"id,text")
        file.truncate(4 << 30)
    before = _peak_bytes()
    with pytest.raises(BadInput, match="line 1 is longer than"):
        build_dataset(tmp_path / name, tmp_path / "out", progress=False)
    assert _peak_bytes() - before < 512 << 20


def test_bad_rows_are_skipped_each_with_its_line(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    raw = tmp_path / "raw"
    for folder in (outside, raw):
        folder.mkdir()
    (outside / "secret.png").write_bytes(encode_image(hostile.pixels(8, 8)))
    (raw / "link.png").symlink_to(outside / "secret.png")
    (raw / "folder").symlink_to(outside)
    (raw / "loop.png").symlink_to("loop.png")
    (raw / "zero.wav").symlink_to("/dev/zero")
    (raw / "kept.png").write_bytes(encode_image(hostile.pixels(8, 8)))
    with open(raw / "large.png", "wb") as file:
        file.truncate(3 << 30)
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    rows: list[tuple[dict[str, Any], str | None, str]] = [
        ({"id": "out", "image": "link.png"}, "image", "path"),
        ({"id": "out-by-folder", "image": "folder/secret.png"}, "image", "path"),
        ({"id": "up", "image": "../outside/secret.png"}, "image", "path"),
        ({"id": "absolute", "image": str(outside / "secret.png")}, "image", "path"),
        ({"id": "loop", "image": "loop.png"}, "image", "unreadable"),
        ({"id": "device", "audio": "zero.wav"}, "audio", "path"),
        ({"id": "absent", "image": "absent.png"}, "image", "missing"),
        ({"id": "large", "image": "large.png"}, "image", "size"),
        ({"id": "long", "image": "x" * 5000 + ".png"}, "image", "unreadable"),
        ({"id": "surrogate", "image": "\ud800.png"}, "image", "path"),
        ({"id": "url", "image": "http://169.254.169.254/latest/meta-data.png"}, "image", "path"),
        ({"id": "good-1", "text": "a duplicate"}, "id", "duplicate"),
        ({"id": "../../x", "text": "t"}, "id", "key"),
        ({"id": "deep", "text": "t", "tags": deep}, None, "metadata"),
    ]
    good = [{"id": f"good-{n}", "text": f"t{n}", "image": "kept.png"} for n in range(3)]
    manifest = raw / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [*good, *(row for row, _, _ in rows)]))
    built = open_dataset(build_dataset(manifest, tmp_path / "out", on_error="skip", progress=False))
    assert built.keys(range(len(built))) == ["good-0", "good-1", "good-2"]
    lines = lines_of(tmp_path / "out" / "quarantine.jsonl")
    assert [(line["key"], line["member"], line["reason"]) for line in lines] == [
        (row["id"], member, reason) for row, member, reason in rows
    ]
    assert all(tuple(line) == KEYS and "\n" not in line["detail"] for line in lines)


# Anything at all


def collator() -> Collator:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(sorted(letters))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = config_of(Path("/nonexistent"), 1).data
    return Collator(config, TextEncoder(backend.to_str()), None)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[int]]:
    """A folder, the bytes of a small valid tar with a member of every kind, and where its headers are."""
    folder = tmp_path_factory.mktemp("fuzz")
    picture, wave = hostile.pixels(24, 32), hostile.tone(0.05)
    parts: dict[str, bytes] = {"0.txt": b"the first"}
    kinds = ("PNG", "JPEG", "WEBP")
    for number, kind in enumerate(kinds, start=1):
        parts[f"{number}.json"] = b'{"label": 3}'
        parts[f"{number}.{'jpg' if kind == 'JPEG' else kind.lower()}"] = encode_image(picture, kind)
    for number, kind in enumerate(("WAV", "FLAC", "OGG", "MP3"), start=4):
        parts[f"{number}.txt"] = f"sound {number}".encode()
        parts[f"{number}.{kind.lower()}"] = encode_sound(wave, 16_000, kind)
    parts["9.txt"] = b"the last"
    blocks, headers, position = [], [], 0
    for number, (name, data) in enumerate(parts.items()):
        headers.append(position)
        blocks.append((b"", hostile.long_name(name), hostile.pax(path=name))[number % 3])
        blocks.append(hostile.entry(name, data))
        position += len(blocks[-1]) + len(blocks[-2])
    return folder, b"".join(blocks) + hostile.END, headers


FLIPS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=0, max_size=6)
# A place in one header and what stands there; the checksum is mended, so that the lie is believed.
LIES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 360), st.binary(min_size=1, max_size=12)), max_size=3)


def read_all(dataset: Dataset, collate: Collator) -> Collated:
    ids = np.arange(len(dataset))
    return collate.collate(dataset.iter_read(ids, limits=collate.limits), [1] * len(ids), ["d"] * len(ids))


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(FLIPS, LIES, st.floats(0, 1), st.booleans())
def test_any_damage_to_a_tar_is_quarantined_or_refused(
    victim: tuple[Path, bytes, list[int]],
    flips: list[tuple[float, int]],
    lies: list[tuple[int, int, bytes]],
    cut: float,
    is_cut: bool,
) -> None:
    folder, whole, headers = victim
    data = bytearray(whole)
    for which, place, value in lies:
        start = headers[which % len(headers)]
        data[start + place : start + place + len(value)] = value
        data[start : start + BLOCK] = hostile.with_checksum(bytes(data[start : start + BLOCK]))
    for at, change in flips:
        data[int(at * (len(data) - 1))] ^= change
    (folder / "s.tar").write_bytes(data[: int(cut * len(data))] if is_cut else data)
    peak, started = _peak_bytes(), time.process_time()
    try:
        dataset, quarantined = index_folder(folder)
        collated = read_all(dataset, collator())
    except BadInput as error:
        assert "\n" not in str(error)
        return
    assert time.process_time() - started < 10 and _peak_bytes() - peak < 256 << 20
    assert len(collated.keys) == len(dataset) <= len(headers)
    assert all(tuple(vars(line)) == KEYS and line.reason for line in [*quarantined, *collated.bad.values()])
    assert set(np.flatnonzero(collated.block.arrays()["weight"] == 0).tolist()) == set(collated.bad)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(FLIPS.filter(bool), st.floats(0, 1))
def test_any_damage_to_an_index_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[float, int]], cut: float
) -> None:
    """An index comes with a dataset, so it may be a stranger's too."""
    folder = tmp_path_factory.getbasetemp() / "index-fuzz"
    file = folder / "index" / "s.arrow"
    good = folder / "good.arrow"
    if not good.exists():
        write_shard(map(tuple_sample, range(4)), folder / "s.tar")
        index_folder(folder)
        good.write_bytes(file.read_bytes())
    data = bytearray(good.read_bytes())
    for at, change in flips:
        data[int(at * (len(data) - 1))] ^= change
    file.write_bytes(data[: int(len(data) * cut)] if cut < 0.2 else data)
    try:
        dataset = open_dataset(folder)
        dataset.costs(range(len(dataset)))
        read_all(dataset, collator())
    except BadInput as error:
        assert "\n" not in str(error)

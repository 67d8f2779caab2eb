"""A dataset folder opens to exactly its samples, anywhere, or says what is wrong with it."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import Dataset, open_dataset
from data_pipelines.dataset import index_folder
from data_pipelines.decode import DecodeError
from data_pipelines.errors import BadInput
from data_pipelines.index import ShardIndex
from data_pipelines.shard import Sample, write_shard
from tests.data_pipelines.tuples import tuple_sample

MakeDataset = Callable[..., Path]


def test_samples_come_back(make_dataset: MakeDataset) -> None:
    ds = open_dataset(make_dataset(sizes=(7, 1, 12)))
    assert len(ds) == 20 and ds.shard_sizes.tolist() == [7, 1, 12]
    assert [ds[i] for i in range(20)] == [tuple_sample(i) for i in range(20)]
    assert ds[-1] == ds[19] and ds.metadata(13) == {"label": 3}
    assert ds.modalities == {"image": 20, "text": 20, "audio": 20}
    with pytest.raises(IndexError):
        ds[20]
    assert [sample.key for sample in ds.read([19, 0, 7, 8])] == ds.keys([19, 0, 7, 8])  # type: ignore[arg-type]
    costs = ds.costs([2, 9])
    assert costs.pixels.tolist() == [784, 784] and costs.text_bytes.tolist() == [len("the number 2 é".encode())] * 2
    np.testing.assert_allclose(costs.audio_seconds, [3080 / 8000, 3360 / 8000])


def test_dataset_json_has_the_names_that_others_rely_on(make_dataset: MakeDataset) -> None:
    content = json.loads((make_dataset() / "dataset.json").read_text())
    assert {"format_version", "name", "num_samples", "modalities", "fingerprint", "shards"} <= set(content)
    assert {"path", "num_samples", "bytes", "sha256"} <= set(content["shards"][0])


def test_fingerprint_knows_the_data_and_nothing_else(make_dataset: MakeDataset) -> None:
    same = [open_dataset(make_dataset(name)).fingerprint for name in ("a", "b")]
    other = open_dataset(make_dataset("c", sizes=(10, 11))).fingerprint
    assert same[0] == same[1] != other


def test_missing_modalities_and_text_rules(make_dataset: MakeDataset) -> None:
    def sample(number: int) -> Sample:
        texts = ["\ufeff  padded \n", "   ", "plain"]
        return Sample(f"k{number}", text=texts[number], audio=b"x")

    ds = open_dataset(make_dataset(sizes=(3,), sample=sample))
    assert [ds[i].text for i in range(3)] == ["padded", None, "plain"]
    assert ds[0].image is None and ds.costs([0]).pixels.tolist() == [0]


def test_bad_text_is_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset(sizes=(2,), sample=lambda n: Sample(f"k{n}", text="abcdef"))
    tar = next((folder / "shards").iterdir())
    tar.write_bytes(tar.read_bytes().replace(b"abcdef", b"ab\xff\xfeef"))
    with pytest.raises(DecodeError, match="not UTF-8 at byte 2"):
        open_dataset(folder)[0]


def _child(ds: Dataset, queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    queue.put([ds[i].key for i in range(len(ds))])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(make_dataset: MakeDataset, method: str) -> None:
    ds = open_dataset(make_dataset())
    assert ds[0].key
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_child, args=(ds, queue))
    process.start()
    assert queue.get(timeout=50) == [tuple_sample(i).key for i in range(20)]
    process.join(10)
    assert pickle.loads(pickle.dumps(ds))[5] == ds[5]


def test_many_shards_stay_within_the_descriptor_limit(make_dataset: MakeDataset) -> None:
    ds = open_dataset(make_dataset(sizes=(1,) * 270, sample=lambda n: Sample(f"k{n}", text=f"t{n}")))
    before = len(os.listdir("/proc/self/fd"))
    for i in range(270):
        assert ds[i].text == f"t{i}"
    assert len(os.listdir("/proc/self/fd")) - before <= 256
    assert ds[0].text == "t0"


def test_wrong_folders(make_dataset: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such dataset folder"):
        open_dataset(tmp_path / "absent")
    with pytest.raises(BadInput, match=r"no dataset.json"):
        open_dataset(tmp_path)
    folder = make_dataset()
    good = (folder / "dataset.json").read_text()
    edits = {
        "{": "cannot be read",
        good.replace('"format_version": 1', '"format_version": 9'): "format_version",
        good.replace('"num_samples": 20', '"num_samples": 21'): "add up",
        good.replace('"shards/', '"../shards/'): "leads out",
        good.replace('"num_samples": 10', '"num_samples": 9').replace(": 20", ": 18"): "fingerprint",
        good.replace('"num_samples": 10', f'"num_samples": {1 << 70}'): "num_samples: Input should be less than",
        good.replace('"bytes": ', '"bytes": 1000000000000000000'): "bytes: Input should be less than",
        good.replace('"shards/', '"shards/\\u0000'): "leads out|does not print",
    }
    for content, message in edits.items():
        (folder / "dataset.json").write_text(content)
        with pytest.raises(BadInput, match=message):
            open_dataset(folder)


def test_an_index_is_read_once_however_many_shards_a_batch_draws_on(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More shards than tars may be open: each rank asks for the costs of all of them in every step."""
    ds = open_dataset(make_dataset(sizes=(1,) * 300, sample=lambda n: Sample(f"k{n}", text="x" * n or "-")))
    loaded: list[Path] = []
    load = ShardIndex.load
    monkeypatch.setattr(ShardIndex, "load", lambda path: loaded.append(path) or load(path))
    for _ in range(2):
        assert ds.costs(range(300)).text_bytes.tolist() == [1, *range(1, 300)]
    assert len(loaded) == len(set(loaded)) == 300
    files = len(os.listdir("/proc/self/fd"))
    assert [raw.key for raw in ds.read(range(300))] == [f"k{n}" for n in range(300)]
    assert len(os.listdir("/proc/self/fd")) - files <= 256


def test_a_changed_tar_and_a_stale_index_are_named(make_dataset: MakeDataset) -> None:
    folder = make_dataset()
    tars, indexes = sorted((folder / "shards").iterdir()), sorted((folder / "index").iterdir())
    tars[0].write_bytes(tars[0].read_bytes()[:-512])
    with pytest.raises(BadInput, match="dataset.json says"):
        open_dataset(folder)[0]
    indexes[1].write_bytes(indexes[0].read_bytes())
    with pytest.raises(BadInput, match="index is of another tar"):
        open_dataset(folder)[15]
    indexes[1].unlink()
    with pytest.raises(BadInput, match="index is missing"):
        open_dataset(folder)[15]


def test_bare_tars_become_a_dataset(tmp_path: Path) -> None:
    write_shard(map(tuple_sample, range(3)), tmp_path / "x" / "part.tar")
    write_shard(map(tuple_sample, range(3, 5)), tmp_path / "y" / "part.tar")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.tar")}
    ds, quarantined = index_folder(tmp_path)
    assert quarantined == [] and not (tmp_path / "quarantine.jsonl").exists()
    assert [ds[i] for i in range(5)] == [tuple_sample(i) for i in range(5)]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert all(path.name.startswith("part") for path in (tmp_path / "index").iterdir())
    again, _ = index_folder(tmp_path)
    assert again.fingerprint == ds.fingerprint and len(list((tmp_path / "index").iterdir())) == 2


def test_a_damaged_tar_keeps_its_whole_samples(tmp_path: Path) -> None:
    write_shard(map(tuple_sample, range(5)), tmp_path / "good.tar")
    write_shard(map(tuple_sample, range(5, 10)), tmp_path / "torn.tar")
    with tarfile.open(tmp_path / "torn.tar") as tar:
        cut = next(member.offset_data for member in tar if member.name == "sample-00007.json")
    raw = (tmp_path / "torn.tar").read_bytes()
    (tmp_path / "torn.tar").write_bytes(raw[:cut])
    ds, quarantined = index_folder(tmp_path)
    assert ds.keys(range(len(ds))) == [f"sample-{n:05d}" for n in (0, 1, 2, 3, 4, 5, 6)]
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"shard", "key", "member", "reason", "detail"}]
    assert (lines[0]["shard"], lines[0]["key"], lines[0]["reason"]) == ("torn.tar", "sample-00007", "truncated")
    assert lines == [vars(line) for line in quarantined]
    (tmp_path / "torn.tar").write_bytes(raw)
    assert len(index_folder(tmp_path)[0]) == 10
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_no_tar_is_bad_input_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no \.tar file"):
        index_folder(tmp_path)
    write_shard(map(tuple_sample, range(2)), tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(BadInput, match=r"b\.tar: not a tar"):
        index_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        info = tarfile.TarInfo("x.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:512])
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadInput, match="no whole sample"):
        index_folder(tmp_path)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, data_pipelines, data_pipelines.dataset; print('torch' in sys.modules, 'PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[0] == "False"

"""Shards are deterministic, whole or absent, and give back the bytes that went in."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest

from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample, ShardReader, expand_shards, split_member_name, write_shard
from tests.data_pipelines.tuples import tuple_sample


def test_bytes_are_a_function_of_the_samples(tmp_path: Path) -> None:
    first = write_shard(map(tuple_sample, range(5)), tmp_path / "a.tar")
    second = write_shard(map(tuple_sample, range(5)), tmp_path / "b.tar")
    assert first == second
    content = (tmp_path / "a.tar").read_bytes()
    assert (first.num_bytes, first.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert first.modalities == {"image": 5, "text": 5, "audio": 5}
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.mtime, m.uname, m.mode) for m in tar} == {(0, "bigdata", 0o444)}


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def samples():  # type: ignore[no-untyped-def]
        yield tuple_sample(0)
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError, match="source failed"):
        write_shard(samples(), tmp_path / "a.tar")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["a.b", "/a", "../a", "a/../b", "", "a\nb", "a\\b", ".a"])
def test_keys_that_a_tar_would_change_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(BadInput):
        write_shard([Sample(key, text="x")], tmp_path / "a.tar")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["a", "a/b.c/d", "ключ", "5802#0", "x" * 300, "a b"])
def test_keys_that_a_tar_keeps(tmp_path: Path, key: str) -> None:
    from data_pipelines.index import index_shard

    write_shard([Sample(key, text="x"), Sample("other", text="y")], tmp_path / "a.tar")
    assert index_shard(tmp_path / "a.tar").keys() == [key, "other"]


@pytest.mark.parametrize(
    "sample",
    [
        Sample("a"),
        Sample("a", metadata={"x": 1}),
        Sample("a", image=b"x", image_extension="gif"),
        Sample("a", audio=b"x", audio_extension="exe"),
        Sample("a", text="x", metadata={"x": float("nan")}),
        Sample("a", text="x", metadata={"x": object()}),
    ],
)
def test_samples_that_no_shard_can_hold(tmp_path: Path, sample: Sample) -> None:
    with pytest.raises(BadInput, match="a"):
        write_shard([sample], tmp_path / "a.tar")


def test_the_same_key_twice_in_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="twice"):
        write_shard([Sample("a", text="x"), Sample("a", image=b"y")], tmp_path / "a.tar")


def test_member_names_split_as_webdataset_does() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ["a.txt", "d.e/a.JPG", "a.b.c", "a", ".hidden", "d/.x.y", "d/a.", "a/b/c.tar.gz", "._a.jpg"]:
        key, extension = base_plus_ext(name)
        assert split_member_name(name) == (None if key is None else (key, extension.lower())), name
    assert split_member_name("__info__/a.txt") is None


def test_reader_reads_by_offset_and_names_a_short_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    reader = ShardReader(tmp_path / "a")
    assert reader.read(10, 5) == bytes(range(10, 15))
    with pytest.raises(BadInput, match="ends before byte 110"):
        reader.read(90, 20)
    with pytest.raises(BadInput, match="cannot be opened"):
        ShardReader(tmp_path / "absent")


def test_brace_lists() -> None:
    assert expand_shards("s-{0009..0011}.tar") == ["s-0009.tar", "s-0010.tar", "s-0011.tar"]
    assert expand_shards("{a,b}/x.tar") == ["a/x.tar", "b/x.tar"]
    assert expand_shards("plain.tar") == ["plain.tar"]
    with pytest.raises(BadInput, match="braces"):
        expand_shards("s-{0..3.tar")
    with pytest.raises(BadInput, match="more than"):
        expand_shards("s-{0..99}{0..99}.tar", limit=1000)

"""WebDataset tars cut into new shards: any kind of list of them, and what is wrong in them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.writer import TarWriter

from data_pipelines.build import build_dataset
from data_pipelines.dataset import open_dataset
from data_pipelines.errors import BadInput
from data_pipelines.sources import Row, RowFault, open_source
from tests.data_pipelines.tuples import encode_image, encode_sound

PNG = encode_image(np.zeros((4, 4), np.uint8))
JPEG = encode_image(np.zeros((4, 4), np.uint8), "JPEG")
FLAC = encode_sound(np.full(80, 0.1))


def write_tar(path: Path, samples: list[dict[str, Any]]) -> Path:
    """A tar by webdataset's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file, TarWriter(file, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def samples(start: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "__key__": f"x/{number:04d}",
            "png": PNG,
            "txt": f"text {number}".encode(),
            "flac": FLAC,
            "json": json.dumps({"label": number}).encode(),
            "cls": b"7",
        }
        for number in range(start, start + count)
    ]


@pytest.mark.parametrize("how", ["folder", "braces", "tars:"])
def test_tars_are_cut_anew(tmp_path: Path, how: str) -> None:
    for number in range(3):
        write_tar(tmp_path / "old" / f"part-{number}.tar", samples(4 * number, 4))
    named = {"folder": tmp_path / "old", "braces": tmp_path / "old/part-{0..2}.tar", "tars:": f"tars:{tmp_path}/old"}
    out = build_dataset(named[how], tmp_path / "new", shard_size=5, workers=1, progress=False)
    dataset = open_dataset(out)
    assert dataset.shard_sizes.tolist() == [5, 5, 2]
    assert [path.name for path in sorted((out / "shards").iterdir())][0] == "old-000000.tar"
    for number in range(12):
        sample = dataset[number]
        assert (sample.key, sample.text, sample.metadata) == (f"x/{number:04d}", f"text {number}", {"label": number})
        assert (sample.image, sample.audio, sample.image_extension) == (PNG, FLAC, "png")


def test_one_tar_and_a_dataset_of_ours(tmp_path: Path, make_dataset: Callable[..., Path]) -> None:
    one = write_tar(tmp_path / "one.tar", samples(0, 3))
    assert len(open_dataset(build_dataset(one, tmp_path / "a", progress=False))) == 3
    old = make_dataset("old", (4, 4))
    new = build_dataset(old, tmp_path / "new", shard_size=3, workers=1, progress=False)
    before, after = open_dataset(old), open_dataset(new)
    assert after.shard_sizes.tolist() == [3, 3, 2]
    assert [after[number] for number in range(8)] == [before[number] for number in range(8)]
    # Cut as before, they are the same tars again.
    same = build_dataset(old, tmp_path / "same", shard_size=4, name="old", progress=False)
    assert open_dataset(same).fingerprint == before.fingerprint


@pytest.mark.timeout(300)
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    write_tar(tmp_path / "old" / "a.tar", samples(0, 9))
    one, two = (
        build_dataset(tmp_path / "old", tmp_path / str(n), shard_size=2, workers=n, progress=False) for n in (1, 2)
    )
    assert open_dataset(one).fingerprint == open_dataset(two).fingerprint


def test_keys_that_each_tar_repeats(tmp_path: Path) -> None:
    for name in ("a.b", "c"):
        write_tar(tmp_path / "old" / f"{name}.tar", samples(0, 2))
    with pytest.raises(BadInput, match=r"the key 'x/0000' is in a\.b\.tar already; --prefix-keys"):
        build_dataset(tmp_path / "old", tmp_path / "out", progress=False)
    out = build_dataset(tmp_path / "old", tmp_path / "out", prefix_keys=True, progress=False)
    assert open_dataset(out).keys(range(4)) == ["a_b/x/0000", "a_b/x/0001", "c/x/0000", "c/x/0001"]


@pytest.mark.parametrize("prefix_keys", [False, True])
def test_keys_that_leave_no_room_for_an_extension(tmp_path: Path, prefix_keys: bool) -> None:
    key = "k" * (4090 if prefix_keys else 4092)
    tar = write_tar(tmp_path / "a.tar", [{"__key__": key, "jpg": PNG}, {"__key__": "l", "txt": b"t"}])
    with pytest.raises(BadInput, match=r"\.\.\. of more than 4091 bytes"):
        build_dataset(tar, tmp_path / "out", prefix_keys=prefix_keys, progress=False)
    out = build_dataset(tar, tmp_path / "out", prefix_keys=prefix_keys, on_error="skip", progress=False)
    assert len(open_dataset(out)) == 1


def test_an_extension_that_the_bytes_contradict_is_put_right(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [{"__key__": "k", "png": JPEG}, {"__key__": "l", "jpeg": JPEG}])
    dataset = open_dataset(build_dataset(tar, tmp_path / "out", progress=False))
    assert [dataset[number].image_extension for number in range(2)] == ["jpg", "jpeg"]
    assert dataset[0].image == JPEG


def test_bad_samples_are_faults(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"__key__": "gif", "jpg": b"GIF89a"},
        {"__key__": "text", "png": PNG, "txt": b"\xff"},
        {"__key__": "json", "png": PNG, "json": b"{"},
        {"__key__": "only", "cls": b"1"},
        {"__key__": "good", "txt": b"t"},
        {"__key__": "long", "txt": b"t" * 1_000_001},
    ]
    tar = write_tar(tmp_path / "a.tar", bad)
    source = open_source(str(tar))
    found: dict[str, str] = {}
    for item in source.rows():
        fault = item
        if isinstance(item, Row):
            try:
                source.read(item)
            except RowFault as error:
                fault = error
        if isinstance(fault, RowFault):
            found[str(fault.key)] = fault.reason
            assert "a.tar: " in fault.detail
    assert found == {"gif": "format", "text": "encoding", "json": "json", "only": "empty", "long": "size"}
    out = build_dataset(tar, tmp_path / "out", on_error="skip", progress=False)
    assert open_dataset(out).keys([0]) == ["good"]
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 5


def test_a_member_that_may_hold_a_pickle_stays_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = write_tar(tmp_path / "a.tar", [{"__key__": "k", "txt": b"t", "pyd": b"p"}, {"__key__": "l", "txt": b"t"}])
    dataset = open_dataset(build_dataset(tar, tmp_path / "out"))
    assert dataset.keys(range(2)) == ["k", "l"] and not (tmp_path / "out" / "quarantine.jsonl").exists()
    assert "members that may hold pickles stay behind, unopened (1)" in capsys.readouterr().err


def test_a_damaged_tar_gives_its_whole_samples(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "a.tar", samples(0, 6)).read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match=r"a\.tar: "):
        build_dataset(tmp_path / "a.tar", tmp_path / "out", progress=False)
    dataset = open_dataset(build_dataset(tmp_path / "a.tar", tmp_path / "out", on_error="skip", progress=False))
    assert 0 < len(dataset) < 6 and dataset[0].image == PNG


def test_names_that_are_no_tars(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 100)
    for name, message in (
        (f"{tmp_path}/none.tar", "no such file; give a tar"),
        (f"{tmp_path}/a-{{0..2}}.tar", r"a-0\.tar: no such file \(and 2 more\)"),
        (f"{tmp_path}/{{0..2.tar", "the braces do not match"),
        (f"tars:{tmp_path}/empty", "no such file"),
        (f"{tmp_path}/x.tar", "not a tar"),
    ):
        with pytest.raises(BadInput, match=message):
            list(open_source(name).rows())
    file = io.BytesIO()
    tarfile.open(fileobj=file, mode="w").close()
    (tmp_path / "x.tar").write_bytes(file.getvalue())
    with pytest.raises(BadInput, match="no sample in 1 tar"):
        list(open_source(f"tars:{tmp_path}").rows())

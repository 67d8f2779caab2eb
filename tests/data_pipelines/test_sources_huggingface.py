"""Hugging Face datasets: saved, built from folders, streamed; bytes as they were stored, and never torchcodec."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.build import build_dataset
from data_pipelines.dataset import open_dataset
from data_pipelines.errors import BadInput
from data_pipelines.sources import Note, Row, RowFault, open_source
from tests.data_pipelines.tuples import encode_image, encode_sound

datasets = pytest.importorskip("datasets")

COUNT = 11


def image(number: int) -> bytes:
    return encode_image(np.full((4, 5), 3 * number, np.uint8))


def sound(number: int) -> bytes:
    return encode_sound(np.full(80 + number, 0.1), sound_format="WAV")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert "torchcodec" not in sys.modules
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield
    assert "torchcodec" not in sys.modules


def make(count: int = COUNT, start: int = 0) -> Any:
    """A dataset with Image, Audio and ClassLabel features; some rows lack an image or a sound."""
    numbers = range(start, start + count)
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    columns = {
        "image": [{"bytes": image(n), "path": None} if n % 4 else None for n in numbers],
        "audio": [{"bytes": sound(n), "path": "x.wav"} if n % 3 else None for n in numbers],
        "text": [f" text {n} é" for n in numbers],
        "label": [n % 2 for n in numbers],
        "licence": [None if n % 2 else "cc0" for n in numbers],
    }
    features = datasets.Features(
        {
            "image": stored,
            "audio": stored,
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "licence": datasets.Value("string"),
        }
    )
    made = datasets.Dataset.from_dict(columns, features=features)
    # `Audio` takes bytes without torchcodec by a cast, and not by encoding.
    return made.cast_column("image", datasets.Image()).cast_column("audio", datasets.Audio())


def assert_whole(folder: Path, count: int = COUNT) -> None:
    dataset = open_dataset(folder)
    assert dataset.keys(range(len(dataset))) == [f"{n:09d}" for n in range(count)]
    for n in range(count):
        sample = dataset[n]
        assert sample.image == (image(n) if n % 4 else None) and sample.image_extension in ("png", "jpg")
        assert sample.audio == (sound(n) if n % 3 else None)
        assert sample.audio is None or sample.audio_extension == "wav"
        assert sample.text == f"text {n} é"
        expected = {"label": n % 2, "label_name": ("cat", "dog")[n % 2]} | ({} if n % 2 else {"licence": "cc0"})
        assert sample.metadata == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset(tmp_path: Path, streaming: bool) -> None:
    make().save_to_disk(tmp_path / "saved")
    built = build_dataset(
        tmp_path / "saved", tmp_path / "out", shard_size=4, workers=1, streaming=streaming, progress=False
    )
    assert_whole(built)
    recorded = json.loads((built / "build.json").read_text())["source"]
    assert (recorded["kind"], recorded["dataset"], recorded["streaming"]) == ("huggingface", "saved", streaming)


@pytest.mark.timeout(300)
def test_two_workers_give_the_same_bytes(tmp_path: Path) -> None:
    make(8).save_to_disk(tmp_path / "saved")
    one, two = (
        build_dataset(tmp_path / "saved", tmp_path / str(n), shard_size=3, workers=n, progress=False) for n in (1, 2)
    )
    assert_whole(two, 8)
    assert open_dataset(one).fingerprint == open_dataset(two).fingerprint


def test_a_stream_of_several_files_from_any_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipelines.sources import huggingface_rows

    monkeypatch.setattr(huggingface_rows, "_ROWS_A_STATE", 4)
    (tmp_path / "files").mkdir()
    for part in range(3):
        make(10, 10 * part).to_parquet(tmp_path / "files" / f"{part}.parquet")
    source = open_source(f"hf:{tmp_path / 'files'}", streaming=True)
    rows = [row for row in source.rows() if isinstance(row, Row)]
    assert rows == [row for row in source.rows() if isinstance(row, Row)]
    other = open_source(f"hf:{tmp_path / 'files'}", streaming=True)
    for n in (22, 23, 28, 3, 5, 7, 11, 29, 6):
        assert (other.read(rows[n]).image, other.read(rows[n]).audio) == (
            image(n) if n % 4 else None,
            sound(n) if n % 3 else None,
        )
    one = build_dataset(f"hf:{tmp_path / 'files'}", tmp_path / "one", streaming=True, shard_size=7, progress=False)
    assert_whole(one, 30)
    mapped = build_dataset(f"hf:{tmp_path / 'files'}", tmp_path / "two", shard_size=7, progress=False)
    assert open_dataset(mapped).fingerprint == open_dataset(one).fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_images_and_of_sounds(tmp_path: Path, streaming: bool) -> None:
    for name, kind, encode in (("pictures", "png", image), ("sounds", "wav", sound)):
        for n in range(1, 5):
            path = tmp_path / name / ("ant", "bee")[n % 2] / f"{n}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(n))
        out = build_dataset(f"hf:{tmp_path / name}", tmp_path / f"{name}-out", streaming=streaming, progress=False)
        dataset = open_dataset(out)
        assert [dataset[n].metadata for n in range(4)] == [
            {"label": n // 2, "label_name": "ant bee".split()[n // 2]} for n in range(4)
        ]
        members = [dataset[n].image or dataset[n].audio for n in range(4)]
        assert members == [encode(n) for n in (2, 4, 1, 3)]


def test_a_folder_of_sounds_with_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "speech"
    folder.mkdir()
    lines = []
    for n in range(3):
        (folder / f"{n}.wav").write_bytes(sound(n))
        lines.append({"file_name": f"{n}.wav", "transcription": f"said {n}", "utterance": f"u-{n}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_source(f"hf:{folder}")
    notes = [item.message for item in source.rows() if isinstance(item, Note)]
    assert notes == [f"hf:{folder}: no column 'text'; if 'transcription' is it, add --column text=transcription"]
    columns = {"text": "transcription", "id": "utterance"}
    dataset = open_dataset(build_dataset(f"hf:{folder}", tmp_path / "out", columns=columns, progress=False))
    assert [(dataset[n].key, dataset[n].text, dataset[n].audio) for n in range(3)] == [
        (f"u-{n}", f"said {n}", sound(n)) for n in range(3)
    ]


@pytest.mark.parametrize(
    "path", ["hf://datasets/me/private@main/1.png", "hf://buckets/me/1.png", "https://example.org/1.png", "../1.png"]
)
def test_rows_name_files_of_their_own_dataset_alone(tmp_path: Path, path: str) -> None:
    rows = {"image": [{"bytes": None, "path": path}], "text": ["a"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadInput, match=f"image path .*{Path(path).name}.* is refused"):
        build_dataset(tmp_path / "saved", tmp_path / "out", progress=False)


def test_splits(tmp_path: Path) -> None:
    saved = datasets.DatasetDict({"train": make(4), "test": make(3)})
    saved.save_to_disk(tmp_path / "saved")
    assert_whole(build_dataset(tmp_path / "saved", tmp_path / "out", split="train", progress=False), 4)
    assert open_dataset(tmp_path / "out").name == "saved-train"
    for split, message in ((None, "name a split with --split; the splits are 'train', 'test'"), ("x", "no split 'x'")):
        with pytest.raises(BadInput, match=message):
            build_dataset(tmp_path / "saved", tmp_path / "no", split=split, progress=False)
    make(3).save_to_disk(tmp_path / "one")
    with pytest.raises(BadInput, match="holds one split and no 'train'"):
        build_dataset(tmp_path / "one", tmp_path / "no", split="train", progress=False)


def test_columns_ids_and_what_json_cannot_hold(tmp_path: Path) -> None:
    made = make(3).rename_column("text", "caption").rename_column("image", "picture")
    made = made.add_column("name", ["a", "b", "b"]).add_column("blob", [b"1", b"2", b"3"])
    made.save_to_disk(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path / 'saved'}", columns={"text": "caption", "id": "name", "note": "licence"})
    found = list(source.rows())
    rows = [item for item in found if isinstance(item, Row)]
    assert [(row.key, row.text) for row in rows] == [("a", "text 0 é"), ("b", "text 1 é")]
    assert rows[0].metadata == {"label": 0, "label_name": "cat", "note": "cc0"}
    assert source.read(rows[1]).image == image(1)
    assert [item.detail for item in found if isinstance(item, RowFault)] == [
        "the id 'b' is row 2's already; ids must be unique"
    ]
    assert [item.message.partition(": ")[2] for item in found if isinstance(item, Note)] == [
        "columns that JSON cannot hold stay behind: blob"
    ]
    with pytest.raises(BadInput, match="no column 'captions'; found: .*nearest: --column text=caption"):
        list(open_source(f"hf:{tmp_path / 'saved'}", columns={"text": "captions"}).rows())
    made.select_columns(["label"]).save_to_disk(tmp_path / "bare")
    with pytest.raises(BadInput, match="no image, text or audio among the columns label"):
        list(open_source(f"hf:{tmp_path / 'bare'}").rows())


def test_paths_in_a_dataset_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(image(1))
    rows = [
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": "../secret.png"},
        {"bytes": None, "path": "http://127.0.0.1/a.png"},
        {"bytes": b"GIF89a", "path": None},
        {"bytes": b"", "path": "own.png"},
        {"bytes": None, "path": "own.png"},
    ]
    stored = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    datasets.Dataset.from_dict({"image": rows}, features=stored).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "own.png").write_bytes(image(2))
    source = open_source(str(tmp_path / "saved"))
    reasons = []
    for row in source.rows():
        if isinstance(row, Row):
            try:
                assert source.read(row).image == image(2)
            except RowFault as fault:
                reasons.append(fault.reason)
    assert reasons == ["path", "path", "path", "format", "empty"]


def test_rows_of_another_column_or_split_are_another_dataset(tmp_path: Path) -> None:
    stored = datasets.Features({name: {"bytes": datasets.Value("binary")} for name in ("one", "two")})
    rows = {name: [{"bytes": image(n)}] for n, name in enumerate(stored)}
    made = datasets.Dataset.from_dict(rows, features=stored)
    datasets.DatasetDict({"a": made, "b": made}).save_to_disk(tmp_path / "saved")
    options: dict[str, Any] = {"split": "a", "columns": {"image": "one"}, "name": "n", "progress": False}
    build_dataset(tmp_path / "saved", tmp_path / "out", **options)
    for other in ({"split": "b"}, {"columns": {"image": "two"}}):
        with pytest.raises(BadInput, match="holds a dataset made of other rows"):
            build_dataset(tmp_path / "saved", tmp_path / "out", **{**options, **other})


@pytest.mark.parametrize("streaming", [False, True])
def test_what_counts_as_missing(tmp_path: Path, streaming: bool) -> None:
    media = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = {"id": datasets.Value("string"), "image": media, "text": datasets.Value("string")}
    columns = {
        "id": ["a", "", "c"],
        "image": [{"bytes": None, "path": None}, {"bytes": image(1), "path": None}, {"bytes": None, "path": "a\0"}],
        "text": ["t", "t", "t"],
        "score": [float("nan"), 1.0, 1.0],
    }
    made = datasets.Dataset.from_dict(
        columns, features=datasets.Features({**features, "score": datasets.Value("float64")})
    )
    made.save_to_disk(tmp_path / "saved")
    out = build_dataset(tmp_path / "saved", tmp_path / "out", streaming=streaming, on_error="skip", progress=False)
    dataset = open_dataset(out)
    assert dataset.keys(range(len(dataset))) == ["a"]
    assert (dataset[0].image, dataset[0].metadata) == (None, {})
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [(None, "key"), ("c", "unreadable")]


def test_names_that_are_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(3).save_to_disk(tmp_path / "cut")
    (file,) = (tmp_path / "cut").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:700])
    for name, message in (
        (f"hf:{tmp_path}/cut", r"cut: cannot be read \(\w+: "),
        (f"hf:{tmp_path}/none", "no such folder, and no name on the Hub"),
        (f"hf:{tmp_path}/empty", "cannot be read"),
        ("hf:a/b/c", "no such folder, and no name on the Hub"),
    ):
        with pytest.raises(BadInput, match=message):
            list(open_source(name).rows())


def test_a_name_on_the_hub() -> None:
    source: Any = open_source("hf:my-lab/birds:small@v1.0", split="train", streaming=True)
    assert (source.name, source.config, source.revision) == ("my-lab/birds", "small", "v1.0")
    assert (source.default_name, source.shard_prefix) == ("birds-train", "train")
    # Tests run without a network.
    with pytest.raises(BadInput, match=r"hf:my-lab/birds: cannot be read \(\w+: "):
        list(source.rows())


def test_joined_to_a_folder(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for n in range(4):
        (tmp_path / "raw" / f"{n}.txt").write_text(f"text {n}")
    names = [str(n) for n in range(4)]
    make(4).remove_columns(["text"]).add_column("id", names).save_to_disk(tmp_path / "media")
    table = datasets.Dataset.from_dict({"id": names, "speaker": ["s"] * 4})
    table.save_to_disk(tmp_path / "table")
    out = build_dataset(
        tmp_path / "raw", tmp_path / "out", join=[tmp_path / "media", tmp_path / "table"], progress=False
    )
    dataset = open_dataset(out)
    assert [dataset[n].image for n in range(4)] == [None, image(1), image(2), image(3)]
    assert [dataset[n].audio for n in range(4)] == [None, sound(1), sound(2), None]
    assert {dataset[n].metadata["speaker"] for n in range(4)} == {"s"}

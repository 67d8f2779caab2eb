"""Manifests: three formats, one meaning; what is refused, and in which words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample
from data_pipelines.sources import Note, Row, RowFault, open_source
from tests.data_pipelines.raw import Record, write_csv, write_files, write_jsonl, write_parquet
from tests.data_pipelines.tuples import encode_image, encode_sound


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return write_files(tmp_path, 10)


def read_all(manifest: Path, **options: Any) -> list[Sample | RowFault]:
    """Each row as a sample, or what is wrong with it."""
    source = open_source(str(manifest), **options)
    found: list[Sample | RowFault] = []
    for row in source.rows():
        if isinstance(row, Row):
            try:
                found.append(source.read(row))
            except RowFault as fault:
                found.append(fault)
        elif isinstance(row, RowFault):
            found.append(row)
    return found


def only_fault(manifest: Path, **options: Any) -> RowFault:
    faults = [item for item in read_all(manifest, **options) if isinstance(item, RowFault)]
    assert len(faults) == 1, faults
    return faults[0]


def test_three_formats_give_the_same_samples_with_the_files_own_bytes(tmp_path: Path, records: list[Record]) -> None:
    by_format = [
        read_all(write_csv(tmp_path / "m.csv", records)),
        read_all(write_jsonl(tmp_path / "m.jsonl", records)),
        read_all(write_parquet(tmp_path / "m.parquet", records)),
    ]
    assert by_format[0] == by_format[1] == by_format[2]
    assert len(by_format[0]) == len(records)
    for sample, record in zip(by_format[0], records, strict=True):
        assert isinstance(sample, Sample)
        assert sample.key == record["id"]
        assert sample.text == record["text"]
        for modality, data in (("image", sample.image), ("audio", sample.audio)):
            path = record[modality]
            assert data == (None if path is None else (tmp_path / path).read_bytes())
        expected = {
            name: record[name] for name in ("split", "label", "label_name", "speaker") if record[name] is not None
        }
        assert sample.metadata == expected
        assert (sample.image_extension, sample.audio_extension)[sample.image is None] in ("png", "flac")


def test_split_keeps_its_rows_and_names_the_others_when_unknown(tmp_path: Path, records: list[Record]) -> None:
    manifest = write_csv(tmp_path / "m.csv", records)
    kept = read_all(manifest, split="test")
    assert [sample.key for sample in kept] == ["row-000", "row-004", "row-008"]
    with pytest.raises(BadInput, match=r"no split 'val'; the splits are 'test' \(3 rows\), 'train' \(7 rows\)"):
        read_all(manifest, split="val")


def test_columns_can_be_mapped(tmp_path: Path, records: list[Record]) -> None:
    renamed = [
        {"name": r["id"], "img_path": r["image"], "text": r["text"], "image": "not a path", "class": r["label"]}
        for r in records
    ]
    manifest = write_csv(tmp_path / "m.csv", renamed)
    samples = read_all(manifest, columns={"id": "name", "image": "img_path", "label": "class"})
    assert samples[0].image == (tmp_path / "images/0.png").read_bytes()
    # The column that the mapping pushed aside is not taken for metadata of that name.
    assert samples[0].metadata == {"label": 0}


def test_a_column_that_is_close_to_a_modality_is_pointed_out(tmp_path: Path) -> None:
    manifest = write_csv(tmp_path / "m.csv", [{"id": "a", "text": "t", "img": "x.png"}])
    notes = [row.message for row in open_source(str(manifest)).rows() if isinstance(row, Note)]
    assert len(notes) == 1
    assert "--column image=img" in notes[0]


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("key,image", {}, r"no column 'id'; found: key, image"),
        ("ids,image", {}, r"no column 'id'; found: ids, image; nearest: --column id=ids"),
        ("id,img_path,caption", {}, r"no column 'image', 'text' or 'audio'; found: id, img_path, caption"),
        ("id,imagge", {}, r"nearest: --column image=imagge"),
        ("id,image", {"columns": {"image": "imag"}}, r"no column 'imag'; found: id, image; nearest"),
        ("id,image", {"split": "train"}, r"no column 'split'; found: id, image"),
        ("id,image,image", {}, r"names column 'image' more than once"),
        ("id,image", {}, r"no rows"),
        ("", {}, r"no header"),
    ],
)
def test_bad_headers(tmp_path: Path, header: str, options: dict[str, Any], message: str) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text(header + "\n")
    with pytest.raises(BadInput, match=message):
        read_all(manifest, **options)


def test_columns_of_jsonl_are_those_of_all_rows(tmp_path: Path) -> None:
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"id": "a", "text": "t"}, {"id": "b", "caption": "u", "text": "v"}])
    with pytest.raises(
        BadInput, match=r"no column 'captions'; found: id, text, caption; nearest: --column text=caption"
    ):
        read_all(manifest, columns={"text": "captions"})


@pytest.mark.parametrize("key", ["a.b", "a/b", "../a", "a\\b", "a\tb", "__a", " a", "x" * 96, "é" * 48])
def test_keys_that_a_tar_would_change_are_refused(tmp_path: Path, key: str) -> None:
    fault = only_fault(write_jsonl(tmp_path / "m.jsonl", [{"id": "fine", "text": "t"}, {"id": key, "text": "t"}]))
    assert (fault.reason, fault.number, fault.line) == ("key", 2, 2)
    assert repr(key) in fault.detail


@pytest.mark.parametrize("key", ["5802#0", "ein Schlüssel", "x" * 95, "train-1_a", 17, 3.0])
def test_other_keys_are_taken(tmp_path: Path, key: Any) -> None:
    [sample] = read_all(write_jsonl(tmp_path / "m.jsonl", [{"id": key, "text": "t"}]))
    assert sample.key == (str(int(key)) if isinstance(key, float) else str(key))


def test_a_parquet_manifest_with_a_column_twice(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["t"]), pa.array(["u"])], names=["id", "text", "text"])
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(BadInput, match="names column 'text' more than once"):
        list(open_source(str(tmp_path / "m.parquet")).rows())


def test_a_repeated_id_names_both_rows(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "1"}, {"id": "b", "text": "2"}, {"id": "a", "text": "3"}]
    fault = only_fault(write_csv(tmp_path / "m.csv", rows))
    assert str(fault.as_bad_input("m.csv")) == (
        "m.csv: row 3 (line 4, id 'a'): the id 'a' is row 1's already; ids must be unique"
    )


def _write(name: str, data: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(data)
        return name

    return write


def _fifo(folder: Path) -> str:
    os.mkfifo(folder / "pipe.png")
    return "pipe.png"


def _link_out(folder: Path) -> str:
    outside = folder.parent / f"{folder.name}-outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(outside / "secret.png")
    return "link.png"


def _absolute(folder: Path) -> str:
    _link_out(folder)
    return str(folder.parent / f"{folder.name}-outside" / "secret.png")


def _folder(folder: Path) -> str:
    (folder / "folder.png").mkdir()
    return "folder.png"


PNG = encode_image(np.zeros((4, 4), np.uint8))
JPEG = encode_image(np.zeros((4, 4), np.uint8), "JPEG")
FLAC = encode_sound(np.full(800, 0.1))
SILENT = encode_sound(np.zeros(0), sound_format="WAV")


@pytest.mark.parametrize(
    ("column", "make", "reason", "message"),
    [
        ("image", lambda f: "none.png", "missing", "image file .*/none.png does not exist"),
        ("image", lambda f: "a/../../up.png", "path", r"contains '\.\.', which is refused"),
        ("image", lambda f: "http://example.org/a.png", "path", "is a URL"),
        ("image", lambda f: "nul\0.png", "path", "contains a NUL"),
        ("image", _link_out, "path", "lies outside the folder .*allow it with --allow"),
        ("image", _absolute, "path", "lies outside the folder"),
        ("image", _fifo, "type", "is not a regular file"),
        ("image", _folder, "type", "is not a regular file"),
        ("image", _write("a.gif", b"GIF89a"), "format", r"none of \.jpg, \.jpeg, \.png, \.webp"),
        ("image", _write("a.png", JPEG), "format", "holds JPEG; rename it to .jpeg"),
        ("image", _write("a.jpg", PNG), "format", "holds PNG; rename it to .png"),
        ("image", _write("a.png", b"no picture"), "format", "is no readable PNG file"),
        ("image", _write("a.png", b""), "empty", "is empty"),
        ("audio", _write("a.wav", FLAC), "format", "holds FLAC; rename it to .flac"),
        ("audio", _write("a.flac", FLAC[:20]), "format", "holds no sound, or its FLAC header is damaged"),
        ("audio", _write("a.wav", SILENT), "format", "holds no sound"),
        ("audio", _write("a.mp3", PNG), "format", "is no readable MP3 file"),
    ],
)
def test_files_that_cannot_be_members(
    tmp_path: Path, column: str, make: Callable[[Path], str], reason: str, message: str
) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    records = [{"id": "fine", "text": "t", column: None}, {"id": "bad", "text": "t", column: make(folder)}]
    fault = only_fault(write_jsonl(folder / "m.jsonl", records))
    assert (fault.number, fault.key, fault.member, fault.reason) == (2, "bad", column, reason)
    with pytest.raises(BadInput, match=rf"row 2 \(line 2, id 'bad'\): .*{message}"):
        raise fault.as_bad_input("m")


@pytest.mark.parametrize("make", [_link_out, _absolute])
def test_files_in_an_allowed_folder_are_read(tmp_path: Path, make: Callable[[Path], str]) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    manifest = write_csv(folder / "m.csv", [{"id": "a", "image": make(folder)}])
    [sample] = read_all(manifest, allowed=((tmp_path / "raw-outside").resolve(),))
    assert sample.image == PNG


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ('{"id": "b"}', "empty", "no image, no text and no audio"),
        ('{"id": "b", "text": " \\n"}', "empty", "no image, no text and no audio"),
        ('{"text": "t"}', "key", "no 'id': every row needs an id"),
        ('{"id": "b", "text": 5}', "type", "'text' must be text, but is int"),
        ('{"id": "b", "text": "\\ud800"}', "text", "surrogate"),
        ('{"id": "b", "text": "a\\u0000b"}', "text", "NUL"),
        ('{"id": "b", "text": "t", "score": Infinity}', "metadata", "column 'score' does not go into JSON"),
        (json.dumps({"id": "b", "text": "x" * 1_000_001}), "text", "1000001 bytes; the limit is 1000000"),
        (json.dumps({"id": "b", "text": "t", "log": "x" * 1_000_000}), "metadata", "the limit is 1000000"),
        ('["b"]', "json", "a JSON list, not an object"),
        ('{"id": "b", ', "json", "not JSON"),
        ('{"id": "b", "text": "\xff"}', "json", "not UTF-8"),
    ],
)
def test_rows_that_give_no_sample(tmp_path: Path, line: str, reason: str, message: str) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "t"}\n\n' + line.encode("latin-1") + b"\n")
    fault = only_fault(manifest)
    assert (fault.number, fault.line, fault.reason) == (2, 3, reason)
    assert message in fault.detail


def test_csv_rows_with_too_many_or_few_cells_are_named(tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text('id,text,label\na,"two\nlines",1\nb,one, two,1\nc,t\n\nd,t,x\n')
    found = read_all(manifest)
    assert [f.detail.split(",")[0] for f in found if isinstance(f, RowFault)] == ["4 cells", "2 cells"]
    assert [(f.number, f.line) for f in found if isinstance(f, RowFault)] == [(2, 4), (3, 5)]
    samples = [s for s in found if isinstance(s, Sample)]
    assert [(s.key, s.text, s.metadata) for s in samples] == [
        ("a", "two\nlines", {"label": 1}),
        ("d", "t", {"label": "x"}),
    ]


def test_parquet_keeps_types_and_takes_nan_for_missing(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "text": "t", "label": 2.0, "score": 0.5, "tags": ["x"]},
        {"id": 2, "text": "u", "label": float("nan"), "score": None, "tags": []},
    ]
    first, second = read_all(write_parquet(tmp_path / "m.parquet", rows))
    assert (first.key, first.metadata) == ("1", {"label": 2, "score": 0.5, "tags": ["x"]})
    assert isinstance(first.metadata["label"], int)
    assert (second.key, second.metadata) == ("2", {"tags": []})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no such file"),
        ("m.txt", b"id", r"unknown kind of manifest '\.txt'"),
        ("m.parquet", b"id,text\n", "not Parquet"),
        ("m.csv", b'id,text\na,"open\n', "line 2: not CSV"),
        ("m.csv", b"id,text\na,\xff\n", "not UTF-8"),
    ],
)
def test_files_that_are_no_manifest(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read_all(tmp_path / name)


def test_an_empty_folder_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no image, text, sound or tar in this folder; give a manifest"):
        open_source(str(tmp_path))


def test_real_manifests_read_without_a_fault(shared_data: Path) -> None:
    for name, count in (("sound-photos", 629), ("emotion-speech", 128), ("coco-captions-mini", 105)):
        found = read_all(shared_data / name / "manifest.csv", split="train")
        assert not [fault for fault in found if isinstance(fault, RowFault)]
        assert len(found) == count
        lines = [json.loads(line) for line in (shared_data / name / "manifest.jsonl").read_text().splitlines()]
        assert [s.text for s in found] == [line["text"] for line in lines if line["split"] == "train"]

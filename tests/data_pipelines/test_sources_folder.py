"""A folder of files that share a stem: what becomes a sample, and what is named instead."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.build import build_dataset
from data_pipelines.dataset import open_dataset
from data_pipelines.errors import BadInput
from data_pipelines.shard import Sample
from data_pipelines.sources import Note, Row, RowFault, open_source
from tests.data_pipelines.tuples import encode_image, encode_sound

PNG = encode_image(np.zeros((4, 4), np.uint8))
JPEG = encode_image(np.zeros((4, 4), np.uint8), "JPEG")
FLAC = encode_sound(np.full(80, 0.1))


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read_all(folder: Path, **options: Any) -> list[Sample | RowFault]:
    source = open_source(f"files:{folder}", **options)
    return [
        row if isinstance(row, RowFault) else source.read(row)
        for row in source.rows()
        if isinstance(row, Row | RowFault)
    ]


def test_files_that_share_a_stem_are_one_sample(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "pets",
        {
            "b.JPG": JPEG,
            "b.txt": "\ufeff a dog \n",
            "b.flac": FLAC,
            "b.json": json.dumps({"label": 3}),
            "cats/v1.0/one.png": PNG,
            "cats/a.txt": "a cat",
            ".hidden/a.png": PNG,
            ".x.png": PNG,
        },
    )
    dog, cat, text = read_all(folder)
    assert dog == Sample("b", JPEG, "a dog", FLAC, {"label": 3}, "jpg", "flac")
    assert (text.key, text.image, text.text) == ("cats/v1.0/one", PNG, None)  # type: ignore[union-attr]
    assert (cat.key, cat.text, cat.image) == ("cats/a", "a cat", None)  # type: ignore[union-attr]
    out = build_dataset(folder, tmp_path / "out", progress=False)
    dataset = open_dataset(out)
    assert (dataset.name, dataset.keys(range(3))) == ("pets", ["b", "cats/a", "cats/v1.0/one"])
    assert json.loads((out / "build.json").read_text())["source"] == {"kind": "files", "folder": "pets"}


def test_what_a_key_cannot_hold_becomes_an_underscore(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.b.png": PNG, "x\\y.png": PNG, "tab\t.png": PNG})
    assert [sample.key for sample in read_all(folder)] == ["a_b", "tab_", "x_y"]
    folder = write(tmp_path, {"a_b.txt": "t"})
    fault = next(item for item in read_all(folder) if isinstance(item, RowFault))
    assert (fault.reason, fault.key) == ("duplicate", "a_b") and "would have the same key" in fault.detail


def test_other_files_are_passed_over_and_told(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a.png": PNG, "notes.md": "x", "b.md": "x", "c": "x", "lone.json": "{}"})
    notes = [item.message for item in open_source(f"files:{folder}").rows() if isinstance(item, Note)]
    assert len(notes) == 1 and ".md 2" in notes[0] and "no extension 1" in notes[0] and ".json alone 1" in notes[0]


@pytest.mark.parametrize(
    ("files", "reason", "detail"),
    [
        ({"a.png": PNG, "a.jpg": JPEG}, "duplicate", "'a.jpg' and 'a.png' share a stem"),
        ({"a.png": JPEG}, "format", "holds JPEG; rename it"),
        ({"a.png": b""}, "empty", "is empty"),
        ({"a.txt": b"\xff"}, "encoding", "not UTF-8"),
        ({"a.txt": " "}, "empty", "no image, no text and no sound"),
        ({"a.png": PNG, "a.json": "[1]"}, "json", "a JSON list"),
        ({"__x__/a.png": PNG}, "key", "cannot be a member's name"),
    ],
)
def test_bad_files_are_faults(tmp_path: Path, files: dict[str, bytes | str], reason: str, detail: str) -> None:
    source = open_source(f"files:{write(tmp_path, files)}")
    (row,) = (item for item in source.rows() if isinstance(item, Row | RowFault))
    if isinstance(row, Row):
        with pytest.raises(RowFault) as caught:
            source.read(row)
        row = caught.value
    assert row.reason == reason and detail in row.detail


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.txt": "t"})
    outside = write(tmp_path / "elsewhere", {"secret.txt": "s", "more/b.txt": "b"})
    (folder / "linked.txt").symlink_to(outside / "secret.txt")
    (folder / "more").symlink_to(outside / "more")
    found = read_all(folder)
    assert [getattr(item, "reason", None) for item in found] == [None, "path"]
    assert [item.key for item in read_all(folder, allowed=(outside,))] == ["a", "linked"]


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "t"})
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("t")
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    first, second = read_all(tmp_path)
    assert isinstance(first, Sample) and isinstance(second, RowFault) and second.reason == "key"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no image, text, sound or tar in this folder"),
        ({"notes.md": "x"}, "no image, text, sound or tar in this folder"),
        ({"manifest.csv": "id", "images/a.png": PNG}, "folder with a manifest; give .*manifest.csv, or files:"),
        ({"a.png": PNG, "b.tar": b"x"}, "both tars and loose files; give tars:.* or files:"),
    ],
)
def test_a_folder_that_is_not_clear(tmp_path: Path, files: dict[str, bytes | str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        open_source(str(write(tmp_path, files)))


def test_options_that_a_folder_does_not_have(tmp_path: Path) -> None:
    folder = str(write(tmp_path, {"a.png": PNG}))
    for option, flag in (
        ({"split": "train"}, "--split"),
        ({"columns": {"text": "t"}}, "--column"),
        ({"streaming": True}, "--streaming"),
        ({"prefix_keys": True}, "--prefix-keys"),
    ):
        with pytest.raises(BadInput, match=flag):
            open_source(folder, **option)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="not a folder"):
        open_source(f"files:{folder}/a.png")
    with pytest.raises(BadInput, match="nothing follows"):
        open_source("files:")

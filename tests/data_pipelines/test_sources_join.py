"""Sources joined by key: who says what, and what two of them say differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.build import build_dataset
from data_pipelines.dataset import open_dataset
from data_pipelines.errors import BadInput
from tests.data_pipelines.raw import write_csv, write_files, write_jsonl
from tests.data_pipelines.test_sources_tars import FLAC, PNG, write_tar


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(PNG)
    return folder


def join(first: Path, *others: Path, out: Path, **options: Any) -> Path:
    return build_dataset(first, out, join=others, workers=1, progress=False, **options)


def test_images_captions_sounds_and_licences_from_four_places(tmp_path: Path, images: Path) -> None:
    captions = write_csv(tmp_path / "captions.csv", [{"id": n, "text": f"caption {n}"} for n in (3, 1, 0, 9)])
    licences = write_jsonl(tmp_path / "l.jsonl", [{"id": str(n), "licence": "cc0", "label": n} for n in range(4)])
    tar = write_tar(tmp_path / "sounds.tar", [{"__key__": str(n), "flac": FLAC} for n in (2, 3)])
    out = join(images, captions, licences, tar, out=tmp_path / "out")
    dataset = open_dataset(out)
    assert dataset.keys(range(4)) == ["0", "1", "2", "3"]
    assert [dataset[n].text for n in range(4)] == ["caption 0", "caption 1", None, "caption 3"]
    assert [dataset[n].audio for n in range(4)] == [None, None, FLAC, FLAC]
    assert all(dataset[n].image == PNG and dataset[n].metadata == {"licence": "cc0", "label": n} for n in range(4))
    joined = json.loads((out / "build.json").read_text())["source"]["joined"]
    assert [source["kind"] for source in joined] == ["manifest", "manifest", "tars"]


def test_rows_of_no_key_are_told(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = write_csv(tmp_path / "captions.csv", [{"id": n, "text": "t"} for n in (1, "elsewhere/9")])
    build_dataset(images, tmp_path / "out", join=[captions])
    assert "1 row is of no key in" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"none of its keys \(such as 'a'\) is one of"):
        join(images, write_csv(tmp_path / "other.csv", [{"id": "a", "text": "t"}]), out=tmp_path / "no")


def test_keys_with_folders_join_a_table(tmp_path: Path, images: Path) -> None:
    (tmp_path / "tree" / "cats").mkdir(parents=True)
    (images / "0.png").rename(tmp_path / "tree" / "cats" / "0.png")
    captions = write_csv(tmp_path / "captions.csv", [{"name": "cats/0", "text": "a cat"}])
    out = join(tmp_path / "tree", captions, out=tmp_path / "out", join_columns={"id": "name"})
    assert (open_dataset(out)[0].key, open_dataset(out)[0].text) == ("cats/0", "a cat")


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"text": "a"}, {"text": "b"}, "'text'"),
        ({"text": "a", "label": 1}, {"label": 2}, "'label'"),
        ({"text": "a", "image": "images/0.png"}, {"image": "images/0.png"}, "'image'"),
    ],
)
def test_what_two_say_differently_is_refused(
    tmp_path: Path, images: Path, first: dict[str, Any], second: dict[str, Any], what: str
) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"id": "k", "same": [1], **first}, {"id": "l", "text": "t"}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"id": "k", "same": [1], **second}])
    with pytest.raises(BadInput, match=f"one.jsonl and .*two.jsonl both have {what} for the key 'k'"):
        join(one, two, out=tmp_path / "out")
    out = join(one, two, out=tmp_path / "out", on_error="skip")
    assert open_dataset(out).keys([0]) == ["l"]
    assert json.loads((out / "quarantine.jsonl").read_text())["reason"] == "conflict"


def test_what_two_say_alike_is_not(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"id": "k", "text": "a", "label": 1}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"id": "k", "text": "a", "label": 1, "speaker": "s"}])
    dataset = open_dataset(join(one, two, out=tmp_path / "out"))
    assert (dataset[0].text, dataset[0].metadata) == ("a", {"label": 1, "speaker": "s"})


def test_faults_name_the_source_they_are_in(tmp_path: Path, images: Path) -> None:
    bad = write_csv(tmp_path / "bad.csv", [{"id": 1, "text": "t"}, {"id": 1, "text": "u"}])
    with pytest.raises(BadInput, match=r"bad\.csv: the id '1' is row 1's already"):
        join(images, bad, out=tmp_path / "out")
    with pytest.raises(BadInput, match="--join-column: there is no --join"):
        build_dataset(images, tmp_path / "out", join_columns={"id": "x"}, progress=False)


@pytest.mark.timeout(300)
def test_two_workers_give_the_same_bytes(tmp_path: Path) -> None:
    records = write_files(tmp_path / "raw", 9)
    parts = {
        name: write_jsonl(
            tmp_path / "raw" / f"{name}.jsonl", [{"id": r["id"], name: r[name]} for r in records if r[name]]
        )
        for name in ("text", "image", "audio")
    }
    made = [
        build_dataset(
            parts["text"],
            tmp_path / str(n),
            join=[parts["image"], parts["audio"]],
            workers=n,
            shard_size=2,
            progress=False,
        )
        for n in (1, 2)
    ]
    one, two = (open_dataset(folder) for folder in made)
    assert one.fingerprint == two.fingerprint and one.modalities == {"image": 7, "text": 9, "audio": 7}

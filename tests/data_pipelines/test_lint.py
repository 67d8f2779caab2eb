"""Lint: every kind of finding on a dataset that really has the damage, and nothing on one that has none."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines import lint_shard
from data_pipelines.dataset import index_folder
from data_pipelines.errors import BadInput
from data_pipelines.index import ShardIndex
from data_pipelines.lint import LintReport, lint
from data_pipelines.shard import hash_shard
from tests.data_pipelines.tuples import encode_image, encode_sound

Members = list[tuple[str, bytes]]

PICTURE = encode_image(np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8))
SOUND = encode_sound(0.3 * np.sin(np.arange(400)))


def write_tar(tar: Path, members: Members) -> None:
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def indexed(tmp_path: Path, *shards: Members) -> Path:
    """A dataset of bare tars, so that dataset.json and the indexes agree with them whatever they hold."""
    for number, members in enumerate(shards):
        write_tar(tmp_path / "bare" / f"{number}.tar", members)
    index_folder(tmp_path / "bare")
    return tmp_path / "bare"


def look(folder: Path, **options: Any) -> LintReport:
    return lint(folder, workers=1, progress=False, **options)


def told(report: LintReport) -> list[tuple[str, str | None, str | None]]:
    return [(finding.kind, finding.key, finding.member) for finding in report.findings]


def edit_dataset_file(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "dataset.json"
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))


def one(key: str, text: str = "a text") -> Members:
    return [(f"{key}.png", PICTURE), (f"{key}.txt", text.encode()), (f"{key}.flac", SOUND)]


def test_a_whole_dataset_is_clean(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(4, 3))
    report = look(folder, require=("image", "text", "audio"))
    assert report.clean and report.findings == [] and report.counts == {}
    assert (report.num_shards, report.num_samples, report.fast) == (2, 7, False)
    assert report.bytes == sum(tar.stat().st_size for tar in (folder / "shards").iterdir())
    assert look(folder, fast=True).clean


def test_a_tar_that_grew_has_another_size(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(3,))
    with open(folder / "shards/dataset-000000.tar", "ab") as file:
        file.write(bytes(512))
    report = look(folder)
    assert told(report) == [("size", None, None)]
    assert report.findings[0].shard == "shards/dataset-000000.tar"


def test_a_flipped_bit_is_found_by_the_hash(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(3,))
    tar = folder / "shards/dataset-000000.tar"
    data = tar.read_bytes()
    place = data.index(b"the number 1")
    tar.write_bytes(data[:place] + b"T" + data[place + 1 :])
    assert told(look(folder)) == [("sha256", None, None)]


def test_a_cut_tar_says_which_samples_are_gone(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(4,))
    tar = folder / "shards/dataset-000000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(b"sample-00002.json") + 512])
    report = look(folder)
    assert report.num_samples == 2
    assert set(report.counts) == {"dataset", "size", "damage", "index"}
    assert ("damage", "sample-00002", "sample-00002.json") in told(report)
    assert [key for kind, key, _ in told(report) if kind == "index"] == ["sample-00002", "sample-00003"]
    assert {finding.detail for finding in report.findings if finding.kind == "dataset"} >= {
        "2 whole samples, but dataset.json says 4",
        "2 samples have image, but dataset.json says 4",
    }


def test_a_tar_that_is_gone(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(2, 2))
    (folder / "shards/dataset-000001.tar").unlink()
    report = look(folder)
    assert told(report) == [("missing", None, None)]
    assert (report.findings[0].shard, report.num_samples) == ("shards/dataset-000001.tar", 2)


def test_a_gzip_called_tar(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(2,))
    tar = folder / "shards/dataset-000000.tar"
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    report = look(folder)
    assert told(report) == [("tar", None, None)]
    assert "gzip" in report.findings[0].detail


def test_a_bad_header_and_the_sample_that_it_costs(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(3,))
    tar = folder / "shards/dataset-000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"sample-00001.png") + 100] ^= 1
    tar.write_bytes(data)
    report = look(folder)
    assert ("damage", "sample-00001", "sample-00001.png") in told(report)
    assert ("index", "sample-00001", None) in told(report)
    assert report.counts["sha256"] == 1 and report.num_samples == 2


def test_a_link_in_a_tar_is_damage(tmp_path: Path) -> None:
    write_tar(tmp_path / "bare/0.tar", one("a"))
    with tarfile.open(tmp_path / "bare/0.tar", "a") as file:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    index_folder(tmp_path / "bare")
    assert told(look(tmp_path / "bare")) == [("damage", "b", "b.png")]


def test_an_index_that_is_gone_or_is_none(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(2, 2))
    (folder / "index/dataset-000000.arrow").unlink()
    (folder / "index/dataset-000001.arrow").write_bytes(b"no index")
    report = look(folder)
    assert told(report) == [("index", None, None)] * 2
    assert "is missing" in report.findings[0].detail and "not an index" in report.findings[1].detail


def test_an_index_with_another_offset_or_without_a_sample(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(3, 3))
    for number in (0, 1):
        path = folder / f"index/dataset-{number:06d}.arrow"
        hashed = hash_shard(folder / f"shards/dataset-{number:06d}.tar")
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        if number == 0:
            offsets = table.column("text_offset").to_pylist()
            offsets[1] += 512
            place = table.schema.get_field_index("text_offset")
            table = table.set_column(place, table.schema.field(place), pa.array(offsets))
        else:
            table = table.slice(0, 2)
        path.unlink()
        ShardIndex(table).save(path, *hashed)
    report = look(folder)
    assert told(report) == [("index", "sample-00001", None), ("index", "sample-00005", None)]
    assert "text_offset is " in report.findings[0].detail
    assert report.findings[1].detail == "in the tar, but not in the index"


def test_an_index_of_another_tar(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(2,))
    path = folder / "index/dataset-000000.arrow"
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    path.unlink()
    ShardIndex(table).save(path, 10240, "0" * 64)
    assert told(look(folder)) == [("index", None, None)]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda content: content.update(num_samples=7), "num_samples is 7, but the shards make 4"),
        (lambda content: content.update(fingerprint="0" * 64), "fingerprint is '0000"),
        (lambda content: content["modalities"].update(image=3), "modalities is {'image': 3"),
        (lambda content: content["shards"].append(content["shards"][0]), "shards.2: 'shards/dataset-000000.tar' is"),
        (lambda content: content["shards"][1].update(sha256="abc"), "shards.1.sha256: String should match pattern"),
        (lambda content: content["shards"][1].update(path="../x.tar"), "shards.1: '../x.tar' or 'index/dataset-000001"),
        (lambda content: content["shards"][1].update(path="x\0.tar"), r"shards.1: 'x\x00.tar' or "),
    ],
)
def test_a_dataset_file_that_was_edited(
    make_dataset: Callable[..., Path], change: Callable[[dict[str, Any]], object], detail: str
) -> None:
    folder = make_dataset(sizes=(2, 2))
    edit_dataset_file(folder, change)
    report = look(folder)
    about_file = [finding.detail for finding in report.findings if finding.shard == "dataset.json"]
    assert len(about_file) == 1 and about_file[0].startswith(detail)
    assert set(report.counts) <= {"dataset", "unlisted"}


def test_a_dataset_file_that_counts_a_shard_wrongly(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(2,))
    edit_dataset_file(folder, lambda content: content["shards"][0]["modalities"].update(audio=1))
    edit_dataset_file(folder, lambda content: content["modalities"].update(audio=1))
    report = look(folder)
    assert [finding.detail for finding in report.findings] == ["2 samples have audio, but dataset.json says 1"]


def test_a_tar_that_nobody_names(make_dataset: Callable[..., Path]) -> None:
    folder = make_dataset(sizes=(2,))
    shutil.copy(folder / "shards/dataset-000000.tar", folder / "shards/copy.tar")
    report = look(folder)
    assert [(finding.kind, finding.shard) for finding in report.findings] == [("unlisted", "shards/copy.tar")]


def test_interleaved_keys(tmp_path: Path) -> None:
    a, b = one("a"), one("b")
    report = look(indexed(tmp_path, [a[0], b[0], *a[1:], *b[1:]]))
    assert report.counts["interleaved"] == 2
    assert [finding.detail for finding in report.findings if finding.kind == "interleaved"] == [
        "png and txt+flac lie apart, with other samples between"
    ] * 2


def test_a_key_twice_in_a_shard(tmp_path: Path) -> None:
    report = look(indexed(tmp_path, [*one("a"), *one("b"), *one("a")]))
    assert told(report) == [("duplicate-key", "a", None)]


def test_a_key_in_two_shards(tmp_path: Path) -> None:
    folder = indexed(tmp_path, [*one("a"), *one("b")], one("c"), [*one("d"), *one("b")])
    report = look(folder, fast=True)
    assert [(finding.shard, *told) for finding, told in zip(report.findings, told(report), strict=True)] == [
        ("2.tar", "duplicate-key", "b", None)
    ]
    assert report.findings[0].detail == "0.tar has it too"


def test_a_member_twice(tmp_path: Path) -> None:
    report = look(indexed(tmp_path, [*one("a"), *one("b"), ("b.txt", b"again"), *one("c")]))
    assert told(report) == [("duplicate-member", "b", "b.txt")]


def test_two_pictures_in_one_sample(tmp_path: Path) -> None:
    report = look(indexed(tmp_path, [*one("a"), ("a.jpg", PICTURE)]))
    assert told(report) == [("ambiguous", "a", None)]
    assert report.findings[0].detail == "jpg and png; jpg is read"


def test_a_sample_of_metadata_alone(tmp_path: Path) -> None:
    report = look(indexed(tmp_path, [*one("a"), ("b.json", b"{}")]))
    assert told(report) == [("incomplete", "b", None)]


def test_a_sample_without_what_is_required(tmp_path: Path) -> None:
    folder = indexed(tmp_path, [*one("a"), *one("b")[:2], ("c.png", PICTURE), ("c.txt", b"")])
    assert told(look(folder, fast=True)) == [("empty-text", "c", "c.txt")]
    required = look(folder, fast=True, require=("text", "audio"))
    assert [(f.key, f.detail) for f in required.findings if f.kind == "incomplete"] == [
        ("c", "has no text"),
        ("b", "has no audio"),
        ("c", "has no audio"),
    ]


@pytest.mark.parametrize("text", ["", " \n\t", "\ufeff"])
def test_an_empty_text(tmp_path: Path, text: str) -> None:
    assert told(look(indexed(tmp_path, one("a", text)))) == [("empty-text", "a", "a.txt")]


@pytest.mark.parametrize(
    ("member", "data", "reason", "found_fast"),
    [
        ("b.png", PICTURE[: len(PICTURE) // 2], "decode:", False),
        ("b.png", b"GIF89a" + bytes(60), "format:", False),
        ("b.flac", SOUND[: len(SOUND) // 2], "", False),
        ("b.flac", b"no sound at all", "decode:", False),
        ("b.txt", b"caf\xe9", "encoding: not UTF-8 at byte 3", True),
        ("b.json", b"{", "json:", True),
    ],
    ids=["cut picture", "gif", "cut sound", "no sound", "not utf-8", "no json"],
)
def test_a_member_that_does_not_decode(tmp_path: Path, member: str, data: bytes, reason: str, found_fast: bool) -> None:
    rest = [(name, content) for name, content in one("b") if name != member]
    folder = indexed(tmp_path, [*one("a"), *rest, (member, data)])
    report = look(folder)
    assert told(report) == [("undecodable", "b", member)]
    assert report.findings[0].detail.startswith(reason)
    assert look(folder, fast=True).clean is not found_fast


def test_a_silent_sound(tmp_path: Path) -> None:
    silent = [("b.png", PICTURE), ("b.flac", encode_sound(np.zeros(800)))]
    folder = indexed(tmp_path, [*one("a"), *silent])
    report = look(folder)
    assert told(report) == [("silent", "b", "b.flac")]
    assert report.findings[0].detail.endswith("in 0.10 s")
    assert look(folder, fast=True).clean


def test_member_names_are_the_tars_own(tmp_path: Path) -> None:
    report = look(indexed(tmp_path, [("x/b.PNG", b"no picture"), ("x/b.TXT", b"a text")]))
    assert told(report) == [("undecodable", "x/b", "x/b.PNG")]


@pytest.mark.timeout(120)
def test_several_workers_find_the_same(tmp_path: Path) -> None:
    shards = [[*one(f"a{number}"), *one("same"), *one(f"b{number}", " ")] for number in range(4)]
    folder = indexed(tmp_path, *shards)
    (folder / "2.tar").write_bytes((folder / "2.tar").read_bytes()[:1024])
    alone = look(folder)
    assert alone.counts == {"dataset": 4, "size": 1, "damage": 1, "index": 3, "duplicate-key": 2, "empty-text": 3}
    together = lint(folder, workers=2, progress=False)
    assert together == alone


def test_what_is_wrong_often_is_counted_and_told_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint_shard, "_MOST_A_KIND", 3)
    report = look(indexed(tmp_path, [member for number in range(5) for member in one(f"k{number}", " ")]))
    assert report.counts == {"empty-text": 5} and len(report.findings) == 3
    assert json.loads(json.dumps(report.as_json()))["clean"] is False


def test_what_is_no_dataset_is_bad_input(tmp_path: Path, make_dataset: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match="no such dataset folder"):
        lint(tmp_path / "none")
    with pytest.raises(BadInput, match=r"no dataset.json in it; make one of tars with `triptych data index`"):
        lint(tmp_path)
    folder = make_dataset(sizes=(1,))
    with pytest.raises(BadInput, match="--require picture: give one of image, text, audio"):
        lint(folder, require=("picture",))
    for content, message in (
        (b"{", "cannot be read"),
        (b"[]", "not one of ours"),
        (b'{"shards": []}', "format_version"),
    ):
        (folder / "dataset.json").write_bytes(content)
        with pytest.raises(BadInput, match=message):
            lint(folder)

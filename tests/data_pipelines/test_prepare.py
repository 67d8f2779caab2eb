"""What a build leaves out, cleans and writes anew: counted, planned once, and the same bytes however it is run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from pydantic import ValidationError

from data_pipelines.build import build_configured, build_dataset
from data_pipelines.config import BuildConfig, PrepareConfig
from data_pipelines.dataset import open_dataset
from data_pipelines.errors import BadInput
from tests.data_pipelines.raw import Record, write_csv, write_files, write_jsonl
from tests.data_pipelines.tuples import encode_image, encode_sound


def build(source: Path, out: Path, prepare: dict[str, Any] | None = None, **options: Any) -> Path:
    settings: dict[str, Any] = {"shard_size": 4, "workers": 1, "progress": False, **options}
    return build_dataset(source, out, prepare=PrepareConfig(**(prepare or {})), **settings)


def keys(folder: Path) -> list[str]:
    dataset = open_dataset(folder)
    return dataset.keys(range(len(dataset)))


def record(folder: Path) -> Any:
    return json.loads((folder / "build.json").read_text())


def test_rows_are_kept_by_field_and_by_member(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Record] = [
        {"id": "a", "text": "t", "language": "en", "licence": "cc0"},
        {"id": "b", "text": "t", "language": "fr", "licence": "cc0"},
        {"id": "c", "text": "t", "language": ["xx", "de"], "licence": "cc-by"},
        {"id": "d", "text": "t", "licence": "cc0"},
        {"id": "e", "text": "t", "language": "en", "licence": "all rights reserved"},
        {"id": "f", "text": "t", "language": "en", "licence": 3},
    ]
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    prepare = {"keep": {"language": ["en", "de"], "licence": ["cc0", "cc-by", "3"]}}
    out = build(manifest, tmp_path / "out", prepare, progress=True)
    assert keys(out) == ["a", "c", "f"]
    assert record(out)["dropped"] == {"keep.language": 2, "keep.licence": 1}
    assert record(out)["source"]["prepare"] == prepare
    assert "3 rows left out (2 keep.language, 1 keep.licence)" in capsys.readouterr().err
    assert not (out / "quarantine.jsonl").exists()
    with pytest.raises(BadInput, match=r"no row gives a sample; 6 rows left out \(6 require.image\)"):
        build(manifest, tmp_path / "none", {"require": ["image"]})
    assert not (tmp_path / "none").exists()


def test_values_are_kept_as_they_are_written(tmp_path: Path) -> None:
    rows: list[Record] = [
        {"id": "a", "text": "t", "safe": True, "year": 2020.0},
        {"id": "b", "text": "t", "safe": False, "year": 2020.5},
    ]
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    for keep in ({"safe": ["true"]}, {"year": ["2020"]}):
        assert keys(build(manifest, tmp_path / next(iter(keep)), {"keep": keep})) == ["a"]


def test_a_text_that_cleaning_made_too_long_is_a_fault(tmp_path: Path) -> None:
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"id": "a", "text": "\u0958" * 300_000}, {"id": "b", "text": "t"}])
    with pytest.raises(BadInput, match=r"id 'a'\): text has 1800000 bytes; the limit is 1000000"):
        build(manifest, tmp_path / "out", {"clean_text": True})
    assert keys(build(manifest, tmp_path / "out", {"clean_text": True}, on_error="skip")) == ["b"]


def test_small_images_and_long_sounds_go(tmp_path: Path) -> None:
    rows: list[Record] = []
    for number, (height, width, seconds) in enumerate([(20, 30, 1), (19, 90, 1), (20, 20, 3), (64, 64, 2)]):
        (tmp_path / f"{number}.png").write_bytes(encode_image(np.zeros((height, width), np.uint8)))
        (tmp_path / f"{number}.wav").write_bytes(encode_sound(np.zeros(1000 * seconds), 1000, "WAV"))
        rows.append({"id": number, "image": f"{number}.png", "audio": f"{number}.wav", "text": "t"})
    rows.append({"id": "none", "image": "", "audio": "", "text": "t"})
    out = build(write_csv(tmp_path / "m.csv", rows), tmp_path / "out", {"min_image_side": 20, "max_seconds": 2})
    assert keys(out) == ["0", "3", "none"]
    assert record(out)["dropped"] == {"max_seconds": 1, "min_image_side": 1}


def test_texts_are_cleaned_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"a": "clean", "b": "two  lines\nhere", "c": "\u200b", "d": "<b>bold</b> &amp; cafe\u0301"}
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"id": key, "text": text} for key, text in texts.items()])
    plain = open_dataset(build(manifest, tmp_path / "plain", {"clean_text": True}, progress=True))
    assert [plain[n].text for n in range(3)] == ["clean", "two lines here", "<b>bold</b> &amp; café"]
    assert record(plain.path)["changed"] == {"text": 3} and record(plain.path)["dropped"] == {"empty_text": 1}
    assert "3 texts cleaned" in capsys.readouterr().err
    assert plain.reencoded == ("text",)
    html = open_dataset(build(manifest, tmp_path / "html", {"strip_html": True}))
    assert html[2].text == "bold & café"


def test_exact_duplicates_go_and_the_first_stays(tmp_path: Path) -> None:
    one, two = (encode_image(np.full((4, 4), value, np.uint8)) for value in (0, 200))
    for name, data in (("a", one), ("b", two), ("c", one), ("d", one)):
        (tmp_path / f"{name}.png").write_bytes(data)
    rows: list[Record] = [
        {"id": "a", "image": "a.png", "text": "x"},
        {"id": "b", "image": "b.png", "text": "x"},
        {"id": "c", "image": "c.png", "text": "y"},
        {"id": "d", "image": "d.png", "text": "x"},
        {"id": "e", "image": "", "text": "x"},
        {"id": "f", "image": "", "text": " x "},
    ]
    manifest = write_csv(tmp_path / "m.csv", rows)
    for dedup, kept, dropped in (
        (["image"], "abef", {"dedup.image": 2}),
        (["text"], "ac", {"dedup.text": 4}),
        (["image+text"], "abce", {"dedup.image+text": 2}),
        (["image", "text"], "a", {"dedup.image": 2, "dedup.text": 3}),
    ):
        out = build(manifest, tmp_path / "-".join(dedup), {"dedup": dedup})
        assert ("".join(keys(out)), record(out)["dropped"]) == (kept, dropped)


def test_images_that_look_alike_go(tmp_path: Path) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    first, other = (Image.fromarray(pixels).resize((60, 60), Image.Resampling.BICUBIC) for pixels in coarse)
    first.save(tmp_path / "a.png")
    first.resize((40, 40)).save(tmp_path / "b.jpg", quality=80)
    other.save(tmp_path / "c.png")
    out = build(tmp_path, tmp_path.parent / "near", {"dedup_images": 4})
    assert (keys(out), record(out)["dropped"]) == (["a", "c"], {"dedup_images": 1})
    data = (tmp_path / "c.png").read_bytes()
    (tmp_path / "c.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match=r"row 3 \(id 'c'\): image: PNG does not decode"):
        build(tmp_path, tmp_path.parent / "bad", {"dedup_images": 4})
    out = build(tmp_path, tmp_path.parent / "bad", {"dedup_images": 4}, on_error="skip")
    assert keys(out) == ["a"] and json.loads((out / "quarantine.jsonl").read_text())["reason"] == "decode"


ALL = {"audio_rate": 16_000, "image_side": 8, "image_format": "jpeg", "clean_text": True, "dedup": ["image"]}


def test_members_are_written_anew(tmp_path: Path) -> None:
    manifest = write_csv(tmp_path / "raw" / "m.csv", write_files(tmp_path / "raw", 9))
    out = build(manifest, tmp_path / "out", ALL)
    dataset = open_dataset(out)
    assert set(dataset.reencoded) == {"image", "audio", "text"}
    for number in range(9):
        sample = dataset[number]
        if sample.image is not None:
            image = Image.open(io.BytesIO(sample.image))
            assert (image.format, image.size, sample.image_extension) == ("JPEG", (8, 6), "jpg")
        if sample.audio is not None:
            info = soundfile.info(io.BytesIO(sample.audio))
            assert (info.samplerate, info.channels, sample.audio_extension) == (16_000, 1, "flac")
    assert record(out)["reencoded"]["audio"] == {"format": "flac", "sampling_rate": 16_000}
    assert "libsndfile" in record(out)["written_with"]
    texts = write_csv(tmp_path / "texts.csv", [{"id": 1, "text": "t"}])
    assert open_dataset(build(texts, tmp_path / "texts", {"audio_rate": 16_000})).reencoded == ()


@pytest.mark.timeout(300)
def test_any_number_of_workers_and_any_retry_give_the_same_bytes(tmp_path: Path) -> None:
    manifest = write_csv(tmp_path / "raw" / "m.csv", write_files(tmp_path / "raw", 12))
    one = build(manifest, tmp_path / "one", ALL)
    two = build(manifest, tmp_path / "two", ALL, workers=2)
    contents = {path.relative_to(one): path.read_bytes() for path in one.rglob("*") if path.is_file()}
    assert {path.relative_to(two): path.read_bytes() for path in two.rglob("*") if path.is_file()} == contents
    (two / "dataset.json").unlink()
    (two / "index" / "m-000001.arrow").unlink()
    build(manifest, two, ALL)
    assert {path.relative_to(two): path.read_bytes() for path in two.rglob("*") if path.is_file()} == contents


def test_settings_that_change_bytes_are_in_the_plan(tmp_path: Path) -> None:
    manifest = write_csv(tmp_path / "raw" / "m.csv", write_files(tmp_path / "raw", 6))
    out = build(manifest, tmp_path / "out", {"image_side": 8})
    before = record(out)["plan_sha256"]
    build(manifest, out, {"image_side": 8})
    for other in ({"image_side": 9}, {}, {"image_side": 8, "require": ["image"]}):
        with pytest.raises(BadInput, match="made of other rows, or with another name"):
            build(manifest, out, other)
    # A rule that leaves out nothing changes nothing.
    build(manifest, out, {"image_side": 8, "min_image_side": 2})
    assert record(out)["plan_sha256"] == before


def test_a_build_does_not_go_on_with_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_csv(tmp_path / "raw" / "m.csv", write_files(tmp_path / "raw", 9))
    out = build(manifest, tmp_path / "out", {"image_side": 8})
    index = next((out / "index").iterdir())
    versions = {**record(out)["written_with"], "pillow": "1.0"}
    monkeypatch.setattr("data_pipelines.build.library_versions", lambda: versions)
    # A finished one is left as it is.
    build(manifest, out, {"image_side": 8})
    index.unlink()
    with pytest.raises(BadInput, match=r"begun with pillow \S+, and here is 1\.0"):
        build(manifest, out, {"image_side": 8})


def test_a_member_that_cannot_be_written_anew_is_a_fault(tmp_path: Path) -> None:
    records = write_files(tmp_path / "raw", 4)
    damaged = tmp_path / "raw" / "images" / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    manifest = write_csv(tmp_path / "raw" / "m.csv", records)
    assert len(keys(build(manifest, tmp_path / "verbatim"))) == 4
    with pytest.raises(BadInput, match=r"id 'row-002'\): image: PNG does not decode"):
        build(manifest, tmp_path / "out", {"image_side": 8})
    out = build(manifest, tmp_path / "out", {"image_side": 8}, on_error="skip")
    assert keys(out) == ["row-000", "row-001", "row-003"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"dedup": ["images"]},
        {"dedup": ["image+image"]},
        {"dedup_images": 65},
        {"min_image_side": 0},
        {"max_seconds": 0},
        {"audio_rate": 10},
        {"audio_rate": 88_201},
        {"image_format": "gif"},
        {"require": ["video"]},
        {"unknown": 1},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PrepareConfig(**wrong)


def test_an_entry_of_a_config_is_built(tmp_path: Path) -> None:
    manifest = write_csv(tmp_path / "raw" / "m.csv", write_files(tmp_path / "raw", 6))
    extra = write_csv(tmp_path / "extra.csv", [{"key": "row-001", "licence": "cc0"}])
    wanted = BuildConfig(
        source=str(manifest),
        out=str(tmp_path / "out"),
        split="train",
        join=[str(extra)],
        join_columns={"id": "key"},
        prepare=PrepareConfig(keep={"licence": ["cc0"]}),
    )
    assert keys(build_configured(wanted)) == ["row-001"]


def test_real_data(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "sound-photos" / "manifest.jsonl"
    prepare = {"dedup": ["image+audio"], "dedup_images": 2, "image_side": 64, "audio_rate": 8000, "max_seconds": 4}
    rows = [json.loads(line) for line in (source.parent / "manifest.jsonl").read_text().splitlines()[:40]]
    for row in rows:
        row |= {member: row[member] and str(source.parent / row[member]) for member in ("image", "audio")}
    out = build(write_jsonl(tmp_path / "part.jsonl", rows), tmp_path / "out", prepare, allow=[source.parent])
    dataset = open_dataset(out)
    assert len(dataset) + sum(record(out).get("dropped", {}).values()) == 40
    images = [sample.image for sample in (dataset[n] for n in range(len(dataset))) if sample.image]
    assert images and all(max(Image.open(io.BytesIO(data)).size) <= 64 for data in images)

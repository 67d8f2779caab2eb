"""`triptych data build` from other sources and with rows left out: what it prints, and that mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from data_pipelines.dataset import open_dataset
from launch.data_commands import app
from tests.data_pipelines.raw import write_jsonl
from tests.data_pipelines.tuples import encode_image, encode_sound


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (12 + 4 * number, 20), dtype=np.uint8)
        (folder / f"{number}.png").write_bytes(encode_image(pixels))
        (folder / f"{number}.wav").write_bytes(encode_sound(np.zeros(4000 * (number + 1)), sound_format="WAV"))
    (folder / "5.png").write_bytes((folder / "4.png").read_bytes())
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    languages = ("en", "de", "en", "fr", "en", "en")
    rows: list[dict[str, Any]] = [
        {"name": str(number), "caption": f"<i>number</i>  {number}", "language": language}
        for number, language in enumerate(languages)
    ]
    return write_jsonl(tmp_path / "table.jsonl", rows)


def test_a_folder_joined_filtered_and_written_anew(tmp_path: Path, folder: Path, table: Path) -> None:
    options: list[object] = ["--join", table, "--join-column", "id=name", "--join-column", "text=caption"]
    options += ["--keep", "language=en,de", "--min-image-side", 14, "--max-seconds", 2, "--dedup", "image"]
    options += ["--dedup-images", 0, "--strip-html", "--require", "text", "--audio-rate", 16000, "--image-side", 16]
    options += ["--image-format", "png", "--workers", 1]
    result = run("build", folder, "--out", tmp_path / "out", *options, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    # 0 is too small, 3 is French, 4 is too long, and 5 was never seen before, for 4 has gone.
    assert summary["dropped"] == {"keep.language": 1, "max_seconds": 1, "min_image_side": 1}
    assert "3 rows left out" in result.stderr and "6 texts cleaned" in result.stderr
    dataset = open_dataset(tmp_path / "out")
    assert dataset.keys(range(3)) == ["1", "2", "5"]
    assert dataset[0].text == "number 1" and dataset[0].audio_extension == "flac"
    assert set(dataset.reencoded) == {"image", "text", "audio"}
    again = run("build", folder, "--out", tmp_path / "out", *options)
    assert again.exit_code == 0 and "already built" in again.stderr


def test_tars_and_repeated_keys(tmp_path: Path, folder: Path) -> None:
    for name in ("a", "b"):
        assert run("build", folder, "--out", tmp_path / name, "--name", name, "--workers", 1).exit_code == 0
        (tmp_path / name / "shards" / f"{name}-000000.tar").rename(tmp_path / f"{name}.tar")
    tars = f"{tmp_path}/{{a,b}}.tar"
    refused = run("build", tars, "--out", tmp_path / "out")
    assert refused.exit_code == 2 and "--prefix-keys" in refused.stderr
    result = run("build", tars, "--out", tmp_path / "out", "--prefix-keys", "--json", "--workers", 1)
    assert json.loads(result.stdout)["num_samples"] == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep", "language"], "give FIELD=VALUE"),
        (["--join-column", "x"], "--join-column x: give OURS=THEIRS"),
        (["--join-column", "id=x"], "there is no --join"),
        (["--join", "none.csv"], "none.csv: no such file"),
        (["--split", "train"], "has no splits: leave out --split"),
        (["--column", "text=t"], "leave out --column"),
        (["--streaming"], "--streaming is for Hugging Face datasets"),
        (["--prefix-keys"], "--prefix-keys is for tars"),
        (["--dedup", "pictures"], "dedup: "),
        (["--dedup-images", 70], "dedup_images: "),
        (["--image-format", "gif"], "image_format: "),
        (["--require", "video"], "require.0: "),
        (["--max-seconds", 0], "max_seconds: "),
        (["--audio-rate", 5], "audio_rate: "),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, folder: Path, options: list[object], words: str) -> None:
    result = run("build", folder, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2 and words in result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()

"""`triptych data`: what it prints where, and the status that it ends with."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from data_pipelines.dataset import open_dataset
from launch.data_commands import app
from tests.data_pipelines.raw import Record, write_csv, write_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return write_files(tmp_path / "raw", 12)


@pytest.fixture
def manifest(tmp_path: Path, records: list[Record]) -> Path:
    return write_csv(tmp_path / "raw" / "manifest.csv", records)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_for_real(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from launch.data_commands import app; app()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("command", ["build", "index", "info"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"triptych data {command} " in result.output.split("Example")[1]


def test_build_index_info_as_processes(tmp_path: Path, manifest: Path) -> None:
    out = tmp_path / "out"
    built = run_for_real("build", manifest, "--out", out, "--split", "train", "--shard-size", 4, "--json")
    assert (built.returncode, built.stderr.splitlines()[-1]) == (0, f"{out}: 9 samples in 3 shards")
    summary = json.loads(built.stdout)
    assert summary == {
        "path": str(out),
        "name": "raw-train",
        "num_samples": 9,
        "num_shards": 3,
        "modalities": open_dataset(out).modalities,
        "fingerprint": open_dataset(out).fingerprint,
        "quarantined": 0,
        "dropped": {},
    }

    again = run_for_real("build", manifest, "--out", out, "--split", "train", "--shard-size", 4)
    assert (again.returncode, again.stdout) == (0, "")
    assert again.stderr == f"{out}: already built (9 samples, 3 shards)\n"

    bare = tmp_path / "bare"
    (out / "shards").rename(bare)
    indexed = run("index", bare, "--json")
    assert indexed.exit_code == 0
    assert json.loads(indexed.stdout)["fingerprint"] == summary["fingerprint"]

    info = run_for_real("info", bare, "--json")
    assert (info.returncode, info.stderr) == (0, "")
    assert json.loads(info.stdout)["num_samples"] == 9


def test_info_counts_what_is_there(tmp_path: Path, manifest: Path, records: list[Record]) -> None:
    out = tmp_path / "out"
    assert run("build", manifest, "--out", out, "--workers", 1).exit_code == 0
    told: dict[str, Any] = json.loads(run("info", out, "--json").stdout)
    assert told["combinations"] == {"image+text+audio": 7, "text+audio": 3, "image+text": 2}
    assert told["modalities"] == {"image": 9, "text": 12, "audio": 10}
    assert told["labels"] == {"ant": 4, "bee": 4, "cat": 4}
    assert told["speakers"] == {"speaker 0": 5, "speaker 1": 5}
    assert (told["image_width"]["min"], told["image_width"]["max"], told["image_height"]["median"]) == (16, 16, 12)
    assert told["audio_seconds"]["total"] == pytest.approx(1.0)
    texts = [len(record["text"].encode()) for record in records]
    assert told["text_bytes"]["total"] == sum(texts)
    assert sum(told["text_bytes"]["histogram"]["counts"]) == 12
    assert (told["name"], told["num_shards"], told["quarantined"]) == ("raw", 1, 0)
    assert told["built_from"]["manifest"] == "manifest.csv"

    shown = run("info", out)
    assert shown.exit_code == 0
    for words in ("raw (from manifest.csv)", "image+text+audio  7", "3 labels: ant 4, bee 4, cat 4", "2 speakers"):
        assert words in shown.output


def test_column_allow_name_and_skip(tmp_path: Path, records: list[Record]) -> None:
    rows = [
        {"key": record["id"], "picture": tmp_path / "raw" / record["image"] if record["image"] else None, "text": "t"}
        for record in records
    ]
    rows[3]["picture"] = "gone.png"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    manifest = write_csv(elsewhere / "rows.csv", rows)
    options = ["--column", "id=key", "--column", "image=picture", "--name", "mine", "--workers", 1]
    options += ["--allow", tmp_path / "raw", "--on-error", "skip"]
    result = run("build", manifest, "--out", tmp_path / "out", *options, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quarantined"] == 1
    assert "1 bad row is in" in result.stderr
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.name, len(dataset), dataset.modalities["image"]) == ("mine", 11, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "none.csv", "--out", "{out}"], "none.csv: no such file; give a manifest"),
        (["build", "{manifest}", "--out", "{raw}"], "raw: the folder holds other files (images, ...)"),
        (["build", "{manifest}", "--out", "{out}", "--split", "val"], "no split 'val'; the splits are 'test'"),
        (["build", "{manifest}", "--out", "{out}", "--column", "image"], "--column image: give OURS=THEIRS"),
        (["build", "{manifest}", "--out", "{out}", "--column", "image=x"], "no column 'x'; found: id, split"),
        (["build", "{manifest}", "--out", "{out}", "--column", "a=id", "--column", "a=text"], "'a' was given 'id'"),
        (["build", "{manifest}", "--out", "{out}", "--name", "a/b"], "name 'a/b'"),
        (["build", "digit", "--out", "{out}"], "digit: no such file"),
        (["build", "digits", "--out", "{out}", "--split", "val"], "digits: no split 'val'"),
        (["index", "{out}"], "out: not a folder"),
        (["index", "{raw}"], "raw: no .tar file in it"),
        (["build", "a" * 300, "--out", "{out}"], "File name too long"),
        (["build", "files:{raw}", "--out", "{raw}/new"], "raw/new: lies within the source"),
        (["build", "{manifest}", "--out", "{out}/a/b", "--column", "image=label"], "is none of .jpg"),
        (["build", "{manifest}", "--out", "{out}\udce9"], r"out\udce9: the name of this file or folder is not UTF-8"),
        (["info", "{raw}"], "raw: no dataset.json in it; make one with `triptych data build`"),
        (["info", "{out}"], "out: no such dataset folder"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    tmp_path: Path, manifest: Path, arguments: list[str], message: str
) -> None:
    places = {"out": tmp_path / "out", "raw": tmp_path / "raw", "manifest": manifest}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "{manifest}"],
        ["build", "{manifest}", "--out", "{out}", "--shard-size", "0"],
        ["build", "{manifest}", "--out", "{out}", "--workers", "many"],
        ["build", "{manifest}", "--out", "{out}", "--on-error", "ignore"],
        ["build", "{manifest}", "--out", "{out}", "--wrokers", "2"],
    ],
)
def test_wrong_options_have_status_two(tmp_path: Path, manifest: Path, arguments: list[str]) -> None:
    result = run(*(argument.format(out=tmp_path / "out", manifest=manifest) for argument in arguments))
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_bad_row_is_one_line_on_standard_error(tmp_path: Path, manifest: Path) -> None:
    (tmp_path / "raw" / "images" / "7.png").unlink()
    done = run_for_real("build", manifest, "--out", tmp_path / "out", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"error: .*manifest.csv: row 8 \(line 9, id 'row-007'\): image file .* does not exist", last)
    assert "Traceback" not in done.stderr


def test_a_damaged_tar_keeps_its_whole_samples(tmp_path: Path, manifest: Path) -> None:
    out = tmp_path / "out"
    assert run("build", manifest, "--out", out, "--workers", 1).exit_code == 0
    bare = tmp_path / "bare"
    (out / "shards").rename(bare)
    [tar] = bare.glob("*.tar")
    with open(tar, "r+b") as file:
        file.truncate(tar.stat().st_size // 2)
    result = run("index", bare)
    assert result.exit_code == 0
    assert "quarantined: manifest-000000.tar: " in result.stderr
    assert 0 < len(open_dataset(bare)) < 12


def test_info_ends_quietly_when_its_reader_goes(tmp_path: Path, manifest: Path) -> None:
    out = tmp_path / "out"
    assert run("build", manifest, "--out", out, "--workers", 1).exit_code == 0
    reading, writing = os.pipe()
    os.close(reading)
    code = f"from launch.data_commands import app; app(['info', {str(out)!r}, '--json'])"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "cpu"], "need --engine slurm"),
        (["--cpus", "1"], "need --engine slurm"),
        (["--no-wait"], "need --engine slurm"),
        (["--engine", "slurm", "--workers", "2"], "--workers is for --engine local"),
        (["--engine", "slurm", "--sbatch", "qos=a", "--sbatch", "--qos=b"], "'qos' was given 'a' already"),
        (["--engine", "slurm", "--sbatch", "array=0-3"], "set by the build itself"),
    ],
)
def test_options_of_the_wrong_engine_are_refused(
    tmp_path: Path, manifest: Path, options: list[str], message: str
) -> None:
    result = run("build", manifest, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "out").exists()


def test_names_from_elsewhere_cannot_steer_the_terminal(tmp_path: Path) -> None:
    hostile = "b\x1b]0;taken\x07"
    manifest = write_csv(tmp_path / "m.csv", [{"id": "a", "image": f"{hostile}.png"}])
    built = run("build", manifest, "--out", tmp_path / "out")
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        for name in ("a.txt", f"{hostile}.txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            file.addfile(info, io.BytesIO(b"hello"))
    indexed = run("index", tmp_path)
    assert (built.exit_code, indexed.exit_code) == (2, 0)
    for shown in (built.stderr, indexed.stderr):
        assert r"b\x1b]0;taken\x07" in shown and "\x1b" not in shown


def test_an_index_that_cannot_be_written(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        file.addfile(info, io.BytesIO(b"hello"))
    (tmp_path / "index").write_text("")
    result = run("index", tmp_path)
    assert (result.exit_code, result.stderr) == (2, f"error: {tmp_path}/index: File exists\n")
    (tmp_path / "index").unlink()
    (tmp_path / "0.tar").rename(tmp_path / "\udce9.tar")
    result = run("index", tmp_path)
    assert result.exit_code == 2 and r"\udce9.tar: the name of this file or folder is not UTF-8" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["\udce9.tar"]

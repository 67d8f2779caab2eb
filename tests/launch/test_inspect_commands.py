"""`triptych data lint`, `preview`, `stats`: what goes where, and the status that each ends with."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_pipelines.dataset import commit_shard, index_folder, write_dataset
from launch.data_commands import app
from tests.data_pipelines.tuples import tuple_sample


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    write_dataset(folder, "d", [commit_shard(map(tuple_sample, range(6)), folder, "shards/train-000000.tar")])
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["lint", "preview", "stats"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"triptych data {command} " in result.output.split("Example")[1]


def test_lint_says_one_line_about_a_clean_dataset(dataset: Path) -> None:
    size = (dataset / "shards/train-000000.tar").stat().st_size
    result = run("lint", dataset)
    assert result.exit_code == 0
    assert result.stdout == f"{dataset}: nothing wrong (6 samples in 1 shard, {size / 1e6:.1f} MB)\n"
    assert "pictures and sounds not decoded" in run("lint", dataset, "--fast").stdout
    told = json.loads(run("lint", dataset, "--json").stdout)
    assert told["clean"] is True and told["findings"] == [] and told["num_samples"] == 6


def test_lint_ends_with_two_and_says_where_and_what(dataset: Path) -> None:
    tar = dataset / "shards/train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"sample-00002.png") + 100] ^= 1
    tar.write_bytes(data)
    result = run("lint", dataset)
    assert result.exit_code == 2
    [line] = [line.split() for line in result.stdout.splitlines() if line.startswith("damage") and "00002" in line]
    assert line[:4] == ["damage", "shards/train-000000.tar", "sample-00002", "sample-00002.png"]
    assert f"{dataset}: 7 things wrong (5 samples" in result.stdout
    told = run("lint", dataset, "--json")
    assert told.exit_code == 2
    assert {"shard", "key", "member", "kind", "detail"} == set(json.loads(told.stdout)["findings"][0])
    assert json.loads(told.stdout)["counts"] == {"dataset": 4, "sha256": 1, "damage": 1, "index": 1}


def test_lint_requires_modalities(tmp_path: Path) -> None:
    write_dataset(
        tmp_path,
        "d",
        [commit_shard([tuple_sample(0), tuple_sample(1, missing="audio")], tmp_path, "shards/0.tar")],
    )
    assert run("lint", tmp_path).exit_code == 0
    result = run("lint", tmp_path, "--require", "image", "--require", "audio")
    assert result.exit_code == 2 and "has no audio" in result.stdout
    assert run("lint", tmp_path, "--require", "video").exit_code == 2


def test_names_in_a_tar_cannot_steer_the_terminal(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.USTAR_FORMAT) as file:
        for name in ("a.txt", "b\x1b]0;taken\x07[red].txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            file.addfile(info, io.BytesIO(b"hello"))
    index_folder(tmp_path)
    result = run("lint", tmp_path)
    assert result.exit_code == 2 and "\x1b" not in result.stdout and "\x07" not in result.stdout
    assert r"b\x1b]0;taken\x07[red].txt" in result.stdout


def test_preview_writes_a_page(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages/look.html"
    result = run("preview", dataset, "--out", out, "--samples", 3)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines()[-1].startswith(f"{out}: 3 samples, ")
    assert out.read_text(encoding="utf-8").count("<article") == 3
    assert [path.name for path in out.parent.iterdir()] == ["look.html"]


def test_stats_prints_lines_for_a_config(dataset: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "run: {dir: runs/x, name: x}\ndata: {train: x, audio: {sampling_rate: 8000, mel_bins: 12}}\n", encoding="utf-8"
    )
    result = run("stats", dataset, "--config", config)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "# 6 samples: 6 images, 6 sounds, 0 left out"
    assert [line.split(":")[0] for line in lines if not line.startswith("#")] == [
        "data",
        "  audio",
        "    mel_mean",
        "    mel_std",
    ]
    told = json.loads(run("stats", dataset, "--config", config, "--json").stdout)
    assert len(told["audio"]["per_bin_mean"]) == 12 and told["audio"]["settings"]["sampling_rate"] == 8000
    assert f"    mel_mean: {told['audio']['mel_mean']}" in lines
    assert len(json.loads(run("stats", dataset, "--json").stdout)["audio"]["per_bin_mean"]) == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lint", "{none}"], "none: no such dataset folder"),
        (["preview", "{none}", "--out", "{none}.html"], "none: no such dataset folder"),
        (["preview", "{dataset}", "--out", "{dataset}"], "dataset: is a folder"),
        (["stats", "{none}"], "none: no such dataset folder"),
        (["stats", "{dataset}", "--config", "{none}.yaml"], "none.yaml: no such config file"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    dataset: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"none": tmp_path / "none", "dataset": dataset}
    result = run(*(argument.format(**places) for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line

"""Building: the same bytes however it is run, stopped or killed, and nothing left behind that should not be."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.build import build_dataset
from data_pipelines.dataset import open_dataset
from data_pipelines.engines import local
from data_pipelines.errors import BadInput
from data_pipelines.plan import _footer, make_plan, read_rows
from data_pipelines.sources import open_source
from tests.data_pipelines.raw import Record, write_csv, write_files, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
COUNT = 23


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    return write_files(tmp_path / "raw", COUNT)


@pytest.fixture
def manifest(tmp_path: Path, records: list[Record]) -> Path:
    return write_csv(tmp_path / "raw" / "manifest.csv", records)


@pytest.fixture
def long_manifest(tmp_path: Path) -> Path:
    """So many shards that a signal after the first ones comes long before the last."""
    return write_csv(tmp_path / "raw" / "manifest.csv", write_files(tmp_path / "raw", 400))


def build(manifest: Path, out: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {"shard_size": 5, "workers": 1, "progress": False, **options}
    return build_dataset(manifest, out, **settings)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, hidden ones too."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_clean(folder: Path) -> None:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert not [name for name in names if "tmp" in name or "part" in name or name.startswith(".")], names


def test_a_build_holds_every_row_in_order(tmp_path: Path, manifest: Path, records: list[Record]) -> None:
    out = build(manifest, tmp_path / "out")
    assert_clean(out)
    assert sorted(path.name for path in out.iterdir()) == ["build.json", "dataset.json", "index", "shards"]
    assert [path.name for path in sorted((out / "shards").iterdir())] == [f"manifest-{n:06d}.tar" for n in range(5)]
    dataset = open_dataset(out)
    assert dataset.shard_sizes.tolist() == [5, 5, 5, 5, 3]
    for sample, record in zip((dataset[n] for n in range(len(dataset))), records, strict=True):
        assert (sample.key, sample.text, sample.metadata["label"]) == (record["id"], record["text"], record["label"])
        for data, path in ((sample.image, record["image"]), (sample.audio, record["audio"])):
            assert data == (None if path is None else (manifest.parent / path).read_bytes())
    description = json.loads((out / "dataset.json").read_text())
    assert (description["name"], description["num_samples"], description["format_version"]) == ("raw", COUNT, 1)
    assert "reencoded" not in description


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, manifest: Path) -> None:
    one = contents(build(manifest, tmp_path / "one"))
    assert contents(build(manifest, tmp_path / "three", workers=3)) == one


def test_digits_give_the_same_bytes_in_one_process_and_in_two(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("espeakng_loader")
    settings = {"split": "test", "shard_size": 250, "progress": False}
    one = build_dataset("digits", tmp_path / "one", workers=1, **settings)
    two = build_dataset("digits", tmp_path / "two", workers=2, **settings)
    assert contents(one) == contents(two)
    assert open_dataset(one).name == "digits-test"


def test_building_again_changes_nothing(tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = build(manifest, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    build(manifest, out, progress=True, workers=2)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    captured = capsys.readouterr()
    assert "already built (23 samples, 5 shards)" in captured.err
    assert captured.out == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_finished_build_need_not_be_writable(tmp_path: Path, manifest: Path) -> None:
    out = build(manifest, tmp_path / "out")
    out.chmod(0o555)
    try:
        build(manifest, out)
    finally:
        out.chmod(0o755)


def test_a_lost_shard_is_made_again(tmp_path: Path, manifest: Path) -> None:
    out = build(manifest, tmp_path / "out")
    before = contents(out)
    (out / "shards" / "manifest-000001.tar").unlink()
    (out / "index" / "manifest-000003.arrow").unlink()
    with open(out / "shards" / "manifest-000004.tar", "r+b") as file:
        file.truncate(1000)
    build(manifest, out)
    assert contents(out) == before


def test_an_unfinished_build_keeps_complete_shards(
    tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(build(manifest, tmp_path / "whole"))
    out = build(manifest, tmp_path / "out")
    # As a kill leaves it: no dataset.json, a shard without an index, half-written files, the hidden folder.
    (out / "dataset.json").unlink()
    (out / "index" / "manifest-000002.arrow").unlink()
    (out / "shards" / ".tmp-manifest-000002.tar.123").write_bytes(b"half")
    (out / "index" / ".tmp-manifest-000002.arrow.123").write_bytes(b"half")
    (out / ".build").mkdir()
    kept = {n: (out / f"shards/manifest-{n:06d}.tar").stat().st_mtime_ns for n in (0, 1, 3, 4)}
    build(manifest, out, progress=True)
    assert contents(out) == before
    assert kept == {n: (out / f"shards/manifest-{n:06d}.tar").stat().st_mtime_ns for n in kept}
    assert "4 of 5 shards are there already" in capsys.readouterr().err


SLOW = """
import sys, time
# webdataset imports torch where there is one; without, each process starts two seconds earlier.
sys.modules["torch"] = None
from data_pipelines.sources.manifest import ManifestSource
read = ManifestSource.read
def slow(self, row):
    time.sleep(0.03)
    return read(self, row)
ManifestSource.read = slow
"""


def start_build(manifest: Path, out: Path, first: str = "", **options: Any) -> subprocess.Popen[str]:
    """A build in a process of its own, which does `first` and then takes its time over every sample, in workers too."""
    call = f"build.build_dataset({str(manifest)!r}, {str(out)!r}, shard_size=5, **{options!r})"
    code = (
        f"{first}\nimport sys\n"
        "from data_pipelines import build\n"
        "from launch.errors import exits_cleanly\n"
        f"run = exits_cleanly(lambda: {call})\n"
        "import typer\n"
        "try:\n    run()\nexcept typer.Exit as end:\n    sys.exit(end.exit_code)\n"
    )
    site = out.parent / "site"
    site.mkdir(exist_ok=True)
    # Python imports this at its start, and workers have the same path.
    (site / "sitecustomize.py").write_text(SLOW)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"},
    )


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_killed_at_a_random_moment_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, long_manifest: Path, workers: int
) -> None:
    whole = contents(build(long_manifest, tmp_path / "whole"))
    out = tmp_path / "out"
    moment = random.randrange(8), random.uniform(0, 0.2)
    print("killed after shard, and seconds later:", *moment)
    process = start_build(long_manifest, out, workers=workers)
    try:
        wait_for(out / "index" / f"manifest-{moment[0]:06d}.arrow")
        time.sleep(moment[1])
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert not (out / "dataset.json").exists()
    complete = {path: path.stat().st_mtime_ns for path in (out / "index").glob("manifest-*.arrow")}
    complete |= {tar: tar.stat().st_mtime_ns for path in complete for tar in [out / "shards" / f"{path.stem}.tar"]}
    # At once, while workers of the killed one may still be there.
    build(long_manifest, out, workers=2)
    assert contents(out) == whole
    assert complete == {path: path.stat().st_mtime_ns for path in complete}, "complete shards were built again"
    assert_clean(out)


def test_ctrl_c_leaves_complete_shards_and_one_line(tmp_path: Path, long_manifest: Path) -> None:
    out = tmp_path / "out"
    process = start_build(long_manifest, out, workers=2)
    try:
        wait_for(out / "index" / "manifest-000000.arrow")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert not [name for name in contents(out) if ".tmp" in name]
    assert not (out / "dataset.json").exists()
    assert contents(build(long_manifest, out)) == contents(build(long_manifest, tmp_path / "whole"))


def test_two_builds_of_one_folder_do_not_meet(tmp_path: Path, manifest: Path) -> None:
    out = tmp_path / "out"
    first = start_build(manifest, out, workers=1)
    try:
        wait_for(out / "build.json")
        said: list[str] = []
        second = threading.Thread(target=lambda: said.append(str(build(manifest, out))))
        second.start()
        _, err = first.communicate(timeout=60)
        second.join(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 0, err
    assert said == [str(out)]
    assert_clean(out)
    assert contents(out) == contents(build(manifest, tmp_path / "whole"))


@pytest.mark.parametrize("finished", [True, False])
def test_another_build_in_the_folder_is_refused_and_left_alone(
    tmp_path: Path, manifest: Path, records: list[Record], finished: bool
) -> None:
    out = build(manifest, tmp_path / "out")
    if not finished:
        (out / "dataset.json").unlink()
    before = contents(out)
    other = write_csv(tmp_path / "raw" / "other.csv", records[:-1])
    for change in ({"manifest": other}, {"shard_size": 6}, {"name": "other"}, {"split": "train"}):
        options = {"manifest": manifest, **change}
        what = "a dataset" if finished else "an unfinished build"
        with pytest.raises(BadInput, match=f"out: holds {what} made of other rows"):
            build(options.pop("manifest"), out, **options)
        assert contents(out) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: (out.mkdir(), (out / "notes.txt").write_text("mine")), r"holds other files \(notes.txt, ...\)"),
        (lambda out: (out.mkdir(), (out / "dataset.json").write_text("{}")), "holds a dataset that was not built here"),
        (lambda out: (out.mkdir(), (out / "build.json").write_text("{}")), "build.json: damaged"),
        (lambda out: out.write_text("a file"), "not a folder"),
        (lambda out: out.symlink_to("nowhere"), "not a folder"),
    ],
)
def test_a_folder_with_other_content_is_left_alone(tmp_path: Path, manifest: Path, make: Any, message: str) -> None:
    out = tmp_path / "out"
    make(out)
    before = contents(tmp_path)
    with pytest.raises(BadInput, match=message):
        build(manifest, out)
    assert contents(tmp_path) == before


def break_rows(tmp_path: Path, records: list[Record]) -> Path:
    """Row 8 names a file that is not there, row 18 one that is no picture, row 20 repeats an id."""
    broken = [dict(record) for record in records]
    broken[7]["audio"] = "sounds/gone.flac"
    (tmp_path / "raw" / "images" / "bad.png").write_bytes(b"no picture")
    broken[17]["image"] = "images/bad.png"
    broken[19]["id"] = broken[0]["id"]
    return write_jsonl(tmp_path / "raw" / "broken.jsonl", broken)


def test_a_bad_row_ends_the_build_and_is_named(tmp_path: Path, records: list[Record]) -> None:
    manifest = break_rows(tmp_path, records)
    with pytest.raises(BadInput, match=r"broken.jsonl: row 20 \(line 20, id 'row-000'\): .* is row 1's already"):
        build(manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_file_ends_the_build_whatever_the_workers(
    tmp_path: Path, records: list[Record], workers: int
) -> None:
    manifest = write_jsonl(tmp_path / "raw" / "broken.jsonl", json_rows(break_rows(tmp_path, records))[:19])
    out = tmp_path / "out"
    with pytest.raises(BadInput, match=r"row 8 \(line 8, id 'row-007'\): audio file .*gone.flac does not exist"):
        build(manifest, out, workers=workers)
    assert not (out / "dataset.json").exists() and not (out / "quarantine.jsonl").exists()
    assert (out / "index" / "broken-000000.arrow").exists()
    # Mended, the build goes on.
    (tmp_path / "raw" / "sounds" / "gone.flac").write_bytes((tmp_path / "raw/sounds/0.flac").read_bytes())
    (tmp_path / "raw" / "images" / "bad.png").write_bytes((tmp_path / "raw/images/0.png").read_bytes())
    assert len(open_dataset(build(manifest, out, workers=workers))) == 19


def json_rows(manifest: Path) -> list[Record]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def test_nothing_is_left_of_a_build_without_a_complete_shard(tmp_path: Path, manifest: Path) -> None:
    (tmp_path / "raw" / "images" / "0.png").unlink()
    with pytest.raises(BadInput, match="does not exist"):
        build(manifest, tmp_path / "out", shard_size=100)
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="does not exist"):
        build(manifest, tmp_path / "empty", shard_size=100)
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_skipped_rows_are_quarantined_and_the_rest_is_built(
    tmp_path: Path, records: list[Record], workers: int
) -> None:
    out = build(break_rows(tmp_path, records), tmp_path / "out", on_error="skip", workers=workers)
    assert_clean(out)
    dataset = open_dataset(out)
    bad = {7, 17, 19}
    assert dataset.keys(range(len(dataset))) == [r["id"] for n, r in enumerate(records) if n not in bad]
    lines = json_rows(out / "quarantine.jsonl")
    assert [(line["key"], line["member"], line["reason"]) for line in lines] == [
        ("row-007", "audio", "missing"),
        ("row-017", "image", "format"),
        ("row-000", "id", "duplicate"),
    ]
    assert all(set(line) == {"shard", "key", "member", "reason", "detail"} for line in lines)
    assert [line["shard"] for line in lines] == [f"shards/broken-{n:06d}.tar" for n in (1, 3, 3)]


def test_faults_of_finished_shards_survive_a_stop(tmp_path: Path, records: list[Record]) -> None:
    manifest = break_rows(tmp_path, records)
    out = tmp_path / "out"
    process = start_build(manifest, out, workers=1, on_error="skip")
    try:
        wait_for(out / "index" / "broken-000001.arrow")
    finally:
        process.kill()
        process.communicate(timeout=60)
    build(manifest, out, on_error="skip")
    assert contents(out) == contents(build(manifest, tmp_path / "whole", on_error="skip"))


def test_faults_of_whole_shards_survive_a_repair(
    tmp_path: Path, records: list[Record], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = break_rows(tmp_path, records)
    out = build(manifest, tmp_path / "out", on_error="skip")
    before = contents(out)
    for shard in ("broken-000000", "broken-000003"):
        (out / "index" / f"{shard}.arrow").unlink()
        capsys.readouterr()
        build(manifest, out, on_error="skip", progress=True)
        assert contents(out) == before
        assert capsys.readouterr().err.count("shards are missing or damaged; making them again") == 1


def test_the_footer_of_a_plan_is_read_once(tmp_path: Path, manifest: Path) -> None:
    file = tmp_path / "plan.parquet"
    options: dict[str, Any] = {"name": "n", "prefix": "p", "skip_faults": False, "file": file}
    for shard_size in (1, 2):
        make_plan(open_source(str(manifest)), shard_size=shard_size, **options)
        misses = _footer.cache_info().misses
        numbers = [row.number for shard in range(5) for row in read_rows(file, shard)]
        assert numbers == list(range(1, 5 * shard_size + 1))
        assert _footer.cache_info().misses == misses + 1


def test_shards_are_in_the_order_of_their_numbers(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_dataset(build(manifest, tmp_path / "whole", shard_size=1))
    monkeypatch.setattr("data_pipelines.plan.shard_path", lambda prefix, number: f"shards/{prefix}-{number}.tar")
    dataset = open_dataset(build(manifest, tmp_path / "out", shard_size=1))
    assert dataset.keys(range(len(dataset))) == whole.keys(range(len(whole)))


def test_a_shard_without_a_good_row_is_left_out(tmp_path: Path, records: list[Record]) -> None:
    for number in range(5, 10):
        for column in ("image", "audio"):
            if records[number][column]:
                (tmp_path / "raw" / records[number][column]).unlink()
    manifest = write_csv(tmp_path / "raw" / "manifest.csv", records)
    out = build(manifest, tmp_path / "out", on_error="skip")
    assert open_dataset(out).shard_sizes.tolist() == [5, 5, 5, 3]
    assert not (out / "shards" / "manifest-000001.tar").exists()
    assert not (out / "index" / "manifest-000001.arrow").exists()
    assert len(json_rows(out / "quarantine.jsonl")) == 5
    before = contents(out)
    build(manifest, out, on_error="skip")
    assert contents(out) == before


def test_no_good_row_at_all_is_an_error(tmp_path: Path) -> None:
    manifest = write_csv(tmp_path / "m.csv", [{"id": "a", "image": "gone.png"}])
    with pytest.raises(BadInput, match=r"no row gives a sample; the first: row 1 \(line 2, id 'a'\): image file"):
        build(manifest, tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_size": 0}, "shard size 0"),
        ({"workers": 0}, "workers 0"),
        ({"on_error": "ignore"}, "give fail or skip"),
        ({"name": "../x"}, "name '../x'"),
        ({"allow": ["/nowhere/at/all"]}, "--allow /nowhere/at/all: not a folder"),
    ],
)
def test_bad_options(tmp_path: Path, manifest: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build(manifest, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_name_names_dataset_and_shards(tmp_path: Path, manifest: Path) -> None:
    out = build(manifest, tmp_path / "out", name="my.set_1", split="test")
    assert open_dataset(out).name == "my.set_1"
    assert (out / "shards" / "my-set_1-000000.tar").exists()


def test_a_full_disk_is_said_in_one_line_and_can_be_mended(tmp_path: Path, manifest: Path) -> None:
    out = tmp_path / "out"
    # A limit on the size of files stands for the disk: a shard of five is larger than 20 kB.
    process = start_build(manifest, out, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1] == f"error: {out}: File too large; complete shards are kept"
    assert "Traceback" not in err
    assert not out.exists()
    assert len(open_dataset(build(manifest, out))) == COUNT


class Dies:
    """A job that ends its process."""

    def __call__(self, task: int, tick: local.Tick) -> int:
        if task == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return task


def test_a_killed_worker_is_reported() -> None:
    with pytest.raises(local.WorkerDied, match=r"killed by signal 9 \(out of memory"):
        list(local.run(Dies(), [0, 1, 2], 2, lambda count: None))


def webdataset_members(shards: list[Path]) -> dict[str, dict[str, bytes]]:
    import webdataset

    folder, stem = shards[0].parent, shards[0].name.rsplit("-", 1)[0]
    urls = f"{folder}/{stem}-{{000000..{len(shards) - 1:06d}}}.tar"
    samples = webdataset.WebDataset(urls, shardshuffle=False)
    return {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("__")} for s in samples}


def test_webdataset_reads_the_same_keys_and_bytes(tmp_path: Path, manifest: Path) -> None:
    dataset = open_dataset(build(manifest, tmp_path / "out"))
    assert os.environ["WDS_SECURE"] == "1"
    theirs = webdataset_members(sorted((dataset.path / "shards").iterdir()))
    assert list(theirs) == dataset.keys(range(len(dataset)))
    for sample in (dataset[n] for n in range(len(dataset))):
        members = theirs[sample.key]
        assert members.get("png") == sample.image
        assert members.get("flac") == sample.audio
        assert members["txt"].decode() == sample.text
        assert json.loads(members["json"]) == sample.metadata


def load_with_datasets(shards: str, cache: Path) -> Any:
    """The call that the README shows."""
    from datasets import Features, Json, Value, load_dataset

    features = Features(
        {
            "__key__": Value("string"),
            "png": Value("binary"),
            "txt": Value("string"),
            "flac": Value("binary"),
            "json": Json(),
        }
    )
    return load_dataset("webdataset", data_files=shards, split="train", features=features, cache_dir=str(cache))


def test_datasets_reads_the_same_keys_and_bytes(tmp_path: Path, manifest: Path) -> None:
    pytest.importorskip("datasets", minversion="5")
    dataset = open_dataset(build(manifest, tmp_path / "out"))
    theirs = load_with_datasets(f"{dataset.path}/shards/*.tar", tmp_path / "cache")
    assert len(theirs) == len(dataset)
    for row, sample in zip(theirs, (dataset[n] for n in range(len(dataset))), strict=True):
        assert (row["__key__"], row["png"], row["flac"]) == (sample.key, sample.image, sample.audio)
        assert (row["txt"], row["json"]) == (sample.text, sample.metadata)


@pytest.fixture(scope="module")
def spoken_digits(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("built") / "spoken-digits"
    yield build_dataset(shared_data / "spoken-digits" / "manifest.csv", out, split="train", workers=2, progress=False)


def test_six_thousand_real_tuples(spoken_digits: Path, shared_data: Path) -> None:
    dataset = open_dataset(spoken_digits)
    rows = [row for row in json_rows(shared_data / "spoken-digits" / "manifest.jsonl") if row["split"] == "train"]
    assert len(dataset) == len(rows) == 6000
    assert dataset.keys(range(6000)) == [row["id"] for row in rows]
    assert dataset.modalities == {
        name: sum(row[name] is not None for row in rows) for name in ("image", "text", "audio")
    }
    for number in range(0, 6000, 97):
        sample, row = dataset[number], rows[number]
        assert (sample.text, sample.metadata["label"]) == (row["text"], row["label"])
        for data, path in ((sample.image, row["image"]), (sample.audio, row["audio"])):
            assert data == (None if path is None else (shared_data / "spoken-digits" / path).read_bytes())
    theirs = webdataset_members(sorted((spoken_digits / "shards").iterdir()))
    assert list(theirs) == [row["id"] for row in rows]
    assert Counter(len(members) for members in theirs.values()) == Counter(
        2 + sum(row[name] is not None for name in ("image", "audio")) for row in rows
    )

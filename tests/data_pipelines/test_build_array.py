"""Builds as arrays of Slurm jobs, as far as no cluster is needed: parts in any order, the job script, options."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data_pipelines import build_array
from data_pipelines.build import build_dataset
from data_pipelines.build_folder import BuildFolder
from data_pipelines.engines import array
from data_pipelines.engines.slurm import SlurmOptions, Submission, last_submission
from data_pipelines.errors import BadInput
from data_pipelines.progress import Progress
from tests.data_pipelines.raw import write_csv, write_files

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "raw" / "manifest.csv", write_files(tmp_path / "raw", 23))


def build(manifest: Path, out: Path, **options: Any) -> Path:
    return build_dataset(manifest, out, **{"shard_size": 5, "progress": False, **options})


def plan_array(manifest: Path, out: Path, **options: Any) -> Path:
    """The folder of a submission that has not been submitted."""
    pytest.importorskip("datatrove", reason="needs datatrove: pip install 'triptych[slurm]'")
    skip = {"on_error": options.pop("on_error", "fail")}
    build(manifest, out, slurm=SlurmOptions(dry_run=True, **options), **skip)
    submission = last_submission(out)
    assert submission is not None and submission.jobs == []
    return submission.folder


def hashes(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, hidden ones too."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_parts_in_any_order_done_twice_and_by_another_engine_give_the_same_bytes(
    tmp_path: Path, manifest: Path
) -> None:
    whole = hashes(build(manifest, tmp_path / "whole", workers=1))
    out = tmp_path / "out"
    submission = plan_array(manifest, out)
    with pytest.raises(BadInput, match=r"5 shards are not built \(shards/manifest-000000.tar, ...\)"):
        array.finish(submission)
    array.build_part(submission, 2, 3)
    assert [path.name for path in (out / "shards").iterdir()] == ["manifest-000002.tar"]
    array.build_part(submission, 0, 2)
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    array.build_part(submission, 0, 1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    (out / "index" / "manifest-000001.arrow").unlink()
    build(manifest, out, workers=2)
    assert hashes(out) == whole


def test_the_end_of_an_array_keeps_what_was_left_out(tmp_path: Path, manifest: Path) -> None:
    for number in (3, 12):
        (tmp_path / "raw" / "images" / f"{number}.png").unlink()
    whole = hashes(build(manifest, tmp_path / "whole", on_error="skip"))
    out = tmp_path / "out"
    submission = plan_array(manifest, out, on_error="skip")
    for part in range(3):
        array.build_part(submission, part, 3)
    array.finish(submission)
    assert hashes(out) == whole
    assert len((out / "quarantine.jsonl").read_bytes().splitlines()) == 2


def test_a_failure_is_noted_until_it_is_mended(tmp_path: Path, manifest: Path) -> None:
    image = tmp_path / "raw" / "images" / "7.png"
    data = image.read_bytes()
    image.unlink()
    submission = plan_array(manifest, tmp_path / "out")
    with pytest.raises(BadInput, match="row 8 .*7.png does not exist"):
        array.build_part(submission, 0, 1)
    ((name, failure),) = array.failures(submission).items()
    assert name == failure.name == "shards/manifest-000001.tar"
    assert failure.is_bad_input and "row 8" in failure.message
    image.write_bytes(data)
    array.build_part(submission, 0, 1)
    assert array.failures(submission) == {}


def test_the_job_script_is_readable_quoted_and_without_secrets(
    tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    further = {"comment": "two words", "exclusive": "", "export": "AWS_PROFILE"}
    options = {"partition": "cpu", "time": "1:00:00", "cpus": 2, "mem": "4G", "tasks": 3, "throttle": 2}
    submission = plan_array(manifest, tmp_path / "a folder", sbatch=further, **options)
    script = (submission / "datatrove" / "launch_script.slurm").read_text()
    directives = re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)
    expected = ["array=0-2%2", "cpus-per-task=2", "mem=4G", "partition=cpu", "time=1:00:00", "requeue", "exclusive"]
    assert set(expected) <= set(directives)
    assert 'comment="two words"' in directives and f'output="{submission}/logs/%A_%a.log"' in directives
    (export,) = [line for line in directives if line.startswith("export=")]
    assert "ALL" not in export.split(",") and "TOKEN" not in export and "AWS_PROFILE" in export
    assert not [line for line in directives if line.startswith(("account", "qos", "mem-per-cpu"))]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)
    files = [path for path in submission.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]
    # Jobs unpickle what lies there.
    assert submission.parent.stat().st_mode & 0o777 == 0o700


def test_what_others_may_have_written_is_not_unpickled(tmp_path: Path, manifest: Path) -> None:
    submission = plan_array(manifest, tmp_path / "out")
    submission.parent.chmod(0o755)
    with pytest.raises(BadInput, match="slurm: others may write there"):
        array.main("build", str(tmp_path / "out"), "0", "1")
    submission.parent.chmod(0o700)
    array.main("build", str(submission), "0", "1")
    assert len(list((tmp_path / "out" / "index").iterdir())) == 5


def test_the_thousandth_submission_is_not_the_last(tmp_path: Path) -> None:
    for number in (7, 999, 1000):
        (tmp_path / array.SUBMISSIONS / f"{number:03d}").mkdir(parents=True)
    submission = last_submission(tmp_path)
    assert submission is not None and submission.folder.name == "1000"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpus": 0}, "--cpus 0: give 1 or more"),
        ({"throttle": -1}, "--throttle -1: give 1 or more"),
        ({"partition": "a\nb"}, "control characters"),
        ({"sbatch": {"array": "0-3"}}, "set by the build itself"),
        ({"sbatch": {"N": "3"}}, "long name"),
        ({"sbatch": {"export": "ALL"}}, "export=ALL: give names"),
        ({"sbatch": {"export": "TOKEN=x"}}, "export=TOKEN=x: give names"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tmp_path: Path, manifest: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        build(manifest, tmp_path / "out", slurm=SlurmOptions(**options))
    assert not (tmp_path / "out").exists()


def test_a_machine_without_sbatch_says_so(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datatrove")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="no sbatch here; run it on a login node"):
        build(manifest, tmp_path / "out", slurm=SlurmOptions())
    assert not (tmp_path / "out").exists()


def test_an_array_that_slurm_took_a_part_of(tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = plan_array(manifest, tmp_path / "out")
    Submission(place, ["12"], [], array_size=2).note()
    for part in range(2):
        array.build_part(place, part, 5)
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:/usr/bin:/bin")
    finish: Any = array.ArrayWork.load(place).finish
    _, plan, path = finish.args
    missing = plan.shard_paths[2:]
    with (
        pytest.raises(BadInput, match="out: 3 of 5 shards are not built; run it again"),
        Progress("", "", True) as quiet,
    ):
        build_array.follow(BuildFolder(path), plan, lambda _: missing, wait=True, progress=quiet)


def test_parts_are_found_in_arrays_that_the_cluster_split(tmp_path: Path) -> None:
    submission = Submission(tmp_path, ["12", "15"], ["16"], array_size=1000)
    submission.note()
    assert Submission.of(tmp_path) == submission
    assert submission.task_of(999) == ("12_999", tmp_path / "logs" / "12_999.log")
    assert submission.task_of(1000)[0] == "15_0"

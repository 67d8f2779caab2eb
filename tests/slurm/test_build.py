"""`triptych data build --engine slurm` on two real nodes: the bytes of a local build, whatever dies on the way."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from data_pipelines.build import build_dataset
from tests.data_pipelines.raw import write_csv, write_files, write_jsonl
from tests.slurm.conftest import SCRIPT, Cluster

pytest.importorskip("datatrove", reason="needs datatrove: pip install 'triptych[slurm]'")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]
NUM_SHARDS = 6

# Imported by every Python of a job before its program: notes where it runs and with what environment, and makes each
# sample wait while the file `hold` is there.
SITE = """
import json, os, sys, time
from pathlib import Path
folder = Path(__file__).parent
if "SLURM_JOB_ID" in os.environ:
    from data_pipelines.sources.manifest import ManifestSource
    marks = folder / "marks"
    name = os.environ.get("SLURM_ARRAY_TASK_ID", "finish")
    seen = {"host": os.uname().nodename, "environment": dict(os.environ)}
    (marks / f"{name}-{os.environ.get('SLURM_RESTART_COUNT', 0)}.json").write_text(json.dumps(seen))
    read = ManifestSource.read
    def slow(self, row):
        while (folder / "hold").exists() and row.number > 10:
            time.sleep(0.1)
        return read(self, row)
    ManifestSource.read = slow
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A manifest of 30 rows, and a Python for jobs that imports `SITE`."""
    place = tmp_path / "a folder"
    records = write_files(place / "raw", 5 * NUM_SHARDS)
    write_csv(place / "raw" / "manifest.csv", records)
    # Row 13 is of the third shard, row 28 of the last.
    records[12] = {**records[12], "audio": "sounds/gone.flac"}
    records[27] = {**records[27], "audio": "sounds/gone.flac"}
    write_jsonl(place / "raw" / "broken.jsonl", records)
    (place / "sitecustomize.py").write_text(SITE)
    (place / "marks").mkdir()
    python = place / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{place}:{ROOT}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return place


@pytest.fixture(autouse=True)
def _nodes_are_up_and_free(cluster: Cluster, folder: Path) -> Iterator[None]:
    yield
    (folder / "hold").unlink(missing_ok=True)
    cluster.run("scancel", "--me", cwd=folder)
    subprocess.run(["bash", str(SCRIPT), "up"], capture_output=True, env=cluster.environment, timeout=120, check=True)


class Build:
    """A `triptych data build --engine slurm` on the login machine, with secrets in its environment."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str, manifest: str = "manifest.csv") -> None:
        self.cluster, self.out, self.log = cluster, folder / "out", folder / "command.log"
        program = "import sys; sys.modules['torch'] = None; from launch.cli import main; main()"
        self._file: IO[str] = open(self.log, "w", encoding="utf-8")
        self.process = subprocess.Popen(
            [
                *("bash", str(SCRIPT), "exec", sys.executable, "-c", program),
                *("data", "build", str(folder / "raw" / manifest), "--out", str(self.out), "--shard-size", "5"),
                *("--engine", "slurm", "--tasks", "2", "--sbatch", "exclusive", "--time", "30", *options),
            ],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={
                **cluster.environment,
                "PYTHONPATH": str(ROOT),
                "TRIPTYCH_PYTHON": str(folder / "python"),
                "HF_TOKEN": "hf_secret_of_the_submitter",
                "MY_SECRET": "also_secret",
                "KNOWN": "known_value",
            },
        )

    def end(self, seconds: float = 240) -> str:
        """What it said, once it has ended."""
        try:
            self.process.wait(timeout=seconds)
        finally:
            self.process.kill()
            self._file.close()
        return self.log.read_text(encoding="utf-8")

    def submission(self, number: int = 0) -> Path:
        return self.out / ".build" / "slurm" / f"{number:03d}"

    def jobs(self, number: int = 0) -> dict[str, list[str]]:
        wait_for(lambda: (self.submission(number) / "jobs.json").exists())
        wait_for(lambda: bool(json.loads((self.submission(number) / "jobs.json").read_text())["finish"]))
        found: dict[str, list[str]] = json.loads((self.submission(number) / "jobs.json").read_text())
        return found


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.2)


def hashes(folder: Path) -> dict[str, str]:
    """Hash of every file of a dataset, hidden ones too."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def built_here(folder: Path, workers: int) -> dict[str, str]:
    manifest = folder / "raw" / "manifest.csv"
    return hashes(build_dataset(manifest, folder / f"here-{workers}", shard_size=5, workers=workers, progress=False))


def mark(folder: Path, name: str) -> dict[str, str]:
    wait_for(lambda: (folder / "marks" / name).exists())
    seen: dict[str, str] = json.loads((folder / "marks" / name).read_text())
    return seen


def test_one_process_two_processes_and_two_nodes_give_the_same_bytes(cluster: Cluster, folder: Path) -> None:
    (folder / "hold").touch()
    build = Build(cluster, folder, "--sbatch", "export=KNOWN")
    marks = [mark(folder, f"{task}-0.json") for task in range(2)]
    jobs = build.jobs()
    scripts = [cluster.run("scontrol", "write", "batch_script", job, "-", cwd=folder).stdout for job in jobs["array"]]
    scripts.append((build.submission() / "datatrove" / "launch_script.slurm").read_text())
    (folder / "hold").unlink()
    said = build.end()

    assert build.process.returncode == 0, said
    assert f"submitted: array job {jobs['array'][0]}: 6 shards in 2 tasks, then job {jobs['finish'][0]}" in said
    assert said.splitlines()[-1] == f"{build.out}: 30 samples in 6 shards"
    assert hashes(build.out) == built_here(folder, 1) == built_here(folder, 2)
    assert {seen["host"] for seen in marks} == {"node1", "node2"}
    text = json.dumps(marks) + "".join(scripts)
    assert "#SBATCH --array=0-1" in text and "known_value" in text
    assert "secret" not in text


def test_a_killed_task_is_named_and_the_next_call_builds_the_rest(cluster: Cluster, folder: Path) -> None:
    (folder / "hold").touch()
    build = Build(cluster, folder)
    # Each task has one of the first two shards, which do not wait.
    wait_for(lambda: len(list(build.out.glob("index/*.arrow"))) == 2)
    (job,) = build.jobs()["array"]
    cluster.run("scancel", "--signal=KILL", f"{job}_0", f"{job}_1", cwd=folder)
    said = build.end()
    assert build.process.returncode == 2, said
    last = said.splitlines()[-1]
    assert last.startswith(f"error: {build.out}: 4 of 6 shards are not built: array task {job}_0 ended")
    assert f"log: {build.submission()}/logs/{job}_0.log; run it again: complete shards are kept" in last

    kept = {path: path.stat().st_mtime_ns for path in (build.out / "shards").glob("*.tar")}
    (folder / "hold").unlink()
    # Nobody waits this time, so the last job ends the build.
    again = Build(cluster, folder, "--no-wait", "--json", "--throttle", "1")
    said = again.end()
    assert again.process.returncode == 0, said
    assert "2 of 6 shards are there already" in said and ": 4 shards in 2 tasks" in said
    jobs = json.loads(said[said.index("{") :])["jobs"]
    assert cluster.wait(jobs[-1], "COMPLETED")["ExitCode"] == "0:0"
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert hashes(again.out) == built_here(folder, 1)


def test_ctrl_c_leaves_the_jobs_and_a_dead_node_and_a_requeue_change_nothing(cluster: Cluster, folder: Path) -> None:
    (folder / "hold").touch()
    build = Build(cluster, folder)
    hosts = {task: mark(folder, f"{task}-0.json")["host"] for task in range(2)}
    jobs = build.jobs()
    wait_for(lambda: "submitted" in build.log.read_text())
    time.sleep(1)
    # Below nsenter, which passes no signals on; below it in turn may be a squeue that is just asking.
    below = psutil.Process(build.process.pid).children(recursive=True)
    next(child for child in below if Path(child.exe()).name.startswith("python")).send_signal(signal.SIGINT)
    said = build.end()
    assert build.process.returncode == 130, said
    assert f"squeue --jobs {jobs['array'][0]},{jobs['finish'][0]}" in said and "the same command again" in said

    # As before a time limit: datatrove puts the task back into the queue.
    warned = next(task for task, host in hosts.items() if host == "node1")
    cluster.run("scancel", "--signal=USR1", f"{jobs['array'][0]}_{warned}", cwd=folder)
    subprocess.run(["bash", str(SCRIPT), "crash", "node2"], env=cluster.environment, check=True, timeout=60)
    (folder / "hold").unlink()
    again = Build(cluster, folder)
    said = again.end()
    assert again.process.returncode == 0, said
    assert f"Slurm's jobs {jobs['array'][0]} {jobs['finish'][0]} are at work here already" in said
    assert "submitted" not in said
    assert mark(folder, f"{warned}-1.json")["host"] == "node1"
    assert hashes(again.out) == built_here(folder, 1)


def test_bad_rows_are_named_with_their_logs(cluster: Cluster, folder: Path) -> None:
    build = Build(cluster, folder, manifest="broken.jsonl")
    said = build.end()
    assert build.process.returncode == 2, said
    last = said.splitlines()[-1]
    assert "row 13 (line 13, id 'row-012'): audio file" in last and "shard shards/broken-000002.tar" in last
    log = Path(last.split("log ")[1].split(";")[0])
    assert "row-012" in log.read_text()
    assert "also failed: shards/broken-000005.tar" in said
    assert not (build.out / "dataset.json").exists()


def test_the_sbatch_file_does_the_same_by_hand(cluster: Cluster, folder: Path) -> None:
    build = Build(cluster, folder, "--dry-run")
    said = build.end()
    assert build.process.returncode == 0 and "nothing is submitted" in said, said
    script = str(ROOT / "slurm" / "build_shards.sbatch")
    secrets = {"MY_SECRET": "also_secret", "TRIPTYCH_PYTHON": str(folder / "python")}
    options = ["--mem=1000", "--time=10"]
    first = cluster.submit(*options, "--array=0-1", script, "out", cwd=folder, **secrets)
    last = cluster.submit(*options, f"--dependency=afterany:{first}", script, "out", cwd=folder, **secrets)
    assert cluster.wait(last, "COMPLETED")["ExitCode"] == "0:0"
    assert hashes(build.out) == built_here(folder, 1)
    assert "also_secret" not in "".join(path.read_text() for path in (folder / "marks").iterdir())

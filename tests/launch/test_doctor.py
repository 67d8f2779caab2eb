"""`triptych doctor`: what would stop a run is found, named, and met with the exit status; what is harmless is not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.errors import BadInput
from launch.doctor import check_before_start, machine, of_run
from pretrain.checkpoint.manifest import FORMAT_VERSION, seal
from pretrain.config import Config
from pretrain.owner import Owner
from tests.ranks import ROOT
from tests.small_run import triptych


def config(tmp_path: Path, **sections: dict[str, object]) -> Config:
    raw: dict[str, dict[str, object]] = {"run": {"dir": str(tmp_path / "run")}, "data": {"train": "unused"}}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return Config.model_validate(raw)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a build's lock, as torch does."""
    lock = tmp_path / "held" / "lock"
    lock.parent.mkdir()
    code = f"import os, time; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_a_lock_that_nobody_holds_is_cleared(
    tmp_path: Path, held: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    found = machine.jit_locks()
    assert found.level == "warning" and str(tmp_path / "held" / "lock") in found.found
    assert not stale.exists()
    held.kill()
    held.wait()
    found = machine.jit_locks()
    assert found.level == "ok" and f"cleared {tmp_path / 'held' / 'lock'}" in found.found
    assert machine.jit_locks().found == "none left over"


def test_a_lock_that_goes_or_stays_meanwhile_ends_no_start(
    tmp_path: Path, held: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "_extension_locks", lambda: iter([tmp_path / "gone" / "lock"]))
    assert machine.jit_locks().found == "none left over"
    (tmp_path / "kept" / "lock").mkdir(parents=True)
    monkeypatch.setattr(machine, "_extension_locks", lambda: iter([tmp_path / "kept" / "lock"]))
    found = machine.jit_locks()
    assert found.level == "warning" and "cannot be removed" in found.found

    # A file that is closed while its process's are looked through hides none of the others.
    stat = os.stat

    def closed(path: object, *args: object, **kwargs: object) -> os.stat_result:
        if str(path).startswith(f"/proc/{held.pid}/fd/") and not os.readlink(str(path)).endswith("/lock"):
            raise FileNotFoundError(path)
        return stat(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", closed)
    assert machine._is_open(tmp_path / "held" / "lock")


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        number = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(number))
        found = machine.port()
        assert found.level == "error" and f"port {number}" in found.found
    assert machine.port().level == "ok"
    monkeypatch.setenv("MASTER_PORT", "70000")
    assert machine.port().level == "error" and "port 70000" in machine.port().found


def test_room_for_checkpoints_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_run.room(config(tmp_path)).level == "ok"
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    newest.mkdir(parents=True)
    with (newest / "weights").open("wb") as file:
        file.truncate(free + 10**9)
    files = {"weights": {"bytes": free + 10**9, "sha256": "", "rank": 0}}
    about = {
        "format_version": FORMAT_VERSION,
        "run_id": "x",
        "step": 2,
        "world_size": 1,
        "zero_stage": 2,
        "files": files,
    }
    (newest / "MANIFEST.json").write_text(json.dumps(seal(about)))
    found = of_run.room(config(tmp_path))
    assert found.level == "error" and "make room" in found.advice

    data: dict[str, object] = {"num_workers": 4, "global_batch": 10**9}
    found = machine.shared_memory(config(tmp_path, data=data), 2)
    assert found.level == "warning" and "--shm-size" in found.advice
    monkeypatch.setattr(machine, "_SMALLEST_SHM_BYTES", 1 << 60)
    assert machine.shared_memory(config(tmp_path, data=data), 2).level == "error"
    assert machine.shared_memory(config(tmp_path, data=data | {"num_workers": 0}), 2).level == "ok"
    assert machine.shared_memory(config(tmp_path, data=data | {"worker_type": "thread"}), 2).level == "ok"


def test_a_run_directory_that_takes_no_files(tmp_path: Path) -> None:
    assert of_run.run_directory(config(tmp_path)).level == "ok"
    assert not list(tmp_path.iterdir()), "the check leaves nothing behind"
    found = of_run.run_directory(config(tmp_path, run={"dir": "/proc/run"}))
    assert found.level == "error" and "in /proc files cannot be written" in found.found
    (tmp_path / "file").touch()
    found = of_run.run_directory(config(tmp_path, run={"dir": str(tmp_path / "file" / "run")}))
    assert found.level == "error"


def test_an_owner_that_is_alive_stops_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner.take(tmp_path / "run", 60, print)
    with pytest.raises(BadInput, match=f"owner: a run that is going on .*process {os.getpid()}"):
        check_before_start(config(tmp_path), 2)
    record = json.loads((tmp_path / "run" / "owner.json").read_text())
    (tmp_path / "run" / "owner.json").write_text(json.dumps(record | {"ancestors": [1]}))
    found = of_run.owner(config(tmp_path))
    assert found.level == "warning" and "waits for it to save and end" in found.advice
    owner.give_back()
    (tmp_path / "run" / "owner.json").write_text("of something else")
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.owner._SECONDS_TO_WRITE", 0.2)
        with pytest.raises(BadInput, match="owner.json is no record of an owner"):
            check_before_start(config(tmp_path), 2)
    (tmp_path / "run" / "owner.json").unlink()
    start = time.monotonic()
    check_before_start(config(tmp_path), 2)
    assert time.monotonic() - start < 2


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = dict(line.split(">=") for line in asked)
    assert {name: (lowest[name], pins[name]) for name in machine.TESTED} == machine.TESTED


def test_versions_below_and_above_the_tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.versions().level == "ok"
    monkeypatch.setitem(machine.TESTED, "torch", ("99.0", "99.1"))
    assert machine.versions().level == "error" and "older than 99.0" in machine.versions().found
    monkeypatch.setitem(machine.TESTED, "torch", ("1.0", "1.1"))
    assert machine.versions().level == "warning" and "newer than the tested 1.1" in machine.versions().found
    monkeypatch.setitem(machine.TESTED, "no-such-package", ("1", "1"))
    assert "no-such-package is not installed" in machine.versions().found


def test_a_token_is_found_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thesecretitself")
    found = machine.token(None)
    assert found.level == "ok" and "secret" not in f"{found}"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    on_hub = config(tmp_path, data={"train": "hf://datasets/someone/something"})
    assert machine.token(on_hub).level == "warning" and machine.token(None).level == "ok"


def test_threads_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert machine.threads(2).level == "warning"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert machine.threads(2).level == "ok"
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1")
    assert machine.time_limits(config(tmp_path)).advice == "run.stop_before: 5m"
    assert machine.time_limits(config(tmp_path, run={"stop_before": "5m"})).level == "ok"


def test_the_command_says_what_would_stop_a_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"run": {"dir": str(tmp_path / "run")}, "data": {"train": str(tmp_path / "nowhere")}}))
    done = triptych("doctor", str(path), "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 2 and found["ok"] is False
    wrong = [check for check in found["checks"] if check["level"] == "error"]
    assert [check["name"] for check in wrong] == ["data"] and "nowhere" in wrong[0]["found"]
    names = {check["name"] for check in found["checks"]}
    assert {"versions", "JIT locks", "port", "/dev/shm", "room", "run directory", "owner", "GPUs"} <= names
    assert not (tmp_path / "run").exists()
    alone = triptych("doctor")
    assert alone.returncode == 0, alone.stdout
    assert "versions" in alone.stdout and "data" not in alone.stdout.split()

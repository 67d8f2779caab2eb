"""One writer: of several starters one wins, an owner that is gone is followed, and a run that was displaced notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_pipelines.errors import BadInput
from pretrain.owner import OWNER_FILE, Owner, OwnershipLost, Record, is_gone, read_owner
from tests.ranks import ROOT

# Takes the folder, says so, and gives it back when its standard input ends.
PROGRAM = """
import sys
from pathlib import Path
from pretrain.owner import Owner
from data_pipelines.errors import BadInput
sys.stdin.readline()
try:
    owner = Owner.take(Path(sys.argv[1]), float(sys.argv[2]), lambda line: print(line, file=sys.stderr))
except BadInput as error:
    print("refused", error, flush=True)
    sys.exit(2)
print("taken", flush=True)
sys.stdin.readline()
owner.give_back()
"""


@pytest.fixture
def starters(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in found:
        process.kill()
        process.communicate()


def start(starters: list[subprocess.Popen[str]], folder: Path, stale: float = 60, **more: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(stale)]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    starters.append(process)
    return process


def go(process: subprocess.Popen[str]) -> str:
    """Let a starter begin, and return what it says."""
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def take(folder: Path, stale_seconds: float = 60.0) -> tuple[Owner, list[str]]:
    said: list[str] = []
    return Owner.take(folder, stale_seconds, said.append), said


def forge(folder: Path, record: Record) -> None:
    (folder / OWNER_FILE).write_text(json.dumps(asdict(record)))


def elsewhere(owner: Record) -> Record:
    """The same owner, as another host would have written it."""
    return replace(owner, host="node7", boot_id="another", token="token-of-node7")


def test_a_second_starter_is_refused_with_the_owner_named(tmp_path: Path) -> None:
    owner, said = take(tmp_path / "run")
    assert not said
    with pytest.raises(BadInput) as refused:
        take(tmp_path / "run")
    text = str(refused.value)
    assert f"process {os.getpid()}" in text and os.uname().nodename in text and "since 20" in text
    assert "stop that one first, or use another run.dir" in text
    owner.check()
    owner.give_back()
    assert not list((tmp_path / "run").iterdir())
    again, said = take(tmp_path / "run")
    again.give_back()
    assert not said


def test_of_many_starters_at_once_exactly_one_wins(tmp_path: Path, starters: list[subprocess.Popen[str]]) -> None:
    first = start(starters, tmp_path)
    assert go(first) == "taken"
    first.kill()
    first.wait()
    # A stale owner is there, so all of them try to follow it.
    several = [start(starters, tmp_path) for _ in range(6)]
    with ThreadPoolExecutor(len(several)) as pool:
        answers = list(pool.map(go, several))
    assert sorted(answer.split()[0] for answer in answers) == ["refused"] * 5 + ["taken"], answers
    winner = several[answers.index("taken")]
    assert read_owner(tmp_path).pid == winner.pid  # type: ignore[union-attr]
    assert all(f"process {winner.pid}" in answer for answer in answers if answer != "taken")
    assert {path.name for path in tmp_path.iterdir()} == {OWNER_FILE}


def test_a_killed_owner_is_followed_at_once_and_an_heir_that_died_too(
    tmp_path: Path, starters: list[subprocess.Popen[str]]
) -> None:
    dead = start(starters, tmp_path)
    assert go(dead) == "taken"
    dead.send_signal(signal.SIGKILL)
    before = time.monotonic()
    # Not waited for: its parent has not asked yet how it ended, and yet it is gone.
    while (record := read_owner(tmp_path)) is None or not is_gone(record):
        assert time.monotonic() < before + 10
    heir = replace(record, token="heir-that-died")
    (tmp_path / f".owner-after-{record.token}").write_text(json.dumps(asdict(heir)))
    owner, said = take(tmp_path)
    assert said == [f"took {tmp_path} over from {record}: its process has ended"]
    assert time.monotonic() - before < 5
    owner.give_back()
    assert not list(tmp_path.iterdir())


def test_a_process_id_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    owner, _ = take(tmp_path)
    record = read_owner(tmp_path)
    assert record is not None and is_gone(record) is False
    assert is_gone(replace(record, started=record.started - 1)) is True
    assert is_gone(replace(record, pid_namespace=1)) is None and is_gone(elsewhere(record)) is None
    owner.give_back()


def test_an_owner_that_lost_its_launcher_is_waited_for(tmp_path: Path, starters: list[subprocess.Popen[str]]) -> None:
    ending = start(starters, tmp_path)
    assert go(ending) == "taken"
    record = read_owner(tmp_path)
    assert record is not None and record.ancestors == [os.getpid()]
    forge(tmp_path, replace(record, ancestors=[1]))
    with ThreadPoolExecutor(1) as pool:
        kill = pool.submit(lambda: (time.sleep(1.0), ending.kill()))
        owner, said = take(tmp_path)
        kill.result()
    owner.give_back()
    assert "its process has ended" in said[0]


def test_an_owner_elsewhere_is_watched_by_our_own_clock(tmp_path: Path, starters: list[subprocess.Popen[str]]) -> None:
    owner, _ = take(tmp_path / "model")
    model = elsewhere(replace(read_owner(tmp_path / "model"), beat_seconds=0.1))  # type: ignore[type-var]
    owner.give_back()
    run = tmp_path / "run"
    run.mkdir()
    # A clock that is years behind makes no difference.
    forge(run, replace(model, heartbeat=1.0))
    before = time.monotonic()
    owner, said = take(run, 1.0)
    assert time.monotonic() - before >= 1.0
    assert "watching its heartbeat for 1 s" in said[0] and "stood still for 1 s" in said[1]
    owner.give_back()

    forge(run, model)
    with ThreadPoolExecutor(1) as pool:
        beating = pool.submit(lambda: (time.sleep(0.5), forge(run, replace(model, heartbeat=2.0))))
        with pytest.raises(BadInput, match="host node7"):
            take(run, 3.0)
        beating.result()


def test_a_requeued_job_follows_itself_at_once(tmp_path: Path, starters: list[subprocess.Popen[str]]) -> None:
    job = start(starters, tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    record = Record("node7", "boot", 1, 2, 3, [4], "7", 0, "yesterday", "t", 10.0, 1.0)
    forge(tmp_path, record)
    assert go(job) == "taken"
    other = start(starters, tmp_path / "other", 1, SLURM_JOB_ID="8", SLURM_RESTART_COUNT="1")
    (tmp_path / "other").mkdir()
    forge(tmp_path / "other", replace(record, beat_seconds=0.1))
    assert go(other) == "taken"
    other.kill()
    assert "watching its heartbeat" in other.communicate()[1]
    job.kill()
    assert "job 7 was requeued" in job.communicate()[1]


def test_a_displaced_owner_notices_and_harms_nothing(tmp_path: Path) -> None:
    owner, _ = take(tmp_path, 0.6)
    record = read_owner(tmp_path)
    assert record is not None
    time.sleep(0.4)
    beaten = read_owner(tmp_path)
    assert beaten is not None and beaten.heartbeat > record.heartbeat and beaten.token == record.token
    (tmp_path / "other.json").write_text(json.dumps(asdict(elsewhere(record))))
    os.replace(tmp_path / "other.json", tmp_path / OWNER_FILE)
    time.sleep(0.4)
    with pytest.raises(OwnershipLost, match="host node7.*stops without writing"):
        owner.check()
    owner.give_back()
    assert read_owner(tmp_path) == elsewhere(record)
    (tmp_path / OWNER_FILE).unlink()


def test_a_file_that_is_no_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.owner._SECONDS_TO_WRITE", 0.1)
    (tmp_path / OWNER_FILE).write_text("{}")
    with pytest.raises(BadInput, match="no record of an owner"):
        take(tmp_path)

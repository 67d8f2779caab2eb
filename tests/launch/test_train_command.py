"""Starting ranks: the status that comes back, the signals that reach them, and that nothing stays behind.

The ranks here are a small program with a real gloo group, under the real launcher; what `triptych train` does with a
real run is tested with the trainer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.errors import BadInput
from launch.processes import children
from launch.ranks import joint_status
from launch.train_command import default_num_processes, rank_environment, train_arguments, train_command

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
rank, mode, folder = int(os.environ["RANK"]), sys.argv[1], Path(sys.argv[2])
got = []


def end(status):
    # As pretrain.train ends: gloo's threads may abort an interpreter that shuts down around them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# torchelastic sends SIGTERM when another rank has failed, and waits 30 seconds for it.
for number in () if mode.startswith("one-") else (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda n, f: got.append(n))
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
(folder / f"rank-{rank}").write_text(f"{os.getpid()} {total.item()}")
if mode == "both-2":
    end(2)
if mode == "one-fails" and rank == 1:
    raise RuntimeError("the reason")
if mode == "one-killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if mode in ("loop", "deaf", "one-fails", "one-killed"):
    for _ in range(1200):
        time.sleep(0.05)
        stop = torch.tensor([len(got)])
        if mode == "loop":
            dist.all_reduce(stop)
        if mode == "loop" and stop.item():
            time.sleep(rank)
            (folder / f"saved-{rank}").write_text(str(got))
            end(75)
dist.destroy_process_group()
end(0)
"""

SUPERVISOR = """
import os, sys
from pathlib import Path
from launch.supervisor import Job, supervise
from launch.train_command import rank_environment, train_arguments
from pretrain.config import SupervisorConfig
command = train_arguments(Path("x.yaml"), (), 2, "auto")
command = [*command[: command.index("pretrain.train") - 1], *sys.argv[1:]]
job = Job(command, rank_environment(os.environ, 2), Path(sys.argv[3]), "the command again", range(2))
sys.exit(supervise(job, SupervisorConfig()))
"""


class Running:
    """A supervisor with two ranks of PROGRAM below it."""

    def __init__(self, tmp_path: Path, mode: str) -> None:
        self.folder = tmp_path / mode
        self.folder.mkdir(parents=True)
        program = self.folder / "program.py"
        program.write_text(PROGRAM)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(program), mode, str(self.folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pids: list[int] = []

    def wait_until_up(self) -> Running:
        deadline = time.monotonic() + 60
        marks = [self.folder / f"rank-{rank}" for rank in (0, 1)]
        while not all(mark.exists() and mark.read_text() for mark in marks):
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.05)
        assert all(mark.read_text().endswith(" 2.0") for mark in marks)
        (self.launcher,) = children(self.process.pid)
        self.pids = [self.launcher, *(int(mark.read_text().split()[0]) for mark in marks)]
        return self

    def end(self) -> tuple[int, str]:
        try:
            _, stderr = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        deadline = time.monotonic() + 10
        while left := [pid for pid in self.pids if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.05)
        return self.process.returncode, stderr


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_the_ranks_own_status_comes_back(tmp_path: Path) -> None:
    cases = [
        ("done", 0, ""),
        ("both-2", 2, ""),
        ("one-fails", 1, "the reason"),
        ("one-killed", 76, "rank 1: killed by SIGKILL"),
    ]
    for mode, status, says in cases:
        code, stderr = Running(tmp_path, mode).end()
        assert code == status and says in stderr, stderr
        assert "ChildFailedError" not in stderr and "torch.distributed.elastic" not in stderr, stderr


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_reaches_the_ranks_and_75_comes_back(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    running = Running(tmp_path, "loop").wait_until_up()
    running.process.send_signal(number)
    code, stderr = running.end()
    assert code == 75, stderr
    assert "the same command goes on from there" in stderr
    assert all(str(number.value) in (running.folder / f"saved-{rank}").read_text() for rank in (0, 1))


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_a_killed_supervisor_leaves_nothing_behind(tmp_path: Path) -> None:
    running = Running(tmp_path, "loop").wait_until_up()
    running.process.kill()
    running.end()
    assert not list(running.folder.glob("triptych-*"))
    assert all((running.folder / f"saved-{rank}").exists() for rank in (0, 1))


@pytest.mark.parametrize(("name", "status"), [("SIGUSR1", 75), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_before_any_rank_ends_the_launcher(name: str, status: int) -> None:
    code = (
        f"import os, signal as s; from launch.ranks import _PassOn; _PassOn(); os.kill(os.getpid(), s.{name}); print()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == status and done.stdout == ""


@pytest.mark.parametrize(
    ("codes", "passed", "status"),
    [
        ((), (), 0),
        ((0, 0), (), 0),
        ((2, -15), (), 2),
        ((1, 2), (), 2),
        ((-15, 1), (), 1),
        ((75, 75), (), 75),
        ((75, 1), (), 1),
        ((75, -15), (), 75),
        ((75, -9), (), 137),
        ((1, -9), (), 137),
        ((1, -6), (), 1),
        ((0, -6), (), 134),
        ((-15, -15), (), 143),
        ((-10, -10), (10,), 75),
        ((-10, 0), (), 138),
        ((130, 75), (), 130),
    ],
)
def test_joint_status(codes: tuple[int, ...], passed: tuple[int, ...], status: int) -> None:
    assert joint_status(codes, passed) == status


def test_the_environment_of_the_ranks() -> None:
    before = {"PATH": "/bin", "RANK": "3", "MASTER_ADDR": "x", "ACCELERATE_USE_CPU": "true", "HF_HOME": "/h"}
    after = rank_environment(before, 2)
    assert {"PATH", "HF_HOME", "OMP_NUM_THREADS"} <= set(after)
    assert not {"RANK", "MASTER_ADDR", "ACCELERATE_USE_CPU"} & set(after)
    assert rank_environment({"OMP_NUM_THREADS": "7"}, 2)["OMP_NUM_THREADS"] == "7"
    assert int(rank_environment({}, 10_000)["OMP_NUM_THREADS"]) == 1


def test_the_command_carries_everything_on() -> None:
    command = train_arguments(Path("c.yaml"), ["a.b=1 2", "c={x: 1}"], 3, "never")
    assert command[command.index("pretrain.train") :] == [
        *("pretrain.train", "c.yaml", "--resume", "never", "--set", "a.b=1 2", "--set", "c={x: 1}"),
    ]
    allowed = train_arguments(Path("c.yaml"), (), 1, "auto", allow_change=["data.train", "train"])
    assert allowed[-4:] == ["--allow-change", "data.train", "--allow-change", "train"]
    assert command[command.index("--num_processes") + 1] == "3"
    assert Path(command[command.index("--config_file") + 1]).is_file()
    assert default_num_processes() >= 1


def test_a_wrong_config_or_checkpoint_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such config file"):
        train_command(tmp_path / "nope.yaml")
    good = tmp_path / "good.yaml"
    good.write_text(json.dumps({"run": {"dir": str(tmp_path / "run")}, "data": {"train": "d"}}))
    with pytest.raises(BadInput, match="--resume elsewhere"):
        train_command(good, resume="elsewhere")
    assert not (tmp_path / "run").exists()

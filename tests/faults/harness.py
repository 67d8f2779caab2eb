"""A real run under `triptych train`, and hands on its processes and files from outside.

Nothing here is known to the program under test: faults are signals, files and disks. A fault that needs a moment waits
for what a bystander can see, the lines of metrics.jsonl and the folder of checkpoints.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from pretrain import checkpoint
from tests.ranks import ROOT
from tests.small_run import config_text, small_dataset

COMMAND = [sys.executable, "-c", "from launch.cli import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def recipe(folder: Path, name: str, stage: int = 2, **changes: dict[str, Any]) -> Path:
    """A config of a small run in `folder/name`, with datasets beside it; sections given by name are changed."""
    for split, numbers in (("train", range(40)), ("test", range(100, 112))):
        if not (folder / split).exists():
            small_dataset(folder / split, split, numbers)
    raw = yaml.safe_load(config_text(folder / name, folder / "train", folder / "test", stage))
    raw["data"]["num_workers"] = 1
    raw["checkpoint"] = {"every_steps": 5, "keep_last": 3}
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


class Running:
    """One `triptych train` and everything below it."""

    def __init__(self, config: Path, *options: str, num_processes: int = 2) -> None:
        self.config = config
        self.run_dir = Path(yaml.safe_load(config.read_text())["run"]["dir"])
        newest, _ = checkpoint.find_latest(self.run_dir)
        self._from = newest.step if newest else 0
        self._started = time.time()
        self._log = config.with_suffix(f".{time.monotonic_ns()}.log")
        self._seen: dict[int, psutil.Process] = {}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "train", str(config), "--nproc", str(num_processes), *options],
                cwd=ROOT,
                env=ENVIRONMENT,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """Everything that it printed so far."""
        return self._log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether the command itself has not ended."""
        return self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """All its processes that are alive, also those that have lost their parent since they were last seen."""
        try:
            root = psutil.Process(self.process.pid)
            for one in [root, *root.children(recursive=True)]:
                self._seen.setdefault(one.pid, one)
        except psutil.NoSuchProcess:
            pass
        for one in list(self._seen.values()):
            try:
                for child in one.children(recursive=True):
                    self._seen.setdefault(child.pid, child)
            except psutil.NoSuchProcess:
                continue
        return [one for one in self._seen.values() if _alive(one) and one.pid != self.process.pid or self._is_up(one)]

    def _is_up(self, one: psutil.Process) -> bool:
        return one.pid == self.process.pid and self.running

    def ranks(self) -> list[psutil.Process]:
        """The training processes, by rank."""
        found = {}
        for one in self.family():
            try:
                environment, line = one.environ(), one.cmdline()
            except psutil.Error:
                continue
            # A data worker is a fork of its rank, with the same command line.
            if "RANK" in environment and "pretrain.train" in line and not _is_fork(one):
                found[int(environment["RANK"])] = one
        return [found[rank] for rank in sorted(found)]

    def workers(self) -> list[psutil.Process]:
        """The data workers of all ranks, by the name that torch gives them."""
        return [child for rank in self.ranks() for child in rank.children() if _is_data_worker(child)]

    def launcher(self) -> psutil.Process:
        """The process that started the ranks."""
        parent = self.ranks()[0].parent()
        assert parent is not None
        return parent

    def step(self) -> int:
        """The last step with a line in metrics.jsonl; 0 before the first."""
        lines = metrics(self.run_dir)
        return int(lines[-1]["step"]) if lines else 0

    def has_trained(self) -> bool:
        """Whether this start has done a step; lines of an earlier one do not count."""
        path = self.run_dir / "metrics.jsonl"
        return path.exists() and path.stat().st_mtime > self._started and self.step() > self._from

    def wait_for(self, what: Callable[[], bool], seconds: float = 120) -> bool:
        """Wait until `what`, and say true; false once the command has ended before that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if what():
                return True
            if not self.running:
                return False
            time.sleep(0.02)
        raise AssertionError(f"nothing in {seconds} s; it said:\n{self.said[-4000:]}")

    def wait_for_step(self, step: int, seconds: float = 120) -> bool:
        """Wait until that step is done; false once the command has ended before that."""
        return self.wait_for(lambda: self.step() >= step, seconds)

    def end(self, seconds: float = 180) -> int:
        """Wait for the command's end, see that nothing of it is left, and return its status."""
        self.family()
        try:
            status = self.process.wait(timeout=seconds)
            limit = time.monotonic() + 15
            while left := self.family():
                assert time.monotonic() < limit, f"left behind: {[one.cmdline() for one in left]}"
                time.sleep(0.05)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s; it said:\n{self.said[-4000:]}") from None
        finally:
            self.kill()
        return status

    def kill(self) -> None:
        """SIGKILL to everything, at once."""
        for one in self.family():
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait(timeout=30)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last one is left out."""
    path = run_dir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def incidents(run_dir: Path) -> list[dict[str, Any]]:
    """Every incident of a run, oldest first."""
    return sorted((json.loads(path.read_text()) for path in run_dir.glob("incident-*.json")), key=lambda i: i["time"])


def triptych(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Another command of ours, to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds
    )


def _alive(one: psutil.Process) -> bool:
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_data_worker(one: psutil.Process) -> bool:
    try:
        return _alive(one) and one.name() == "pt_data_worker"
    except psutil.NoSuchProcess:
        return False


def _is_fork(one: psutil.Process) -> bool:
    try:
        parent = one.parent()
        return parent is not None and parent.cmdline() == one.cmdline()
    except psutil.NoSuchProcess:
        return False

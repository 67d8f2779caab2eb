"""A supervisor over two ranks that do nothing but beat, as programs of their own, for tests that hurt them.

The ranks import no torch and their launcher is thirty lines, so that a case takes seconds; everything between launcher
and person is the real thing. What `launch.ranks` itself does is tested in test_train_command.py, and whole runs in
test_supervised_run.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.ranks import ROOT

# Ranks meet after each phase, through files, as the real ones do in collectives.
RANK = """
import os, signal, sys, time
from pathlib import Path
from pretrain.heartbeat import Pulse, answer_with_stacks
from pretrain.orphan import end_with_launcher

rank, fault, folder = int(os.environ["RANK"]), sys.argv[1], Path(sys.argv[2])
sys.path.insert(0, str(folder / "torch" / "distributed"))
from meeting import meet

asked = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda n, f: asked.append(n))
end_with_launcher()
answer_with_stacks(rank)
pulse = Pulse(rank)
(folder / f"pid-{rank}").write_text(str(os.getpid()))


first = folder / f"begun-{rank}"
start = int(first.read_text()) if first.exists() else 0
first.write_text(str(start + 1))
if fault == "start" and rank == 1:
    time.sleep(600)
done = folder / "step"
step = int(done.read_text()) if done.exists() else 0
for old in folder.glob(f"*-*-{rank}"):
    if old.name[0].isdigit():
        old.unlink()
if start:
    time.sleep(0.3)
while step < 2000:
    step += 1
    for phase in ("data", "forward", "backward", "optimizer"):
        pulse.beat(phase, step)
        if rank == 1 and step == 3 + (start if fault.endswith("-later") else 0) and phase == "backward":
            what = fault.removesuffix("-later").removesuffix("-once")
            if fault.endswith("-once") and start:
                what = ""
            if what == "sleep":
                time.sleep(600)
            if what == "stopped-worker":
                worker = os.fork()
                os.kill(worker or os.getpid(), signal.SIGSTOP)
                os.waitpid(worker, 0)
            if what == "raise":
                error = ValueError("the reason")
                pulse.fail(error)
                os._exit(1)
            if what == "worker":
                error = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
                pulse.fail(error)
                os._exit(1)
        meet(folder, step, phase, rank)
    if rank == 0:
        done.write_text(str(step))
    stop = folder / "stop"
    if asked and fault != "deaf" and not stop.exists():
        stop.write_text(str(step + 2))
    if stop.exists() and step == int(stop.read_text() or -1):
        pulse.beat("checkpoint", step)
        (folder / f"saved-{rank}").write_text(str(asked))
        os._exit(75)
    if fault in ("", "raise-once") and step > 20:
        os._exit(0)
    time.sleep(0.02)
"""

# Where it lies is how the supervisor knows a collective in a stack.
MEETING = """
import time


def meet(folder, step, phase, rank):
    (folder / f"{step}-{phase}-{rank}").touch()
    while not (folder / f"{step}-{phase}-{1 - rank}").exists():
        time.sleep(0.01)
"""

LAUNCHER = """
import json, os, signal, subprocess, sys
from pathlib import Path

os.environ.update(TORCHELASTIC_RUN_ID="x", TRIPTYCH_LAUNCHER=str(os.getpid()))
ranks = [subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "RANK": str(r)}) for r in (0, 1)]
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda n, f: [rank.send_signal(n) for rank in ranks])
codes = []
for _ in ranks:
    pid, status = os.waitpid(-1, 0)
    codes.append(([rank.pid for rank in ranks].index(pid), os.waitstatus_to_exitcode(status)))
    if codes[-1][1] not in (0, 75):
        Path(os.environ["TRIPTYCH_HEARTBEATS"], "ended.json").write_text(json.dumps(codes[-1:]))
        for rank in ranks:
            rank.kill()
        os._exit(codes[-1][1] if codes[-1][1] > 0 else 128 - codes[-1][1])
os._exit(max(code for _, code in codes))
"""

SUPERVISOR = """
import os, sys
from pathlib import Path
from launch.supervisor import Job, supervise
from pretrain.config import SupervisorConfig
folder = Path(sys.argv[3])
job = Job([sys.executable, *sys.argv[4:]], os.environ, folder, "triptych train again.yaml", range(2))
sys.exit(supervise(job, SupervisorConfig.model_validate_json(sys.argv[1])))
"""


class Supervised:
    """A supervisor with a launcher and two ranks below it."""

    def __init__(self, folder: Path, fault: str, **settings: float) -> None:
        (folder / "torch" / "distributed").mkdir(parents=True)
        self.folder = folder
        files = {"rank.py": RANK, "launcher.py": LAUNCHER, "torch/distributed/meeting.py": MEETING}
        for name, text in files.items():
            (folder / name).write_text(text)
        command = [str(folder / "launcher.py"), str(folder / "rank.py"), fault, str(folder)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, json.dumps(settings), fault, str(folder), *command],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, path: str, seconds: float = 60) -> str:
        """The content of a file of the folder, once it has any."""
        end = time.monotonic() + seconds
        file = self.folder / path
        while not file.exists() or not file.read_text():
            assert time.monotonic() < end and self.process.poll() is None, f"no {path}"
            time.sleep(0.02)
        return file.read_text()

    def pid(self, rank: int) -> int:
        """Process id of a rank, once it is past its second step."""
        end = time.monotonic() + 60
        while int(self.wait_for("step")) < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
        return int(self.wait_for(f"pid-{rank}"))

    def signal_rank(self, rank: int, number: int) -> None:
        os.kill(self.pid(rank), number)

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """Exit status and standard error; nothing of it may be left."""
        try:
            _, errors = self.process.communicate(timeout=seconds)
        finally:
            self.process.kill()
        self.nothing_is_left()
        return self.process.returncode, errors

    def nothing_is_left(self, seconds: float = 1.0) -> None:
        end = time.monotonic() + seconds
        while left := processes_with(str(self.folder)):
            assert time.monotonic() < end, left
            time.sleep(0.05)

    def incident(self) -> dict[str, Any]:
        (file,) = self.folder.glob("incident-*.json")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "logs" / "supervisor.jsonl").read_text().splitlines()]


def processes_with(word: str) -> dict[int, str]:
    """Live processes with a word in their command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if word in line and state not in "ZX":
                found[int(entry.name)] = line
    return found

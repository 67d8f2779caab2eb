"""`triptych train`: check the config, start the ranks, pass signals on, and end as they end.

The ranks run under `launch.ranks` (accelerate's launcher) in a process group of its own. This process stays small: it
imports no torch, and it makes sure that nothing it started outlives it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from data_pipelines.errors import BadInput
from launch.ranks import PASSED_ON, RUN_AGAIN, children
from pretrain.changes import check_fields
from pretrain.config import load_config

ACCELERATE_CONFIGS = Path(__file__).parent / "accelerate"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_OTHER_WORLDS = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_USE_CPU",
}


def train_command(
    config: Path,
    overrides: Sequence[str] = (),
    num_processes: int | None = None,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
) -> int:
    """Train on this machine and return the exit status of the ranks.

    Args:
        config: YAML file of the run.
        overrides: `key=value` settings that win over the file.
        num_processes: ranks; by default one a GPU, or two on a CPU with at least two cores.
        resume: `auto` goes on from the newest valid checkpoint, `never` starts anew, a path goes on from that one.
        allow_change: settings and sections that may differ from the checkpoint's.

    Raises:
        BadInput: the config, an override, a field of `allow_change` or the path to resume from is wrong.
    """
    load_config(config, overrides)
    check_fields(allow_change)
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise BadInput(f"--resume {resume}: no such checkpoint folder; give auto, never, or .../checkpoints/step-N")
    ranks = num_processes or default_num_processes()
    return supervise(
        train_arguments(config, overrides, ranks, resume, allow_change), rank_environment(os.environ, ranks)
    )


def default_num_processes() -> int:
    """GPUs there are; without any, two processes where there are two cores."""
    # Asking torch costs seconds, so only where a driver has left its device files.
    if _has_gpu_driver():
        import torch

        if torch.cuda.device_count():
            return int(torch.cuda.device_count())
    return min(2, len(os.sched_getaffinity(0)))


def train_arguments(
    config: Path, overrides: Sequence[str], num_processes: int, resume: str, allow_change: Sequence[str] = ()
) -> list[str]:
    """The command that starts the ranks on one machine."""
    # A config file of ours keeps accelerate from reading the user's default one. Port 0 is a free one, so that two runs
    # on one machine do not meet.
    recipe = ACCELERATE_CONFIGS / ("node-8.yaml" if _has_gpu_driver() else "cpu-2.yaml")
    arguments = [sys.executable, "-m", "launch.ranks", "--config_file", str(recipe)]
    arguments += ["--num_processes", str(num_processes), "--main_process_port", "0"]
    arguments += ["-m", "pretrain.train", str(config), "--resume", resume]
    for override in overrides:
        arguments += ["--set", override]
    for field in allow_change:
        arguments += ["--allow-change", field]
    return arguments


def rank_environment(environment: Mapping[str, str], num_processes: int) -> dict[str, str]:
    """The environment of the ranks: without a GPU, accelerate has to be told to run DeepSpeed on the CPU."""
    # Left over from another launcher's shell, these would make every rank believe that it belongs to that world.
    result = {name: value for name, value in environment.items() if name not in _OTHER_WORLDS}
    result.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    result.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not _has_gpu_driver():
        result.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    return result


def supervise(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end, passing signals on, and return its exit status; nothing it started stays behind.

    The first SIGINT, SIGTERM or SIGUSR1 asks the ranks to save and stop; a further SIGINT or SIGTERM kills them, and
    the status is then 128 plus its number. Must be called from the main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    own_pid = os.getpid()
    others = set(children(own_pid))
    stops: list[int] = []
    killed_by: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != own_pid:
            os._exit(1)

    def handle(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1 and any(stop != signal.SIGUSR1 for stop in stops):
            killed_by.append(number)
            _kill(_descendants(own_pid, others))
            return
        stops.append(number)
        print("triptych: stopping with a checkpoint; a second signal stops at once", file=sys.stderr, flush=True)
        for child in running:
            child.send_signal(number)

    before = {number: signal.signal(number, handle) for number in PASSED_ON}
    # Should the launcher die, its ranks become our children instead of init's, and can be found.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        child = subprocess.Popen(
            list(arguments), env=dict(environment), stdin=subprocess.DEVNULL, process_group=0, preexec_fn=in_child
        )
        running.append(child)
        for number in stops:
            child.send_signal(number)
        status = child.wait()
    finally:
        _end_all(own_pid, others)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    if killed_by:
        return 128 + killed_by[0]
    if status < 0:
        print(f"triptych: the launcher was killed by signal {-status}; its ranks are ended too", file=sys.stderr)
    if status == RUN_AGAIN:
        print("triptych: stopped with a checkpoint; the same command goes on from there", file=sys.stderr)
    return status if status >= 0 else 128 - status


def _has_gpu_driver() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _end_all(root: int, others: set[int]) -> None:
    """Kill what is left below `root` besides `others`, and reap what became its child."""
    for _ in range(250):
        left = _descendants(root, others)
        if not left:
            return
        _kill(left)
        for pid in children(root):
            if pid not in others:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    continue
        time.sleep(0.02)


def _kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _descendants(root: int, others: set[int]) -> list[int]:
    found = [pid for pid in children(root) if pid not in others]
    for pid in list(found):
        found += _descendants(pid, others)
    return found

"""`triptych train`: check the config and the machine, and start the ranks of a run under a supervisor.

The ranks run under `launch.ranks` (accelerate's launcher) in a process group of its own.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.errors import BadInput
from launch.doctor import check_before_start
from launch.supervisor import Job, supervise
from pretrain.changes import check_fields
from pretrain.config import load_config

ACCELERATE_CONFIGS = Path(__file__).parent / "accelerate"
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
    """Train on this machine and return the exit status, as `supervise` says.

    Args:
        config: YAML file of the run.
        overrides: `key=value` settings that win over the file.
        num_processes: ranks; by default one a GPU, or two on a CPU with at least two cores.
        resume: `auto` goes on from the newest valid checkpoint, `never` starts anew, a path goes on from that one.
        allow_change: settings and sections that may differ from the checkpoint's.

    Raises:
        BadInput: the config, an override, a field of `allow_change` or the path to resume from is wrong.
    """
    settings = load_config(config, overrides)
    check_fields(allow_change)
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise BadInput(f"--resume {resume}: no such checkpoint folder; give auto, never, or .../checkpoints/step-N")
    ranks = num_processes or default_num_processes()
    check_before_start(settings, ranks)
    again = ["triptych", "train", str(config), *(word for override in overrides for word in ("--set", override))]
    if num_processes is not None:
        again += ["--nproc", str(num_processes)]
    for field in allow_change:
        again += ["--allow-change", field]
    job = Job(
        command=train_arguments(config, overrides, ranks, resume, allow_change),
        environment=rank_environment(os.environ, ranks),
        run_dir=Path(settings.run.dir),
        resume=shlex.join(again),
        ranks=range(ranks),
    )
    return supervise(job, settings.supervisor)


def default_num_processes() -> int:
    """GPUs there are; without any, two processes where there are two cores."""
    # Asking torch costs seconds, so only where a driver has left its device files.
    if has_gpu_driver():
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
    recipe = ACCELERATE_CONFIGS / ("node-8.yaml" if has_gpu_driver() else "cpu-2.yaml")
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
    if not has_gpu_driver():
        result.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    return result


def has_gpu_driver() -> bool:
    """Whether a driver has left the device files of a GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()

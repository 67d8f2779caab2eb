"""Claim: heartbeat, ledger and checks together take at most a hundredth of a step.

The demo's config trains on two ranks as `triptych train` starts it, with a supervisor above. In every rank the time
within each of the calls below is summed over all steps after the first ones, and divided by the time of these steps;
the supervisor's own CPU-seconds, and those of the launcher, come from outside. The gradient's norm is not in the sum,
since DeepSpeed computes it for clipping in any case, nor is the sum over ranks that carries the losses' counts too.

    python benchmarks/overhead.py [--steps 120]

Printed as JSON and kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.01
WARM_UP_STEPS = 20
TIMEOUT_SECONDS = 1200
WATCHED = {
    "heartbeat": [("pretrain.heartbeat", "Pulse.beat")],
    "ledger": [
        ("pretrain.trainer", "id_checksums"),
        ("pretrain.callbacks.ledger", "LedgerKeeper.on_step"),
    ],
    "numbers": [("pretrain.watch", "Watch.see_loss"), ("pretrain.watch", "Watch.accepts")],
    "stop requests": [("pretrain.stopping", "StopRequest.told"), ("pretrain.stopping", "StopRequest.agree")],
    "checkpoint": [
        ("pretrain.checkpoint.saver", "Saver.told"),
        ("pretrain.checkpoint.saver", "Saver.hear"),
        ("pretrain.checkpoint.saver", "Saver.before_update"),
    ],
}


def rank_main(out: Path, arguments: list[str]) -> int:
    """One rank: `pretrain.train` with a clock around what is watched."""
    from pretrain import train
    from pretrain.callbacks.logs import Console

    spent: dict[str, float] = defaultdict(float)
    steps: list[float] = []

    def timed(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def measured(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - started

        return measured

    for name, places in WATCHED.items():
        for module, attribute in places:
            *path, last = attribute.split(".")
            owner = functools.reduce(getattr, path, importlib.import_module(module))
            setattr(owner, last, timed(getattr(owner, last), name))
    on_step = Console.on_step

    def count(self: Any, trainer: Any, record: Any) -> None:
        if record.step == WARM_UP_STEPS:
            spent.clear()
        elif record.step > WARM_UP_STEPS:
            steps.append(record.step_seconds)
        on_step(self, trainer, record)

    Console.on_step = count  # type: ignore[method-assign]
    status = train.main(arguments)
    result = {"steps": len(steps), "step_seconds": sum(steps), "spent_seconds": dict(spent)}
    (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))
    return status


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """A run of the demo's config under its supervisor."""
    settings = {
        "run.dir": folder / "run",
        "train.max_steps": WARM_UP_STEPS + steps,
        "train.warmup_steps": 10,
        "checkpoint.every_steps": 10**6,
        "data.eval": "null",
    }
    words = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    accelerate = ["--config_file", str(ROOT / "launch/accelerate/cpu-2.yaml"), "--main_process_port", "0"]
    program = [str(Path(__file__)), "--rank-of", str(folder), str(ROOT / "configs/digits.yaml"), *words]
    starter = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from launch.supervisor import Job, supervise\n"
        "from launch.train_command import rank_environment\n"
        "from pretrain.config import SupervisorConfig\n"
        "job = Job(sys.argv[2:], rank_environment(os.environ, 2), Path(sys.argv[1]), '', range(2))\n"
        "sys.exit(supervise(job, SupervisorConfig()))\n"
    )
    command = [sys.executable, "-c", starter, str(folder / "run")]
    command += [sys.executable, "-m", "launch.ranks", *accelerate, *program]
    cpu: list[tuple[float, float]] = []
    with subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.DEVNULL) as supervisor:
        end = time.monotonic() + TIMEOUT_SECONDS
        while supervisor.poll() is None:
            if time.monotonic() > end:
                supervisor.terminate()
                raise SystemExit(f"the run did not end within {TIMEOUT_SECONDS} s")
            if len(_lines(folder / "run" / "metrics.jsonl")) >= WARM_UP_STEPS:
                cpu.append((time.monotonic(), _cpu_seconds(supervisor.pid)))
            time.sleep(0.2)
    if supervisor.returncode:
        raise SystemExit(f"the run ended with status {supervisor.returncode}")
    # The last reading may have missed the launcher's end.
    (first, before), (last, after) = cpu[0], max(cpu, key=lambda reading: reading[1])
    by_rank = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return {
        "steps": by_rank[0]["steps"],
        "step_seconds": round(by_rank[0]["step_seconds"] / by_rank[0]["steps"], 4),
        "microseconds_a_step": [
            {name: round(seconds / rank["steps"] * 1e6, 1) for name, seconds in rank["spent_seconds"].items()}
            for rank in by_rank
        ],
        "share_of_step": [round(sum(rank["spent_seconds"].values()) / rank["step_seconds"], 5) for rank in by_rank],
        "supervisor_and_launcher_share_of_a_core": round((after - before) / (last - first), 4),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _cpu_seconds(pid: int) -> float:
    """CPU-seconds of the supervisor and of the launcher below it, without the ranks."""
    total = 0.0
    try:
        supervisor = psutil.Process(pid)
        for process in [supervisor, *supervisor.children()]:
            times = process.cpu_times()
            total += times.user + times.system
    except psutil.NoSuchProcess:
        pass
    return total


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help=f"steps to measure, after {WARM_UP_STEPS} others (120)")
    if sys.argv[1:2] == ["--rank-of"]:
        status = rank_main(Path(sys.argv[2]), sys.argv[3:])
        sys.stdout.flush()
        os._exit(status)
    options = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        result = measure(Path(folder), options.steps)
    result |= {
        "target_share": TARGET,
        "reached": max(result["share_of_step"]) <= TARGET,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "load_average_before": [round(one, 1) for one in load],
    }
    text = json.dumps(result, indent=1)
    print(text)
    print(f"heartbeat, ledger and checks: {max(result['share_of_step']):.2%} of a step", file=sys.stderr)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"overhead-{time.strftime('%Y-%m-%d')}-cpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Claim: a checkpoint holds training up for at most a tenth of the time that the same save takes synchronously.

A model of the base preset's widths and a few of its layers trains under ZeRO-2 in fp32, with AdamW, on one rank and on
two. In one run, in turns, three saves of the same state:

  background   as a run saves: how long the loop stands still, and how long until the checkpoint is whole
  synchronous  the same save, waited for: written, hashed, flushed, named
  deepspeed    DeepSpeed's own `save_checkpoint`, which neither hashes nor flushes, for comparison

and the time of steps with and without a save in the background, and of what a step does for all this when nothing is
being saved.

    python benchmarks/checkpoint.py [--rounds 5] [--ranks 1 2] [--dir DIR]

Times are seconds, medians of the rounds; the first save, which also allocates its memory, is reported apart. Printed as
JSON and kept in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.1
QUIET_STEPS = 2
TIMEOUT_SECONDS = 1800
GLOBAL_BATCH = 4


def rank_main(run_dir: Path, rounds: int) -> None:
    """One rank: train, save in turns, and print the measurements on rank 0."""
    from pretrain.engine import prepare_environment

    prepare_environment()
    from pretrain.callbacks import Callback, StepRecord
    from pretrain.engine import Engine
    from pretrain.model.omni import OmniPretrainer
    from pretrain.trainer import Trainer
    from tests.pretrain.tiny import batch_of, sample, tiny_config, word_tokenizer

    config = tiny_config(
        str(run_dir),
        model={
            "preset": "base",
            "text": {"num_hidden_layers": 2},
            "vision": {"num_hidden_layers": 1},
            "audio": {"num_hidden_layers": 1},
        },
        data={**tiny_config().data.model_dump(), "global_batch": GLOBAL_BATCH},
        engine={"bucket_mb": 200},
        train={"max_steps": 10**6, "warmup_steps": 2},
        checkpoint={"every_steps": 10**6, "keep_last": 1},
    )
    engine = Engine(config)
    model = OmniPretrainer.build(config, word_tokenizer())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    engine.prepare(model)
    deepspeeds_own = engine.module.checkpoint_engine
    copy_scripts = engine.module._copy_recovery_script

    class Enough(Exception):
        """All rounds are done, on all ranks in the same step."""

    class Turns(Callback):
        """Saves in one way after the other, some quiet steps apart, and notes the time of each step."""

        def __init__(self) -> None:
            self.background: list[int] = []
            self.synchronous: list[float] = []
            self.deepspeed: list[float] = []
            self.quiet: list[float] = []
            self.busy: list[float] = []
            self._quiet_steps = 0

        def on_step(self, trainer: Trainer, record: StepRecord) -> None:
            (self.busy if trainer.saver.busy else self.quiet).append(record.step_seconds)

        def after_step(self, trainer: Trainer, record: StepRecord) -> None:
            self._quiet_steps = 0 if trainer.saver.busy else self._quiet_steps + 1
            if self._quiet_steps < QUIET_STEPS:
                return
            if len(self.background) > len(self.synchronous):
                self._synchronous(trainer, record.step)
                self._deepspeed()
            elif len(self.synchronous) > rounds:
                raise Enough
            else:
                self.background.append(record.step)
                trainer.saver.begin(record.step, {"step": record.step})
            self._quiet_steps = 0

        def _synchronous(self, trainer: Trainer, step: int) -> None:
            engine.barrier()
            started = time.perf_counter()
            trainer.saver.begin(step, {"step": step})
            saved = trainer.saver.wait()
            assert saved is not None and saved.reason is None
            self.synchronous.append(time.perf_counter() - started)

        def _deepspeed(self) -> None:
            engine.module.checkpoint_engine = deepspeeds_own
            engine.module._copy_recovery_script = copy_scripts
            engine.barrier()
            started = time.perf_counter()
            engine.module.save_checkpoint(str(run_dir / "deepspeeds-own"), tag="state")
            self.deepspeed.append(time.perf_counter() - started)
            engine.barrier()
            if engine.is_main:
                shutil.rmtree(run_dir / "deepspeeds-own")
            # What it left in the page cache is not to be flushed on another save's time.
            os.sync()
            engine.barrier()

    run_dir.mkdir(parents=True, exist_ok=True)
    turns = Turns()
    trainer = Trainer(config, engine, run_dir, "benchmark", 1000, [turns], lambda step: {})
    numbers = range(
        GLOBAL_BATCH * engine.rank // engine.world_size, GLOBAL_BATCH * (engine.rank + 1) // engine.world_size
    )

    def batches() -> Iterator[dict[str, Any]]:
        batch = batch_of([sample(number) for number in numbers])
        while True:
            yield batch

    with contextlib.suppress(Enough):
        trainer.run(batches())
    if engine.is_main:
        log = [json.loads(line) for line in (run_dir / "checkpoints.jsonl").read_text().splitlines()]
        own = [line for line in log if line["step"] in turns.background]
        median = statistics.median
        stall, synchronous = median(line["stall_seconds"] for line in own[1:]), median(turns.synchronous[1:])
        result = {
            "parameters": num_parameters,
            "bytes": own[-1]["bytes"],
            "stall_seconds": round(stall, 4),
            "synchronous_seconds": round(synchronous, 4),
            "stall_share": round(stall / synchronous, 4),
            "background_seconds": round(median(line["seconds"] for line in own[1:]), 4),
            "deepspeed_seconds": round(median(turns.deepspeed[1:]), 4),
            "first_stall_seconds": own[0]["stall_seconds"],
            "step_seconds": round(median(turns.quiet), 4),
            "step_seconds_while_saving": round(median(turns.busy), 4),
            "idle_microseconds_a_step": idle_microseconds(trainer),
            "stalls": [line["stall_seconds"] for line in own],
            "synchronous": [round(one, 4) for one in turns.synchronous],
        }
        result["idle_share_of_step"] = result["idle_microseconds_a_step"] / 1e6 / result["step_seconds"]
        print(json.dumps(result), flush=True)


def idle_microseconds(trainer: Any, times: int = 20_000) -> float:
    """What a step does for checkpoints and heartbeats when nothing is being saved: eight beats, tell and hear."""
    from pretrain.heartbeat import Pulse

    with tempfile.TemporaryDirectory() as folder:
        pulse = Pulse(0, folder)
        started = time.perf_counter()
        for step in range(times):
            trainer.saver.hear(trainer.saver.told())
            for phase in ("data", "forward", "forward", "backward", "optimizer", "checkpoint", "evaluate", "data"):
                pulse.beat(phase, step)
        return round((time.perf_counter() - started) / times * 1e6, 2)


def measure(folder: Path, world_size: int, rounds: int) -> dict[str, Any]:
    """Start the ranks and return what rank 0 measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    try:
        for rank in range(world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // world_size)),
                "PYTHONPATH": str(ROOT),
            }
            command = [
                sys.executable,
                __file__,
                "--rank-of",
                str(folder / f"run-{world_size}"),
                "--rounds",
                str(rounds),
            ]
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            ranks.append(subprocess.Popen(command, env=environment, stdout=out, text=True))
        text, _ = ranks[0].communicate(timeout=TIMEOUT_SECONDS)
        return dict(json.loads(text.strip().splitlines()[-1]))
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def steal_share(before: list[int], after: list[int]) -> float:
    """Share of the machine's time between two readings of /proc/stat that its host took away."""
    passed = [b - a for a, b in zip(before, after, strict=True)]
    return round(passed[7] / max(1, sum(passed[:8])), 4)


def machine_times() -> list[int]:
    """The first line of /proc/stat."""
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dir", type=Path, help="folder to write checkpoints below; the system's for temporary files")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank_main(options.rank_of, options.rounds)
        sys.stdout.flush()
        os._exit(0)
    from importlib.metadata import version

    load, before = os.getloadavg(), machine_times()
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.dir) as folder:
        by_ranks = {str(ranks): measure(Path(folder), ranks, options.rounds) for ranks in options.ranks}
    result = {
        "by_ranks": by_ranks,
        "target_stall_share": TARGET,
        "reached": all(one["stall_share"] <= TARGET for one in by_ranks.values()),
        "rounds": options.rounds,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "load_average_before": [round(one, 1) for one in load],
        "steal_share": steal_share(before, machine_times()),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "accelerate")},
    }
    text = json.dumps(result, indent=1)
    print(text)
    for ranks, one in by_ranks.items():
        print(f"{ranks} rank(s): the stall is {one['stall_share']:.1%} of the synchronous time", file=sys.stderr)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"checkpoint-{time.strftime('%Y-%m-%d')}-cpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Claim: `triptych plan` predicts a rank's peak memory within 10 %, and the FLOPs of a step within 3 %.

Each case is a preset, a ZeRO stage and two micro-batch sizes on two CPU processes, in fp32: the ranks load the embedded
digits with the run's own loader, and train with its own loop and engine, one step to warm up and two that are
measured. Peak memory is the kernel's (VmHWM of /proc/PID/status), set back before each size; FLOPs are counted by
`torch.utils.flop_counter` in one more step. No checkpoint is written: what a save adds is planned apart.

    python benchmarks/plan.py [--presets tiny base] [--stages 1 2 3] [--dir DIR]

Bytes are of the rank that took most. Printed as JSON and kept in benchmarks/results/, case by case, so that a run that
was stopped goes on.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORLD_SIZE = 2
TIMEOUT_SECONDS = 1800
MEMORY_TARGET, FLOPS_TARGET = 0.10, 0.03
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"config": "configs/digits.yaml", "micro_batches": (16, 64), "set": []},
    "base": {
        "config": "configs/base.yaml",
        "micro_batches": (1, 4),
        "set": ["engine.precision=fp32", "data.image.size=192"],
    },
}


def settings(preset: str, stage: int, micro_batch: int, folder: Path) -> list[str]:
    """Overrides of the preset's config."""
    return [
        *PRESETS[preset]["set"],
        f"run.dir={folder / 'run'}",
        f"data.train={folder / 'digits'}",
        "data.eval=null",
        f"data.build=[{{source: digits, split: train, out: {folder / 'digits'}}}]",
        f"data.micro_batch={micro_batch}",
        f"data.global_batch={WORLD_SIZE * micro_batch}",
        "data.num_workers=0",
        "train.max_steps=1",
        "train.warmup_steps=1",
        f"engine.zero_stage={stage}",
    ]


def rank_main(preset: str, stage: int, folder: Path) -> None:
    """One rank: train with each micro-batch size, and print what it took."""
    from pretrain.engine import prepare_environment

    prepare_environment()
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    from data_pipelines.loader import build_loader
    from launch.plan.trace import CPU_ATTENTION
    from pretrain.callbacks.evaluation import Evaluation  # noqa: F401
    from pretrain.callbacks.ledger import LedgerKeeper  # noqa: F401
    from pretrain.callbacks.logs import TensorBoard
    from pretrain.config import load_config
    from pretrain.engine import Engine
    from pretrain.model.omni import OmniPretrainer
    from pretrain.train import build_datasets
    from pretrain.trainer import Trainer, split

    flop_registry.update(CPU_ATTENTION)
    sizes = PRESETS[preset]["micro_batches"]
    configs = [load_config(ROOT / PRESETS[preset]["config"], settings(preset, stage, size, folder)) for size in sizes]
    build_datasets(configs[0])
    engine = Engine(configs[0])
    loader = build_loader(configs[0], engine.rank, engine.world_size)
    engine.prepare(OmniPretrainer.build(configs[0], loader.tokenizer))
    if engine.is_main:
        TensorBoard(folder / "tensorboard")
    found = []
    for size, config in zip(sizes, configs, strict=True):
        trainer = Trainer(config, engine, folder, "benchmark", 1000, [], lambda step: {})
        batch = next(iter(build_loader(config, engine.rank, engine.world_size)))
        engine.module.train()
        micro = split(batch, 1)
        plans = [engine.model.plan(each) for each in micro]
        counts = {name: sum(plan.counts[name] for plan in plans) for name in ("text", "image", "audio")}
        # The first step makes the moments, has ZeRO-3 learn the order of the modules, and is counted.
        with FlopCounterMode(display=False) as counter:
            trainer.backward(micro, plans, counts)
        engine.update(1e-4, lambda norm: True)
        before = reset_peak()
        trainer.backward(micro, plans, counts)
        after_pass = peak()
        engine.update(1e-4, lambda norm: True)
        found.append(
            {
                "micro_batch": size,
                "resident_bytes_before": before,
                "peak_bytes_of_pass": after_pass,
                "peak_bytes": peak(),
                "flops": int(engine.sum([counter.get_total_flops()])[0]),
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    everyone = engine.gather_objects(found)
    if engine.is_main:
        print(json.dumps(everyone), flush=True)


def peak() -> int:
    """Most bytes that this process has had resident since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> int:
    """Start to measure anew; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(preset: str, stage: int, folder: Path) -> list[dict[str, Any]]:
    """Start the ranks; for each micro-batch size, what the rank that took most memory took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    try:
        for rank in range(WORLD_SIZE):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(WORLD_SIZE),
                "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            command = [sys.executable, __file__, "--rank-of", preset, str(stage), str(folder)]
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, text=True))
        text, _ = ranks[0].communicate(timeout=TIMEOUT_SECONDS)
        everyone = json.loads(text.strip().splitlines()[-1])
        return [max(sizes, key=lambda one: one["peak_bytes"]) for sizes in zip(*everyone, strict=True)]
    finally:
        for process in ranks:
            process.kill()
            process.wait()


if __name__ == "__main__":
    p = sys.argv
    if p[1] == "--rank-of":
        rank_main(p[2], int(p[3]), Path(p[4]))
        sys.stdout.flush()
        os._exit(0)
    folder = Path(p[3])
    got = measure(p[1], int(p[2]), folder)
    print(json.dumps(got))

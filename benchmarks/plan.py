"""Claim: `triptych plan` predicts a rank's peak memory within 10 %, and the FLOPs of a step within 3 %.

Each case is a preset, a ZeRO stage and two micro-batch sizes on two CPU processes, in fp32: the ranks load the embedded
digits with the run's own loader, and train with its own loop and engine, one step to warm up, in which FLOPs are
counted by `torch.utils.flop_counter`, and one that is measured. Peak memory is the kernel's (VmHWM of
/proc/self/status), set back before each of them. Last, the bytes that a save would copy are counted, without copying.

    python benchmarks/plan.py [--presets tiny base] [--stages 1 2 3] [--dir DIR] [--again]

Bytes are of the rank that took most. Printed and kept in benchmarks/results/ as JSON. What was measured already is kept
and predicted anew, unless --again is given.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
WORLD_SIZE = 2
TIMEOUT_SECONDS = 3600
LEAST_FREE_BYTES = 1.5e9
"""Before the kernel ends somebody else's process, ours are ended."""
MEMORY_TARGET, FLOPS_TARGET = 0.10, 0.03
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"config": "configs/digits.yaml", "micro_batches": (16, 64), "set": []},
    # The widths of base with a quarter of its layers: where there is neither time nor memory for base.
    "quarter": {
        "config": "configs/base.yaml",
        "micro_batches": (1, 4),
        "set": [
            "engine.precision=fp32",
            "data.image.size=192",
            "model.text.num_hidden_layers=4",
            "model.vision.num_hidden_layers=3",
            "model.audio.num_hidden_layers=3",
        ],
    },
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
        f"run.dir={folder / preset}",
        f"data.train={folder / 'digits'}",
        "data.eval=null",
        "data.build=[]",
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
    from pretrain.checkpoint.snapshot import FrozenFile, HostBuffers
    from pretrain.config import load_config
    from pretrain.engine import Engine
    from pretrain.model.omni import OmniPretrainer
    from pretrain.trainer import Trainer, split

    flop_registry.update(CPU_ATTENTION)
    sizes = PRESETS[preset]["micro_batches"]
    configs = [load_config(ROOT / PRESETS[preset]["config"], settings(preset, stage, size, folder)) for size in sizes]
    engine = Engine(configs[0])
    loader = build_loader(configs[0], engine.rank, engine.world_size)
    imported = resident()
    model = OmniPretrainer.build(configs[0], loader.tokenizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    engine.prepare(model)
    del model
    prepared = resident() | {"peak": peak()}
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
        reset_peak()
        # The first step makes the moments, has ZeRO-3 learn the order of the modules, and is counted.
        with FlopCounterMode(display=False) as counter:
            trainer.backward(micro, plans, counts)
        engine.update(1e-4, lambda norm: True)
        first = peak()
        reset_peak()
        before = resident()
        started = time.perf_counter()
        trainer.backward(micro, plans, counts)
        after_pass = resident() | {"peak": peak()}
        engine.update(1e-4, lambda norm: True)
        found.append(
            {
                "micro_batch": size,
                "peak_bytes": peak(),
                "flops": int(engine.sum([counter.get_total_flops()])[0]),
                "parameters": num_parameters,
                "step_seconds": round(time.perf_counter() - started, 2),
                "first_peak_bytes": first,
                "imported": imported,
                "prepared": prepared,
                "before": before,
                "after_pass": after_pass,
                "after": resident(),
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        # Of the first rank this size, or the next size starts while another rank is still at this one.
        engine.barrier()
    buffers, files = HostBuffers(pinned=False), []
    engine.save(folder / "never-written", lambda path, state: files.append(FrozenFile(state, buffers)))
    for one in found:
        one["checkpoint_copy_bytes"] = sum(file.num_bytes for file in files)
    everyone = engine.gather_objects(found)
    if engine.is_main:
        print(json.dumps(everyone), flush=True)


class _Heap(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def resident() -> dict[str, int]:
    """Bytes that this process has resident, and those that the C library has handed out and holds back."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Heap
    heap = library.mallinfo2()
    return {
        "resident": _status("VmRSS"),
        "file": _status("RssFile"),
        "allocated": heap.uordblks + heap.hblkhd,
        "free": heap.fordblks,
    }


def peak() -> int:
    """Most bytes that this process has had resident since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Start to measure anew."""
    Path("/proc/self/clear_refs").write_text("5")


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
            command = [sys.executable, __file__, "--rank-of", preset, str(stage), "--dir", str(folder)]
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            ranks.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, text=True))
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while all(rank.poll() is None for rank in ranks):
            if time.monotonic() > deadline or psutil.virtual_memory().available < LEAST_FREE_BYTES:
                raise SystemExit(f"{preset}, ZeRO {stage}: ended, for lack of time or of memory on this machine")
            time.sleep(0.5)
        text, _ = ranks[0].communicate(timeout=60)
        if not text.strip():
            raise SystemExit(f"{preset}, ZeRO {stage}: ranks ended with {[rank.poll() for rank in ranks]}")
        everyone = json.loads(text.strip().splitlines()[-1])
        merged = []
        for of_size in zip(*everyone, strict=True):
            most = max(of_size, key=lambda one: one["peak_bytes"])
            copies = max(one["checkpoint_copy_bytes"] for one in of_size)
            peaks = [one["peak_bytes"] for one in of_size]
            merged.append({**most, "checkpoint_copy_bytes": copies, "peak_bytes_of_ranks": peaks})
        return merged
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def predict(preset: str, micro_batch: int, folder: Path) -> dict[int, dict[str, Any]]:
    """By ZeRO stage, what `triptych plan` says of a case."""
    from launch.plan.accelerators import accelerator
    from launch.plan.planning import plan_run
    from pretrain.config import load_config

    config = load_config(ROOT / PRESETS[preset]["config"], settings(preset, 2, micro_batch, folder))
    plan = plan_run(config, WORLD_SIZE, accelerator("cpu", WORLD_SIZE))
    return {
        option.memory.layout.zero_stage: {
            "predicted_peak_bytes": int(option.memory.total - option.memory.device["checkpoint copy"]),
            "predicted_flops": int(plan.flops),
            "predicted_checkpoint_copy_bytes": int(option.memory.device["checkpoint copy"]),
            "predicted_moment": option.memory.moment,
            "predicted": {part: int(size) for part, size in option.memory.device.items() if size},
        }
        for option in plan.options
        if not option.gradient_checkpointing
    }


def judged(case: dict[str, Any], predicted: dict[str, Any]) -> dict[str, Any]:
    """A measured case beside what was predicted."""
    memory = predicted["predicted_peak_bytes"] / case["peak_bytes"]
    flops = predicted["predicted_flops"] / case["flops"]
    copied = predicted["predicted_checkpoint_copy_bytes"] / case["checkpoint_copy_bytes"]
    return {
        **case,
        **predicted,
        "memory_ratio": round(memory, 4),
        "flops_ratio": round(flops, 5),
        "checkpoint_copy_ratio": round(copied, 4),
        "reached": abs(memory - 1) <= MEMORY_TARGET and abs(flops - 1) <= FLOPS_TARGET,
    }


def main() -> None:
    """Measure, predict, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["tiny", "base"])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--dir", type=Path, help="folder for the data; the system's for temporary files")
    parser.add_argument("--again", action="store_true", help="measure what is measured already, too")
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank_main(options.rank_of[0], int(options.rank_of[1]), options.dir)
        sys.stdout.flush()
        os._exit(0)
    sys.path.insert(0, str(ROOT))
    from importlib.metadata import version

    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    kept = results / f"plan-{time.strftime('%Y-%m-%d')}-cpu.json"
    cases: dict[str, Any] = json.loads(kept.read_text())["cases"] if kept.exists() else {}

    def keep() -> str:
        claimed = [
            f"{preset} zero{stage} micro{size}"
            for preset in ("tiny", "base")
            for stage in (1, 2, 3)
            for size in PRESETS[preset]["micro_batches"]
        ]
        result = {
            "cases": cases,
            "missing": [name for name in claimed if name not in cases],
            "reached": all(cases.get(name, {}).get("reached", False) for name in claimed),
            "target": {"memory": MEMORY_TARGET, "flops": FLOPS_TARGET},
            "ranks": WORLD_SIZE,
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
            "versions": {name: version(name) for name in ("torch", "deepspeed", "accelerate", "transformers")},
        }
        text = json.dumps(result, indent=1)
        kept.write_text(text + "\n")
        return text

    with tempfile.TemporaryDirectory(prefix="plan-") as temporary:
        folder = options.dir or Path(temporary)
        # Not by a rank: what building has to import would count as its memory.
        build = [sys.executable, "-m", "launch", "data", "build", "digits", "--out", str(folder / "digits")]
        subprocess.run([*build, "--split", "train"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        for preset in options.presets:
            sizes = PRESETS[preset]["micro_batches"]
            for stage in options.stages:
                names = [f"{preset} zero{stage} micro{size}" for size in sizes]
                if options.again or not all(name in cases for name in names):
                    cases |= dict(zip(names, measure(preset, stage, folder), strict=True))
                    keep()
            for size in sizes:
                for stage, predicted in predict(preset, size, folder).items():
                    name = f"{preset} zero{stage} micro{size}"
                    if stage in options.stages and name in cases:
                        cases[name] = judged(cases[name], predicted)
    print(keep())
    for name, one in sorted(cases.items()):
        print(
            f"{name}: {one['peak_bytes'] / 1e6:,.0f} MB measured, {one['memory_ratio']:.3f} of it predicted; "
            f"FLOPs {one['flops_ratio']:.4f}; checkpoint copy {one['checkpoint_copy_ratio']:.3f}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()

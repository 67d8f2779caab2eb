"""Are two runs the same to the last bit: losses, weights, moments, generators, and every sample exactly once?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pretrain import checkpoint
from pretrain.consolidate import safe_unpickling
from tests.faults.harness import incidents, metrics, triptych

# What names the run or the moment instead of its state.
_NAMES = {"triptych", "ds_config", "ds_version"}


def compare_runs(golden: Path, other: Path) -> list[str]:
    """What is wrong with a run that was disturbed, in words; empty when it is as the undisturbed one."""
    wrong = []
    expected, found = metrics(golden), metrics(other)
    if [(m["step"], m["loss_hex"]) for m in expected] != [(m["step"], m["loss_hex"]) for m in found]:
        first = next((a["step"] for a, b in zip(expected, found, strict=False) if a["loss_hex"] != b["loss_hex"]), None)
        wrong.append(f"losses differ (first at step {first}; {len(expected)} and {len(found)} lines)")
    wrong += differences(golden, other)
    if alarms := _spikes(golden) ^ _spikes(other):
        wrong.append(f"spikes in one of the two only: {sorted(alarms)}")
    for option in ("--repeated", "--unseen"):
        done = triptych("ledger", str(other), option, "--json")
        if done.returncode or json.loads(done.stdout) != []:
            wrong.append(f"ledger {option}: {done.stdout[:500]} {done.stderr[-500:]}")
    done = triptych("ledger", str(other), "--verify")
    if done.returncode:
        wrong.append(f"ledger --verify: {done.stderr[-500:]}")
    left = [path.name for path in (other / "checkpoints").iterdir() if path.name.startswith(".tmp")]
    if left:
        wrong.append(f"left behind: {left}")
    return wrong


def _spikes(run_dir: Path) -> set[tuple[str, int]]:
    return {(each["kind"], each["step"]) for each in incidents(run_dir) if each["kind"].endswith("_spike")}


def differences(first: Path, second: Path) -> list[str]:
    """Names of what differs between the newest valid checkpoints of two run directories; empty when nothing does."""
    states = []
    for run_dir in (first, second):
        found, _ = checkpoint.find_latest(run_dir)
        if found is None:
            return [f"{run_dir} has no valid checkpoint"]
        states.append((found.step, fingerprints(found.path)))
    (step, a), (other_step, b) = states
    if step != other_step:
        return [f"the newest checkpoints are of steps {step} and {other_step}"]
    return [f"{name} differs" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def fingerprints(path: Path) -> dict[str, str]:
    """SHA-256 of every tensor and value in the rank's files of a checkpoint, by file and place."""
    found: dict[str, str] = {}
    with safe_unpickling():
        for file in sorted(path.rglob("*.pt")):
            _walk(torch.load(file, map_location="cpu", weights_only=True), str(file.relative_to(path)), found)
    for file in sorted(path.rglob("*.safetensors")):
        _walk(load_file(file), str(file.relative_to(path)), found)
    assert found
    return found


def _walk(value: Any, name: str, found: dict[str, str]) -> None:
    if isinstance(value, dict):
        for key, each in value.items():
            if key not in _NAMES:
                _walk(each, f"{name}/{key}", found)
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            _walk(each, f"{name}/{i}", found)
    elif isinstance(value, torch.Tensor):
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found[name] = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode() + data).hexdigest()
    else:
        found[name] = repr(value)

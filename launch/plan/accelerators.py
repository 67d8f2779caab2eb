"""What one rank computes on: memory, peak speed and the share of it that training reaches.

Figures are the vendors': dense (without sparsity), as their data sheets print them.

  A100   https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet.pdf
  H100   https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet (SXM; half of "with sparsity")
  H200   https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446 (SXM; half of "with sparsity")
  MI300X https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from data_pipelines.errors import BadInput

DEFAULT_MFU = 0.3
"""Share of the peak that training reaches: what multimodal models report lies between 0.11 (CLIP B/32) and 0.4."""

_CORE_FLOPS = 96e9
"""A CPU core: two AVX2 units of 8 fp32 multiply-adds at 3 GHz. It has no bf16 to speak of."""


@dataclass(frozen=True)
class Accelerator:
    """One device that one rank has to itself; for a CPU, the rank's share of the machine."""

    name: str
    memory_bytes: float
    """What the data sheet says (1 GB = 10**9 bytes); the driver, the context and fragmentation come out of the rest."""
    bf16_flops: float
    """Peak a second of dense bf16 matrix products."""
    fp32_flops: float
    """Peak a second of fp32 matrix products in full precision, which is what torch does by default."""
    link_bytes: float
    """Bytes a second to another device of the node, in one direction."""
    is_gpu: bool = True

    def flops(self, precision: str) -> float:
        """Peak a second of a precision of `engine.precision`."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


ACCELERATORS = {
    "a100-40g": Accelerator("a100-40g", 40e9, 312e12, 19.5e12, 300e9),
    "a100-80g": Accelerator("a100-80g", 80e9, 312e12, 19.5e12, 300e9),
    "h100-80g": Accelerator("h100-80g", 80e9, 989.5e12, 67e12, 450e9),
    "h200-141g": Accelerator("h200-141g", 141e9, 989.5e12, 67e12, 450e9),
    "mi300x-192g": Accelerator("mi300x-192g", 192e9, 1307.4e12, 163.4e12, 448e9),
    "cpu": Accelerator("cpu", 0.0, _CORE_FLOPS, _CORE_FLOPS, 5e9, is_gpu=False),
}
_SHORT_NAMES = {"h100": "h100-80g", "h200": "h200-141g", "mi300x": "mi300x-192g", "a100": "a100-80g"}
_FOUND_NAMES = (("H200", "h200-141g"), ("H100", "h100-80g"), ("MI300X", "mi300x-192g"))


def accelerator(name: str, ranks_a_node: int = 1) -> Accelerator:
    """A row of the table. A rank on a CPU gets its share of this machine's cores and memory.

    Raises:
        BadInput: there is no such row.
    """
    row = ACCELERATORS.get(_SHORT_NAMES.get(name.lower(), name.lower()))
    if row is None:
        raise BadInput(f"--accelerator {name}: not in the table; it has {', '.join(ACCELERATORS)}")
    if row.is_gpu:
        return row
    cores = max(1.0, len(os.sched_getaffinity(0)) / ranks_a_node)
    return replace(
        row,
        memory_bytes=_machine_bytes() / ranks_a_node,
        bf16_flops=row.bf16_flops * cores,
        fp32_flops=row.fp32_flops * cores,
    )


def this_machine() -> str:
    """Name of the row that this machine's devices are, `cpu` where it has no GPU.

    Raises:
        BadInput: its GPU is not in the table.
    """
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    found = torch.cuda.get_device_name()
    if "A100" in found:
        return "a100-80g" if torch.cuda.get_device_properties(0).total_memory > 60e9 else "a100-40g"
    for word, name in _FOUND_NAMES:
        if word in found:
            return name
    raise BadInput(f"{found} is not in the table of accelerators; name one that is like it with --accelerator")


def _machine_bytes() -> float:
    """Memory of this machine, or of the control group that it is limited to."""
    total = float(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        total = min(total, float(limit.read_text()))
    return total

"""A batch from a worker process in one block of shared memory.

Torch hands over each tensor by a file descriptor of its own, for which the receiver connects to the worker. A batch has
ten tensors, and what waits for its turn holds them all; one block costs a tenth of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# A cache line: wide enough for every dtype, and rows of different tensors share none.
_ALIGNMENT = 64


@dataclass(frozen=True)
class SharedBlock:
    """What `pack` makes: the block (uint8), where each tensor lies in it, and what is no tensor."""

    block: torch.Tensor
    places: dict[str, tuple[int, torch.dtype, torch.Size]]
    rest: dict[str, Any]

    def unpack(self) -> dict[str, Any]:
        """The batch again, its tensors as views of the block."""
        tensors: dict[str, Any] = {}
        for name, (start, dtype, shape) in self.places.items():
            end = start + shape.numel() * dtype.itemsize
            tensors[name] = self.block[start:end].view(dtype).view(shape)
        return {**self.rest, **tensors}


def pack(batch: dict[str, Any]) -> SharedBlock:
    """Copy a batch's tensors (contiguous, on the CPU) into one block of shared memory."""
    places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
    end = 0
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            places[name] = (end, value.dtype, value.shape)
            end += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
    storage = torch.UntypedStorage._new_shared(max(end, 1))  # type: ignore[no-untyped-call]
    block = torch.empty(0, dtype=torch.uint8).set_(storage)
    packed = SharedBlock(block, places, {name: value for name, value in batch.items() if name not in places})
    for name, tensor in packed.unpack().items():
        if name in places:
            tensor.copy_(batch[name])
    return packed

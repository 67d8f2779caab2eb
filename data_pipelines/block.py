"""The memory of a batch: one block for all of its arrays, and a shared one where a worker process hands it over.

Samples are stacked where the trainer will read them, so a batch is never copied on its way. Torch would copy each
tensor to shared memory, and hand it over by a file descriptor of its own, for which the receiver connects to the
worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info

# A cache line: wide enough for every dtype, and no two arrays share one.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Block:
    """`memory` (uint8) and, by name, where each array lies in it. Make one with `allocate`; it may be pickled."""

    memory: torch.Tensor
    places: dict[str, tuple[int, torch.dtype, torch.Size]]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The arrays as tensors that share the block's memory."""
        found = {}
        for name, (start, dtype, shape) in self.places.items():
            end = start + shape.numel() * dtype.itemsize
            found[name] = self.memory[start:end].view(dtype).view(shape)
        return found

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The same as numpy arrays."""
        return {name: tensor.numpy() for name, tensor in self.tensors().items()}


def allocate(wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Block:
    """A block of zeros for arrays of these dtypes and shapes; in shared memory within a worker of a DataLoader."""
    places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
    end = 0
    for name, (dtype, shape) in wanted.items():
        places[name] = (end, dtype, torch.Size(shape))
        end += -(-places[name][2].numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    if get_worker_info() is None:
        return Block(torch.from_numpy(np.zeros(end, dtype=np.uint8)), places)
    storage = torch.UntypedStorage._new_shared(end)  # type: ignore[no-untyped-call]
    return Block(torch.empty(0, dtype=torch.uint8).set_(storage), places)

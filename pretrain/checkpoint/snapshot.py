"""A rank's state as it was at one moment, in host memory that is used again for the next checkpoint.

What is large changes only when the optimizer updates it, so it is copied while the next step is on its way there; all
else is copied at once. Storages are copied whole and once, and tensors keep their view of them,
so that `torch.save` of the copy writes what `torch.save` of the original would have written: tied tensors stay tied.
All that is not a tensor goes through a pickle of our own making, so that nothing of it is shared with the live state.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

# Of a storage in a zip file: its two headers and the padding to 64 bytes; of a file: what torch writes beside it.
_RECORD_BYTES, _FILE_BYTES = 512, 8192
# Weights and moments are in large storages. Statistics that a forward pass may move are in small ones.
_LARGE_BYTES = 64 << 10


class HostBuffers:
    """Host memory for one snapshot at a time, page-locked where the state is on a GPU."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[Tensor]] = {}
        self._used: dict[int, list[Tensor]] = {}

    def take(self, num_bytes: int) -> Tensor:
        """A uint8 tensor [num_bytes], the same memory as in the last snapshot where that had one of this size."""
        free = self._free.get(num_bytes)
        buffer = free.pop() if free else torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        self._used.setdefault(num_bytes, []).append(buffer)
        return buffer

    def start_again(self) -> None:
        """Begin the next snapshot: all that the last one took is free, and what it did not need goes."""
        self._free, self._used = self._used, {}


class FrozenFile:
    """What one `.pt` file is to hold, frozen in host memory once `copy` has been called, before the next update."""

    def __init__(self, state: Any, buffers: HostBuffers) -> None:
        structure = io.BytesIO()
        pickler = _TensorsApart(structure, buffers)
        pickler.dump(state)
        self._structure = structure.getvalue()
        self._tensors = pickler.copies
        self._to_copy = pickler.to_copy
        self.num_bytes = len(self._structure) + _FILE_BYTES + pickler.num_bytes
        """At most so many bytes will be written."""

    def copy(self) -> None:
        """Copy the large storages; from then on the live state may change."""
        while self._to_copy:
            buffer, live = self._to_copy.pop()
            buffer.copy_(live)

    def write(self, file: Any) -> None:
        """Write it as `torch.save` does into an object with `write` and `flush`."""
        torch.save(_WithTensors(io.BytesIO(self._structure), self._tensors).load(), file)


class _TensorsApart(pickle.Pickler):
    def __init__(self, file: io.BytesIO, buffers: HostBuffers) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.copies: list[Tensor] = []
        self.to_copy: list[tuple[Tensor, Tensor]] = []
        """Host buffer and live bytes of what is copied later."""
        self.num_bytes = 0
        self._buffers = buffers
        self._numbers: dict[int, int] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}
        # The numbers are of objects that must not be freed meanwhile, or others would take their place.
        self._alive: list[Any] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.copies)
            self._alive.append(value)
            self.copies.append(self._copy(value))
        return number

    def _copy(self, tensor: Tensor) -> Tensor:
        source = tensor.detach().untyped_storage()
        storage = self._storages.get(source._cdata)
        if storage is None:
            buffer = self._buffers.take(source.nbytes())
            live = torch.empty(0, dtype=torch.uint8, device=source.device).set_(source)  # type: ignore[call-overload]
            if source.nbytes() >= _LARGE_BYTES and source.device.type == "cpu":
                self.to_copy.append((buffer, live))
            else:
                buffer.copy_(live, non_blocking=True)
            storage = self._storages[source._cdata] = buffer.untyped_storage()
            self._alive.append(source)
            self.num_bytes += source.nbytes() + _RECORD_BYTES
        copy = torch.empty(0, dtype=tensor.dtype)
        copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload]
        return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


class _WithTensors(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: Any) -> Tensor:
        return self._tensors[number]

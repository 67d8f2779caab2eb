"""One micro-batch of the real model, run on shapes alone: what it keeps in memory, moment by moment, and its FLOPs.

Weights and activations are fake tensors (sizes and types, no numbers); indices and masks are real, because how many
patches and tokens there are follows from their values. So every operation of forward and backward pass is seen, with
whatever transformers and autograd keep, and none of it is computed. FLOPs come from the formulas of
`torch.utils.flop_counter`. Following storages is the idea of `torch.distributed._tools.mem_tracker`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten

# The attention kernels for CPUs, which torch's own table lacks; what its formulas read stands in the same places.
CPU_ATTENTION: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
HEAP_BLOCK_BYTES = 32 << 20
"""glibc maps what is larger, and gives it back at once; the threshold grows up to here (M_MMAP_THRESHOLD)."""
_WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)
_FACTORIES = (aten.empty, aten.zeros, aten.ones, aten.full, aten.rand, aten.randn, aten.scalar_tensor)
_DEVICE = torch.ops.prim.device
_INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put)


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on fake numbers and real indices, and follows the memory that their results hold.

    Inside, `live_bytes` is what all fake tensors made so far and not yet freed take, `heap_bytes` those of them that a
    C library takes from its heap, and `flops` what was multiplied and added (two a multiply-add).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live_bytes = 0
        self.heap_bytes = 0
        self.flops = 0
        self.after_each: Callable[[], None] = lambda: None
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def fake(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor of this shape without numbers."""
        with self._fake:
            made = torch.empty(shape, dtype=dtype)
        self._follow(made)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        faked = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if not faked and not (packet in _FACTORIES and _is_of_numbers(kwargs)):
            return func(*args, **kwargs)
        if packet is aten._local_scalar_dense:
            return 0.0
        if packet in _INDEXING:
            args = (args[0], _places(args[1]), *args[2:])
        with self._fake:
            out = func(*args, **kwargs)
        formula = flop_registry.get(packet) or CPU_ATTENTION.get(packet)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor):
                self._follow(leaf)
        self.after_each()
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self._freed(-size)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live_bytes -= size
        if abs(size) <= HEAP_BLOCK_BYTES:
            self.heap_bytes -= size


def _is_of_numbers(kwargs: dict[str, Any]) -> bool:
    return (kwargs.get("dtype") or torch.get_default_dtype()) not in _WHOLE_NUMBERS


def _places(indices: Any) -> list[Any]:
    """Indices with each mask as the numbers of its places: how many there are is then known."""
    found: list[Any] = []
    for index in indices:
        found += index.nonzero().unbind(1) if isinstance(index, Tensor) and index.dtype == torch.bool else [index]
    return found

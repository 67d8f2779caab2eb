"""Whole tensors into DeepSpeed's live partitions: each rank takes its part of every parameter and of both moments.

The counterpart of `zero_reader`, on DeepSpeed 0.19.8, whose optimizers each keep their master weights in a way of their
own. Only one parameter's tensors are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data_pipelines.errors import BadInput
from pretrain.zero_reader import MOMENTS

Read = Callable[[str, str], Tensor]
"""(name, `fp32` or a moment) -> the whole tensor, fp32."""


@torch.no_grad()
def fill(engine: Any, read: Read, steps: dict[str, float | None], buffers: dict[str, Tensor]) -> None:
    """Give a freshly prepared DeepSpeed engine the weights and the optimizer state of a checkpoint.

    Args:
        engine: the DeepSpeedEngine; all ranks call this.
        read: the tensors.
        steps: of every parameter, how many updates its moments have seen; None where it has no moments.
        buffers: the model's persistent buffers.

    Raises:
        BadInput: parameters of one optimizer group were updated a different number of times.
    """
    names = dict(engine.param_names)
    for name, buffer in engine.module.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
    optimizer, kind = engine.optimizer, type(engine.optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer":
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        _fill_flat(optimizer.optimizer, flats, groups, names, read, steps)
    elif kind == "BF16_Optimizer":
        flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
        _fill_flat(optimizer.optimizer, flats, groups, names, read, steps)
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        _fill_stage3(optimizer, names, read, steps)
    elif isinstance(optimizer, torch.optim.Optimizer):
        _fill_torch(optimizer, names, read, steps)
    else:
        raise RuntimeError(f"no way to fill the partitions of DeepSpeed's {kind}")


@torch.no_grad()
def clear_padding(optimizer: Any) -> None:
    """Zero what pads the parts of ZeRO 3 to one size: DeepSpeed never writes it, and saves what the memory held."""
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            size, (_, numel) = parameter.partition_numel(), _share(optimizer, parameter)
            if numel < size:
                for part, start in ((parameter.ds_tensor.data.view(-1), 0), (flat.data, offset)):
                    # Nothing is in memory of what is offloaded to a disk.
                    if part.numel() >= start + size:
                        part[start + numel : start + size] = 0
            offset += size


def _fill_flat(
    inner: Any,
    flats: list[Tensor],
    groups: list[list[Any]],
    names: dict[Any, str],
    read: Read,
    steps: dict[str, float | None],
) -> None:
    """ZeRO 1 and 2: a rank has one part of each group's flat vector, and the model's weights whole."""
    for flat, group in zip(flats, groups, strict=True):
        count = _steps_of([names[parameter] for parameter in group], steps)
        moments = {} if count is None else {moment: torch.zeros_like(flat) for moment in MOMENTS}
        for parameter in group:
            name, here = names[parameter], parameter._hp_mapping
            whole = read(name, "fp32")
            parameter.data.copy_(whole)
            if here is None:
                continue
            source, place = here.lp_fragment_address, here.hp_fragment_address
            _part(flat, place.start, whole, source.start, source.numel)
            if steps[name] is not None:
                for moment, into in moments.items():
                    _part(into, place.start, read(name, moment), source.start, source.numel)
        _set_state(inner, flat, moments, count)


def _fill_stage3(optimizer: Any, names: dict[Any, str], read: Read, steps: dict[str, float | None]) -> None:
    """ZeRO 3: a rank has an equal part of each parameter, and the parts of a group end to end."""
    optimizer.checkpoint_event_prologue()
    for number, group in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[number]
        count = _steps_of([names[parameter] for parameter in group], steps)
        moments = {} if count is None else {moment: torch.zeros_like(flat) for moment in MOMENTS}
        flat.data.zero_()
        offset = 0
        for parameter in group:
            name, size = names[parameter], parameter.partition_numel()
            start, numel = _share(optimizer, parameter)
            if numel:
                _part(flat, offset, read(name, "fp32"), start, numel)
                if steps[name] is not None:
                    for moment, into in moments.items():
                        _part(into, offset, read(name, moment), start, numel)
            offset += size
        _set_state(optimizer.optimizer, flat, moments, count)
        low = optimizer.fp16_partitioned_groups_flat[number]
        low.data.copy_(flat.data)
        parts = optimizer.fp16_partitioned_groups[number]
        for part, fresh in zip(parts, optimizer.unflatten(low, parts), strict=True):
            part.data = fresh.data
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()


def _share(optimizer: Any, parameter: Any) -> tuple[int, int]:
    """Where this rank's part of a ZeRO 3 parameter begins in it, and its elements, without what pads it."""
    size = parameter.partition_numel()
    start = optimizer._get_param_partition_rank(parameter) * size
    return start, max(0, min(size, parameter.ds_numel - start))


def _fill_torch(
    optimizer: torch.optim.Optimizer, names: dict[Any, str], read: Read, steps: dict[str, float | None]
) -> None:
    """ZeRO 0: torch's own optimizer on the model's parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            parameter.data.copy_(read(name, "fp32"))
            count = steps[name]
            moments = {}
            if count is not None:
                moments = {moment: read(name, moment).to(parameter.device) for moment in MOMENTS}
            _set_state(optimizer, parameter, moments, count)


def _part(into: Tensor, place: int, whole: Tensor, start: int, numel: int) -> None:
    into.data.narrow(0, place, numel).copy_(whole.reshape(-1).narrow(0, start, numel))


def _set_state(inner: Any, key: Tensor, moments: dict[str, Tensor], count: float | None) -> None:
    # torch counts updates in a tensor on the CPU unless it was asked for fused or capturable steps.
    state = {} if count is None else {"step": torch.tensor(count, dtype=torch.float32), **moments}
    inner.state[key] = state
    if not state:
        del inner.state[key]


def _steps_of(group: list[str], steps: dict[str, float | None]) -> float | None:
    """The number of updates of a whole group, which ZeRO counts once; parameters without moments do not count."""
    counts = {name: count for name in group if (count := steps[name]) is not None}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise BadInput(
            f"{few} was updated {counts[few]:.0f} times and {many} {counts[many]:.0f} times, which ZeRO cannot keep "
            "apart: resume with engine.zero_stage 0"
        )
    return next(iter(counts.values()), None)

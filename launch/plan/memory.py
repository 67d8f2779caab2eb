"""What one rank holds in memory under DeepSpeed ZeRO, at the moment when it holds most.

The rules were read in DeepSpeed 0.19.8 (`runtime/zero/stage_1_and_2.py`, `stage3.py`) for the config that
`pretrain.engine.deepspeed_config` makes, and held against measurements (`benchmarks/plan.py`): where fp32 copies,
buckets and temporaries come and go, what gloo copies, and what the C library's heap keeps of freed activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.plan.passes import Pass
    from pretrain.config import Config

PARTS = (
    "process",
    "weights",
    "gathered weights",
    "fp32 weights",
    "moments",
    "gradients",
    "buckets",
    "activations",
    "logits",
    "contrastive gather",
    "temporaries",
    "checkpoint copy",
)
"""What memory is for, in the order of a bar."""

PROCESS_BYTES = 0.62e9
"""Resident memory of a rank on a CPU beside tensors: interpreter, torch, DeepSpeed, transformers; 0.59 GB measured, and
0.66 GB on a rank that also builds datasets."""
CONTEXT_BYTES = 1.5e9
"""On a GPU beside tensors: context, kernels and the communication library's buffers. Not measured here."""
HEAP_SLACK = 1.2
"""On a CPU: the heap over what is asked of it at its fullest, for the gaps between blocks; measured."""
USABLE_SHARE = 0.94
"""Share of a GPU's memory that tensors can have before the caching allocator's gaps fill it."""

# DeepSpeed's defaults, which the engine leaves alone.
_MOST_LIVE_ELEMENTS = 1_000_000_000
_PLAIN_BUCKET_ELEMENTS = 500_000_000
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Layout:
    """How weights, gradients and optimizer state are spread over the ranks."""

    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    world_size: int
    element_bytes: int
    """Bytes of a weight in the forward pass: 4 in fp32, 2 in bf16."""
    bucket_elements: int
    accumulation: int
    is_gpu: bool

    @classmethod
    def of(cls, config: Config, world_size: int, accumulation: int, is_gpu: bool) -> Layout:
        """A config's own layout."""
        engine = config.engine
        return cls(
            engine.zero_stage,
            engine.offload_optimizer,
            engine.offload_parameters,
            world_size,
            2 if engine.precision == "bf16" else 4,
            engine.bucket_mb * 1_000_000 // 4,
            accumulation,
            is_gpu,
        )

    @property
    def name(self) -> str:
        """For tables."""
        offload = ", offload all" if self.offload_parameters else ", offload" if self.offload_optimizer else ""
        return f"ZeRO {self.zero_stage}{offload}"

    def others(self) -> list[Layout]:
        """Every stage, and offloads where there is a device to offload from."""
        offloads = [(False, False), (True, False), (True, True)] if self.is_gpu else [(False, False)]
        return [
            replace(self, zero_stage=stage, offload_optimizer=optimizer, offload_parameters=parameters)
            for (optimizer, parameters), stage in itertools.product(offloads, range(4))
            if (not optimizer or stage) and (not parameters or stage == 3) and (stage or self.element_bytes == 4)
        ]


@dataclass(frozen=True)
class Parameters:
    """How many elements the model has."""

    by_part: dict[str, int]
    """text, vision, audio, heads."""
    groups: tuple[int, ...]
    """Of each group of the optimizer."""
    largest: int
    """Of the largest tensor."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.groups)


@dataclass(frozen=True)
class RankMemory:
    """One rank at its fullest moment, in bytes."""

    layout: Layout
    moment: str
    """forward and backward, reduction, update, or gathering."""
    device: dict[str, float]
    """By `PARTS`; on a CPU all there is."""
    host: float
    """Beside a device: what is offloaded, and the copy that a save makes."""

    @property
    def total(self) -> float:
        """On the device."""
        return sum(self.device.values())


def rank_memory(layout: Layout, parameters: Parameters, passed: Pass, alignment_bytes: float = 0.0) -> RankMemory:
    """The fullest moment of a step.

    Args:
        layout: how state is spread.
        parameters: of the model.
        passed: the largest micro-batch.
        alignment_bytes: of the contrastive loss over the whole share, when its gradient is cached.
    """
    state, host = _state(layout, parameters)
    moments = [("forward and backward", _in_pass(layout, parameters, passed))]
    if layout.accumulation > 1:
        moments.append(("contrastive loss", {"contrastive gather": alignment_bytes}))
    moments += _after_pass(layout, parameters)
    name, most = max(moments, key=lambda moment: sum(moment[1].values()))
    device = dict.fromkeys(PARTS, 0.0) | state
    for part, size in [*most.items(), *_heap(layout, parameters, passed).items()]:
        device[part] += size
    for part, size in (("logits", passed.kept_bytes["logits"]), ("contrastive gather", passed.kept_bytes["alignment"])):
        of_them = min(max(0.0, float(size)), device["activations"] / 2)
        device[part] += of_them
        device["activations"] -= of_them
    return RankMemory(layout, name, device, host)


def _state(layout: Layout, parameters: Parameters) -> tuple[dict[str, float], float]:
    """What is there all the time: on the device by part, and on the host."""
    total, world = parameters.total, layout.world_size
    share = total / world
    sharded = layout.zero_stage == 3
    weights = layout.element_bytes * (share if sharded else total)
    # ZeRO 1 and 2 keep a copy in fp32 even of fp32 weights.
    copied = layout.zero_stage in (1, 2) or (sharded and layout.element_bytes == 2)
    master = 4 * share if copied else 0.0
    moments = 8 * (share if layout.zero_stage else total)
    state = {
        "process": CONTEXT_BYTES if layout.is_gpu else PROCESS_BYTES,
        "weights": weights,
        "fp32 weights": master,
        "moments": moments,
        "gradients": 4 * share if sharded else 0.0,
    }
    if sharded:
        state["buckets"] = _bucket(layout, parameters)
    copied_state = _checkpoint_copy(layout, parameters)
    host = copied_state if layout.is_gpu else 0.0
    state["checkpoint copy"] = 0.0 if layout.is_gpu else copied_state
    if layout.offload_optimizer:
        host += max(master, 4 * share) + moments + 4 * share + (0 if sharded else layout.element_bytes * share)
        state["fp32 weights"] = state["moments"] = state["gradients"] = 0.0
        state["buckets"] = state.get("buckets", 0.0) + layout.element_bytes * parameters.largest
    if layout.offload_parameters:
        host += weights
        state["weights"] = 0.0
    return state, host


def _checkpoint_copy(layout: Layout, parameters: Parameters) -> float:
    """The copy that a save makes on rank 0 and keeps for the next one: its share of the optimizer, and the weights."""
    optimizer = 12 if layout.zero_stage else 8
    whole = 0 if layout.zero_stage == 3 else layout.element_bytes * parameters.total
    return whole + optimizer * parameters.total / (layout.world_size if layout.zero_stage else 1)


def _gathered(layout: Layout, parameters: Parameters) -> float:
    """Whole weights that ZeRO 3 holds: it lets go of what it needs again only after 10**9 more elements."""
    if layout.zero_stage != 3:
        return 0.0
    return layout.element_bytes * min(parameters.total, _MOST_LIVE_ELEMENTS // 2 + layout.bucket_elements)


def _bucket(layout: Layout, parameters: Parameters) -> float:
    """Reduction buckets; on a CPU only what is written to them becomes memory."""
    each = layout.element_bytes if layout.zero_stage > 1 or layout.element_bytes == 4 else 4
    elements = layout.bucket_elements if layout.is_gpu else min(layout.bucket_elements, parameters.total)
    return float(each * elements * (2 if layout.is_gpu else 1))


def _copied_bucket(layout: Layout, parameters: Parameters) -> float:
    return float(layout.element_bytes * min(layout.bucket_elements, parameters.total))


def _in_pass(layout: Layout, parameters: Parameters, passed: Pass) -> dict[str, float]:
    """The fullest moment of a forward and backward pass, what is there all the time left out."""
    stage, world, total = layout.zero_stage, layout.world_size, parameters.total
    reduces_in_pass = stage >= 2 or (stage == 1 and layout.is_gpu)
    before = 0.0
    if layout.accumulation > 1 and stage < 3:
        before = 4 * total / (world if reduces_in_pass else 1)
        if stage == 2 and layout.element_bytes == 2:
            before = 0.0
    fixed = {"gathered weights": _gathered(layout, parameters) if layout.is_gpu else 0.0}
    if stage == 3:
        # Its own bucket is there all the time; gloo reduces a copy of the copy.
        fixed["buckets"] = _copied_bucket(layout, parameters) * (1 if layout.is_gpu else 2)
    elif reduces_in_pass:
        fixed["buckets"] = _bucket(layout, parameters) + _copied_bucket(layout, parameters)

    def handed_over(done: int) -> float:
        if stage == 3 or (layout.offload_optimizer and stage == 2) or _piles_in_heap(layout):
            return 0.0
        return 4 * done / (world if reduces_in_pass else 1)

    in_time = passed.moments if layout.is_gpu else passed.mapped_moments
    done, live = max(in_time, key=lambda moment: handed_over(moment[0]) + moment[1])
    return fixed | {"activations": live, "gradients": before + handed_over(done)}


def _after_pass(layout: Layout, parameters: Parameters) -> list[tuple[str, dict[str, float]]]:
    """Moments between the last backward pass and the next step; AdamW takes the root of a whole group at once."""
    stage, world, total = layout.zero_stage, layout.world_size, parameters.total
    group = max(parameters.groups) / (world if stage else 1)
    gradients = 4 * total / (world if stage else 1)
    if layout.offload_optimizer:
        # On the host, where it is no smaller; the host's memory is not what a step runs out of.
        return []
    if stage == 0:
        whole = {"gradients": 0.0 if _piles_in_heap(layout) else gradients}
        flat = 4.0 * min(total, _PLAIN_BUCKET_ELEMENTS)
        return [
            ("reduction", whole | {"buckets": flat if world > 1 else 0.0}),
            ("update", whole | {"temporaries": 4 * group}),
        ]
    # Gradients are flattened into one tensor a group first, unless they lie in one already.
    copied = 0.0 if stage < 3 and layout.element_bytes == 2 else 4 * group
    update = {"temporaries": copied + 4 * group}
    if stage == 3:
        return [("update", update)]
    moments = [("update", update | {"gradients": gradients})]
    if not layout.is_gpu:
        buckets = _bucket(layout, parameters) + _copied_bucket(layout, parameters)
        if stage == 1:
            moments.append(("reduction", {"gradients": gradients, "buckets": buckets}))
        # gloo gathers into memory of its own.
        gathered = layout.element_bytes * max(parameters.groups)
        moments.append(("gathering", {"temporaries": float(gathered)}))
    return moments


def _piles_in_heap(layout: Layout) -> bool:
    """Whether gradients stay where the backward pass makes them, one by one, until it is over."""
    return not layout.is_gpu and layout.zero_stage < 2


def _heap(layout: Layout, parameters: Parameters, passed: Pass) -> dict[str, float]:
    """What the C library's heap has come to on a CPU: it shrinks from its end alone, so it stays at its fullest."""
    if layout.is_gpu:
        return {}
    piles = 4 if _piles_in_heap(layout) else 0
    fullest = HEAP_SLACK * max(live + piles * done for done, live in passed.heap_moments)
    gradients = min(float(piles * parameters.total), fullest)
    # Once gathered, and once more: so much stays allocated from the start on, for what was not found out.
    left = 4.0 * parameters.total if layout.zero_stage == 3 else 0.0
    gathered = HEAP_SLACK * _gathered(layout, parameters) + left
    return {"gradients": gradients, "activations": fullest - gradients, "gathered weights": gathered}


def largest_micro_batch(bytes_of: Callable[[int], float], share: int, limit: float) -> int:
    """Largest micro-batch within `limit` bytes, 0 when not even one fits.

    Args:
        bytes_of: memory by micro-batch; it grows up to `share` - 1, where a step has several, and from `share` on.
        share: samples a rank has in a step.
        limit: bytes.
    """
    if bytes_of(share) <= limit:
        low, high = share, min(2 * share, _LARGEST)
        while high < _LARGEST and bytes_of(high) <= limit:
            low, high = high, min(2 * high, _LARGEST)
    else:
        low, high = 0, share
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= limit else (low, middle)
    return low

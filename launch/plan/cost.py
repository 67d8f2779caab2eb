"""From FLOPs and bytes to seconds: a step, a checkpoint, the run, and the jobs that a time limit cuts it into."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from data_pipelines.errors import BadInput, printable
from launch.plan.accelerators import Accelerator
from launch.plan.memory import Layout, Parameters
from pretrain.slurm_config import TimeLimit, seconds_of

START_SECONDS = 60.0
"""Imports, process groups and the model, before the first step of a job."""
NETWORK_BYTES = 25e9
"""Bytes a second of a device to another node: a port of 200 Gbit/s each."""
DISK_BYTES = 1e9
"""Bytes a second that a node writes and reads checkpoints with."""
# ZeRO 3 gathers again in the backward pass what is further away than this.
_KEPT_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, by what for, with ring algorithms."""

    gradients: float
    weights: float
    contrastive: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.gradients + self.weights + self.contrastive


def traffic(layout: Layout, parameters: Parameters, share: int, embedding: int) -> Traffic:
    """Of one step in which each rank has `share` samples.

    ZeRO 1 and 2 reduce gradients with an all-reduce, ZeRO 3 with a reduce-scatter; ZeRO 2 and 3 after every
    micro-batch, and ZeRO 3 gathers weights in every pass.
    """
    world, stage, accumulation = layout.world_size, layout.zero_stage, layout.accumulation
    ring = (world - 1) / world
    # Under ZeRO 1 with accumulation in fp32 its buckets are fp32 too.
    gradient_bytes = 4 if stage == 0 or (stage == 1 and layout.element_bytes == 2) else layout.element_bytes
    whole = gradient_bytes * parameters.total * ring
    weights = layout.element_bytes * parameters.total * ring
    gradients = whole if stage == 3 else 2 * whole
    if stage >= 2:
        gradients *= accumulation
    if stage == 3:
        again = max(0, parameters.total - _KEPT_ELEMENTS) / max(1, parameters.total)
        # With several micro-batches, embeddings are made once more without gradient.
        weights *= (1 + again) * accumulation + (accumulation if accumulation > 1 else 0)
    elif stage == 0:
        weights = 0.0
    vectors = 4 * 3 * embedding * share
    # Gathered forward, reduced backward as a whole.
    contrastive = vectors * (world - 1) + 2 * vectors * (world - 1)
    return Traffic(gradients, weights, float(contrastive))


def step_seconds(
    flops: float, sent: Traffic, device: Accelerator, precision: str, mfu: float, num_nodes: int
) -> tuple[float, float]:
    """Seconds a step computes and communicates; on GPUs they overlap, on a CPU they add up."""
    compute = flops / (device.flops(precision) * mfu)
    return compute, sent.total / (NETWORK_BYTES if num_nodes > 1 else device.link_bytes)


def checkpoint_bytes(layout: Layout, parameters: Parameters) -> float:
    """Of one checkpoint, all ranks together: weights as they train, fp32 weights and two moments."""
    weights = 0 if layout.zero_stage == 3 else layout.element_bytes
    return float(parameters.total * (weights + (4 if layout.zero_stage else 0) + 8))


@dataclass(frozen=True)
class Jobs:
    """How a run is cut into jobs by a time limit."""

    useful_seconds: float
    """Of a job: for training, between start-up and the signal to save."""
    number: int
    requeues: int


def jobs(run_seconds: float, limit_seconds: float, restart_seconds: float, margin_seconds: float) -> Jobs | None:
    """None where a job has no time to train in."""
    useful = limit_seconds - restart_seconds - margin_seconds
    if useful <= 0:
        return None
    number = max(1, math.ceil(run_seconds / useful))
    return Jobs(useful, number, number - 1)


def parse_time_limit(text: str) -> float | None:
    """Seconds of a time limit as sbatch takes it; None is no limit.

    Raises:
        BadInput: it is none.
    """
    if text.strip().upper() in ("UNLIMITED", "INFINITE"):
        return None
    try:
        return seconds_of(TypeAdapter(TimeLimit).validate_python(text.strip()))
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise BadInput(f"--time-limit: {printable(said)}") from None

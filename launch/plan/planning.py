"""Everything that is known of a run before it starts: `plan_run` puts the parts together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from launch.plan.accelerators import DEFAULT_MFU, Accelerator
from launch.plan.batches import DataTotals, Expected, Sizes, micro_batches
from launch.plan.cost import (
    DISK_BYTES,
    START_SECONDS,
    Jobs,
    Traffic,
    checkpoint_bytes,
    jobs,
    step_seconds,
    traffic,
)
from launch.plan.decoding import decode_seconds
from launch.plan.memory import USABLE_SHARE, Layout, Parameters, RankMemory, largest_micro_batch, rank_memory
from launch.plan.passes import Pass, ShapeModel, Work
from pretrain.config import Config
from pretrain.deadline import parse_duration
from pretrain.engine import accumulation_steps, parameter_groups
from pretrain.model.backbones import family
from pretrain.slurm_config import signal_seconds


@dataclass(frozen=True)
class Option:
    """One way to lay out memory, at the planned micro-batch."""

    memory: RankMemory
    gradient_checkpointing: bool
    fits: bool
    largest_micro_batch: int
    """About, samples like those of the data taken for granted; 0 when not even one fits. It may be more than a rank's
    share of `data.global_batch`."""


@dataclass(frozen=True)
class Plan:
    """What a run is going to take. Bytes are of one rank, seconds of the wall clock, unless a name says otherwise."""

    world_size: int
    num_nodes: int
    accelerator: Accelerator
    mfu: float
    micro_batch: int
    accumulation: int
    parameters: Parameters
    data: DataTotals | None
    """None where the datasets are still to be built; every sample is then taken to be as large as may be."""
    memory: RankMemory
    fits: bool
    options: tuple[Option, ...]
    """Every ZeRO stage and offload, with and without gradient checkpointing; the config's own first. Empty where others
    were not asked for and the config's own fits."""
    host_start_bytes: float
    """Of a node, while its ranks each make the whole model, before it is spread."""
    flops: float
    """Of a step, all ranks together; recomputation included."""
    rank_flops: float
    """Of a step, of the rank that has most to do."""
    compute_seconds: float
    network_seconds: float
    step_seconds: float
    network: Traffic
    samples_per_second: float
    tokens_per_second: float | None
    decode_seconds: float
    """CPU seconds a sample."""
    decode_known_by: str
    """measured, index or assumed."""
    decode_cores: float
    """Cores of all nodes together that keep up with the steps."""
    checkpoint_bytes: float
    """All ranks together."""
    checkpoint_seconds: float
    """To write one; training goes on meanwhile."""
    run_seconds: float
    """Of training."""
    wall_seconds: float
    """Of all jobs together, start-ups included; waiting in the queue is not."""
    epochs: float | None
    device_hours: float
    """GPU-hours, or processes times hours on CPUs."""
    time_limit_seconds: float | None
    restart_seconds: float
    """From the start of a job to its first step, with a checkpoint read."""
    margin_seconds: float
    """How long before its end a job stops."""
    jobs: Jobs | None
    """None without a time limit, and where a job has no time to train."""
    problems: list[str] = field(default_factory=list)
    """What cannot work, each with what would."""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Measured:
    """What the model and the data say, whatever the accelerator."""

    parameters: Parameters
    passed: Pass
    """Of the largest micro-batch."""
    alignment_bytes: float
    rank_flops: float
    mean_flops: float
    embedding: int
    others: Callable[[], tuple[Pass, tuple[int, Pass]]]
    """Runs the same micro-batch with gradient checkpointing the other way, and (size, one of another size)."""


def plan_run(
    config: Config,
    world_size: int,
    device: Accelerator,
    num_nodes: int = 1,
    mfu: float = DEFAULT_MFU,
    time_limit_seconds: float | None = None,
    compare: bool = True,
) -> Plan:
    """Plan a run of `world_size` ranks on `num_nodes` nodes; problems that leave a plan possible are in it.

    Without `compare` other layouts are looked at only where the config's own does not fit.

    Raises:
        BadInput: the global batch does not divide, or the data cannot be opened.
    """
    from launch.plan.verdict import judge

    accumulation = accumulation_steps(config, world_size)
    share = config.data.global_batch // world_size
    micro = share // accumulation
    layout = Layout.of(config, world_size, accumulation, device.is_gpu)
    expected = Expected(config, world_size)
    seen = _measure(config, expected, layout, share, micro)
    memory = rank_memory(layout, seen.parameters, seen.passed, seen.alignment_bytes)
    fits = memory.total <= _usable(device)
    options = _options(config, layout, seen, device, share, micro) if compare or not fits else ()

    sent = traffic(layout, seen.parameters, share, seen.embedding)
    compute, network = step_seconds(seen.rank_flops, sent, device, config.engine.precision, mfu, num_nodes)
    step = max(compute, network) if device.is_gpu else compute + network
    totals = expected.totals()
    decode, known_by = decode_seconds(config, expected)
    samples_per_second = config.data.global_batch / step
    saved = checkpoint_bytes(layout, seen.parameters)
    write_seconds = saved / (DISK_BYTES * num_nodes)
    restart = START_SECONDS + write_seconds
    margin, cut = 0.0, None
    run_seconds = config.train.max_steps * step
    if time_limit_seconds is not None:
        notice = config.slurm.signal_seconds or signal_seconds(time_limit_seconds)
        margin = max(notice, parse_duration(config.run.stop_before) if config.run.stop_before else 0.0)
        cut = jobs(run_seconds, time_limit_seconds, restart, margin)
    wall_seconds = run_seconds + (cut.number if cut is not None else 1) * restart
    plan = Plan(
        world_size=world_size,
        num_nodes=num_nodes,
        accelerator=device,
        mfu=mfu,
        micro_batch=micro,
        accumulation=accumulation,
        parameters=seen.parameters,
        data=totals,
        memory=memory,
        fits=fits,
        options=options,
        host_start_bytes=world_size / num_nodes * 4 * seen.parameters.total * (2 if not device.is_gpu else 1),
        flops=seen.mean_flops * world_size,
        rank_flops=seen.rank_flops,
        compute_seconds=compute,
        network_seconds=network,
        step_seconds=step,
        network=sent,
        samples_per_second=samples_per_second,
        tokens_per_second=(totals.text_tokens + totals.soft_tokens) / totals.samples * samples_per_second
        if totals is not None
        else None,
        decode_seconds=decode,
        decode_known_by=known_by,
        decode_cores=decode * samples_per_second,
        checkpoint_bytes=saved,
        checkpoint_seconds=write_seconds,
        run_seconds=run_seconds,
        wall_seconds=wall_seconds,
        epochs=config.train.max_steps * config.data.global_batch / totals.samples if totals is not None else None,
        device_hours=world_size * wall_seconds / 3600,
        time_limit_seconds=time_limit_seconds,
        restart_seconds=restart,
        margin_seconds=margin,
        jobs=cut,
    )
    problems, warnings = judge(config, plan)
    return replace(plan, problems=problems, warnings=warnings)


def _usable(device: Accelerator) -> float:
    return device.memory_bytes * (USABLE_SHARE if device.is_gpu else 1.0)


def _measure(config: Config, expected: Expected, layout: Layout, share: int, micro: int) -> _Measured:
    model = ShapeModel(config, expected.tokenizer, layout.world_size)
    shares = list(expected.shares())
    found: list[tuple[Work, dict[str, Any], Any]] = []
    ranks: list[list[list[Work]]] = []
    for step in shares:
        ranks.append([])
        for sizes in step:
            ranks[-1].append([])
            for batch, frames in micro_batches(sizes, micro, config.data):
                laid_out = model.model.plan(batch)
                work = Work.of(batch, laid_out, frames)
                found.append((work, batch, laid_out))
                ranks[-1][-1].append(work)
    work, batch, laid_out = max(found, key=_amount)
    cached, recomputed = layout.accumulation > 1, config.model.gradient_checkpointing
    own = model.run(batch, laid_out, work, cached)

    def others() -> tuple[Pass, tuple[int, Pass]]:
        size = micro // 2 if micro > 1 else 2
        another = _one_pass(model, config, shares, size, cached)
        model.checkpointing(not recomputed)
        return model.run(batch, laid_out, work, cached), (size, another)

    def flops_of(works: Sequence[Work]) -> float:
        again = sum(own.forward_flops_of(each) for each in works) if cached else 0.0
        return sum(own.flops_of(each) for each in works) + again

    by_rank = [[flops_of(works) for works in step] for step in ranks]
    return _Measured(
        parameters=_parameters(model, config),
        passed=own,
        alignment_bytes=float(model.alignment_bytes(share)),
        rank_flops=sum(max(step) for step in by_rank) / len(by_rank),
        mean_flops=sum(sum(step) / len(step) for step in by_rank) / len(by_rank),
        embedding=model.model.embedding_size,
        others=others,
    )


def _one_pass(model: ShapeModel, config: Config, shares: list[list[Sizes]], size: int, cached: bool) -> Pass:
    """Of a micro-batch of another size."""
    sizes = shares[0][0]
    if len(sizes.seed) < size:
        sizes = sizes.take([place % len(sizes.seed) for place in range(size)])
    found = []
    for batch, frames in micro_batches(sizes, size, config.data):
        laid_out = model.model.plan(batch)
        found.append((Work.of(batch, laid_out, frames), batch, laid_out))
    work, batch, laid_out = max(found, key=_amount)
    return model.run(batch, laid_out, work, cached)


def _amount(found: tuple[Work, dict[str, Any], Any]) -> int:
    """By which micro-batches are compared."""
    return found[0].vision + found[0].audio + found[0].text


def _parameters(model: ShapeModel, config: Config) -> Parameters:
    part = family(config.model.family).part
    by_part: dict[str, int] = {}
    for name, parameter in model.model.named_parameters():
        where = part(name.removeprefix("backbone.")) if name.startswith("backbone.") else "heads"
        by_part[where] = by_part.get(where, 0) + parameter.numel()
    groups = [sum(each.numel() for each in group["params"]) for group in parameter_groups(model.model, config)]
    return Parameters(by_part, tuple(groups), max(each.numel() for each in model.model.parameters()))


def _options(
    config: Config, layout: Layout, seen: _Measured, device: Accelerator, share: int, micro: int
) -> tuple[Option, ...]:
    """Every layout, with and without recomputation; the config's own comes first."""
    own, limit = config.model.gradient_checkpointing, _usable(device)
    otherwise, (size, another) = seen.others()
    # Of the config's own way; in the other way activations grow in the same proportion.
    slope = max(0.0, (another.peak_bytes - seen.passed.peak_bytes) / (size - micro))

    def bytes_of(other: Layout, passed: Pass, wanted: int) -> float:
        scale = max(0.0, 1 + slope * (wanted - micro) / seen.passed.peak_bytes)
        spread = replace(other, accumulation=max(1, -(-share // wanted)))
        return rank_memory(spread, seen.parameters, passed.scaled(scale), seen.alignment_bytes).total

    found = []
    for other in layout.others():
        for recomputed, passed in ((own, seen.passed), (not own, otherwise)):
            memory = rank_memory(other, seen.parameters, passed, seen.alignment_bytes)
            largest = largest_micro_batch(partial(bytes_of, other, passed), share, limit)
            fits = memory.total <= limit
            found.append(Option(memory, recomputed, fits, max(largest, micro) if fits else min(largest, micro - 1)))
    return tuple(sorted(found, key=lambda each: (each.memory.layout != layout, each.gradient_checkpointing != own)))


def round_up(value: float) -> int:
    """The next whole number, unless it is one within a thousandth."""
    return math.ceil(value - 1e-3)

"""What cannot work, and what would: judged before anything is queued."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from data_pipelines.errors import BadInput
from launch.doctor.finding import size
from launch.plan.accelerators import DEFAULT_MFU, accelerator
from launch.plan.planning import Option, Plan, plan_run, round_up
from pretrain.config import Config
from pretrain.engine import accumulation_steps

_SLOW_SHARE = 0.5
"""Loader workers that reach less than this share of the planned speed are refused; the speed itself is an estimate."""


def reject(
    config: Config,
    world: int,
    accelerator_name: str | None,
    time_limit_s: float | None,
    num_nodes: int = 1,
    mfu: float = DEFAULT_MFU,
) -> list[str]:
    """Why a run of `world` ranks cannot work, one line each with what would; empty where it can.

    Args:
        config: the run's.
        world: ranks of all nodes together.
        accelerator_name: a row of `accelerators.ACCELERATORS`; None leaves memory and speed alone.
        time_limit_s: of the job, or None.
        num_nodes: nodes that the ranks are on.
        mfu: share of the accelerator's peak.
    """
    problem = divides(config, world)
    if problem is not None:
        return [problem]
    try:
        if accelerator_name is None:
            return [each for each in [no_room(config, None)] if each is not None]
        device = accelerator(accelerator_name, max(1, world // num_nodes))
        return plan_run(config, world, device, num_nodes, mfu, time_limit_s, compare=False).problems
    except BadInput as refused:
        return [str(refused)]


def divides(config: Config, world: int) -> str | None:
    """Why the batch does not divide by the ranks and micro-batches, with the nearest numbers that do."""
    try:
        accumulation_steps(config, world)
        return None
    except BadInput as refused:
        batch = config.data.global_batch
        if batch % world:
            near = [other for other in range(1, batch + 1) if batch % other == 0]
            fitting = sorted(near, key=lambda other: abs(other - world))[:2]
            numbers = " or ".join(map(str, sorted(fitting)))
            return f"{refused}: use {numbers} ranks, or data.global_batch {round(batch / world) * world or world}"
        share = batch // world
        fitting = [other for other in range(1, share + 1) if share % other == 0]
        below = max(other for other in fitting if other <= (config.data.micro_batch or share))
        return f"{refused}: use data.micro_batch {below}"


def judge(config: Config, plan: Plan) -> tuple[list[str], list[str]]:
    """Problems and warnings of a plan."""
    problems = [
        problem
        for problem in (
            _memory(plan),
            _host_memory(plan),
            _time_limit(config, plan),
            _hang(config, plan),
            no_room(config, plan.checkpoint_bytes),
        )
        if problem is not None
    ]
    warnings = []
    slow = _decoding(config, plan)
    if slow is not None:
        (problems if slow[0] else warnings).append(slow[1])
    if plan.data is None:
        warnings.append("the datasets are still to be built: every sample is taken to be as large as the config allows")
    if plan.data is not None and plan.data.samples < config.data.global_batch:
        warnings.append(
            f"a batch of {config.data.global_batch} has every one of the {plan.data.samples} samples more than once"
        )
    elif plan.epochs is not None and plan.epochs < 1:
        warnings.append(f"train.max_steps ends the run after {plan.epochs:.0%} of the data")
    return problems, warnings


def no_room(config: Config, num_bytes: float | None) -> str | None:
    """Why not one checkpoint fits on the file system of the run directory."""
    if num_bytes is None:
        return None
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= num_bytes:
        return None
    found = f"run.dir: {size(free)} free in {folder}, a checkpoint takes {size(num_bytes)}"
    return f"{found}: make room, or use another run.dir"


def _memory(plan: Plan) -> str | None:
    if plan.fits:
        return None
    device, own = plan.accelerator, plan.options[0]
    need = f"a rank takes {size(plan.memory.total)} of the {size(device.memory_bytes)} of {device.name}"
    if own.largest_micro_batch:
        return f"{need}: use data.micro_batch {own.largest_micro_batch} or less instead of {plan.micro_batch}"
    better = _cheapest(plan.options)
    if better is None:
        return f"{need}, and no ZeRO stage or offload helps: use more ranks, or an accelerator with more memory"
    return f"{need}, and not even data.micro_batch 1 fits: use {_as_settings(better)}"


def _cheapest(options: tuple[Option, ...]) -> Option | None:
    """Of what fits one sample at least, what costs least time: no recomputation, no offload, the lowest stage."""
    fitting = [each for each in options if each.largest_micro_batch]
    return min(
        fitting,
        key=lambda each: (
            each.memory.layout.offload_optimizer,
            each.memory.layout.offload_parameters,
            each.gradient_checkpointing,
            each.memory.layout.zero_stage,
        ),
        default=None,
    )


def _as_settings(option: Option) -> str:
    layout = option.memory.layout
    words = [f"engine.zero_stage={layout.zero_stage}"]
    words += ["engine.offload_optimizer=true"] if layout.offload_optimizer else []
    words += ["engine.offload_parameters=true"] if layout.offload_parameters else []
    words += ["model.gradient_checkpointing=true"] if option.gradient_checkpointing else []
    return " ".join([*words, f"data.micro_batch={option.largest_micro_batch}"])


def _host_memory(plan: Plan) -> str | None:
    """Only on CPUs is the host that will run known: it is taken to be like this one."""
    if plan.accelerator.is_gpu or plan.host_start_bytes <= (have := float(psutil.virtual_memory().total)):
        return None
    return (
        f"the ranks of a node each make the whole model first, {size(plan.host_start_bytes)} together, and a node has "
        f"{size(have)}: use fewer ranks a node"
    )


def _time_limit(config: Config, plan: Plan) -> str | None:
    limit = plan.time_limit_seconds
    if limit is None:
        return None
    least = plan.restart_seconds + plan.step_seconds + plan.checkpoint_seconds
    if limit <= least:
        return (
            f"a time limit of {limit / 60:.0f} min is shorter than start-up, one step and one checkpoint "
            f"({least / 60:.1f} min): ask for at least {round_up((least + plan.margin_seconds) / 60)} min"
        )
    if plan.jobs is None or plan.jobs.useful_seconds < plan.step_seconds:
        wanted = round_up((plan.restart_seconds + plan.margin_seconds + plan.step_seconds) / 60)
        return (
            f"a time limit of {limit / 60:.0f} min leaves no step between start-up ({plan.restart_seconds / 60:.1f} "
            f"min) and the signal to save ({plan.margin_seconds / 60:.1f} min before the end): ask for at least "
            f"{wanted} min"
        )
    return None


def _hang(config: Config, plan: Plan) -> str | None:
    one = plan.step_seconds / plan.accumulation
    if one <= config.supervisor.hang_seconds:
        return None
    return (
        f"one micro-batch takes about {one:.0f} s, and the supervisor ends ranks that are silent for "
        f"{config.supervisor.hang_seconds} s: use supervisor.hang_seconds {round_up(one) * 3}, or a smaller "
        "data.micro_batch"
    )


def _decoding(config: Config, plan: Plan) -> tuple[bool, str] | None:
    """Whether the loader's workers are far too few, and the line to say."""
    needed = plan.decode_cores / plan.world_size
    workers = max(1, config.data.num_workers)
    if needed <= workers or not plan.accelerator.is_gpu:
        return None
    return (
        workers < _SLOW_SHARE * needed,
        f"decoding takes {needed:.1f} cores a rank at {plan.samples_per_second:.0f} samples/s, and data.num_workers is "
        f"{config.data.num_workers}: use data.num_workers {round_up(needed)}, and as many CPUs a task",
    )

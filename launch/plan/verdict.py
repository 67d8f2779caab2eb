"""What cannot work, and what would: judged before anything is queued."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from data_pipelines.errors import BadInput
from launch.plan.accelerators import DEFAULT_MFU, accelerator
from launch.plan.planning import Option, Plan, plan_run, round_up
from launch.plan.words import amount, duration
from launch.submit.request import MAX_REQUEUES
from pretrain.config import Config
from pretrain.engine import accumulation_steps

_QUICKEST_START_SECONDS = 10.0


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
            return []
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
            micro = config.data.micro_batch or 1
            near = [other for other in range(1, batch + 1) if batch % (other * micro) == 0]
            fitting = sorted(near, key=lambda other: abs(other - world))[:2]
            ranks = f"{' or '.join(map(str, sorted(fitting)))} ranks, or " if fitting else ""
            even = max(1, round(batch / (world * micro))) * world * micro
            return f"{refused}: use {ranks}data.global_batch {even}"
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
            _time_limit(plan),
            _hang(config, plan),
            no_room(config, plan.checkpoint_bytes),
        )
        if problem is not None
    ]
    warnings: list[str] = []
    many = _many_jobs(config, plan)
    if many is not None:
        warnings.append(many)
    slow = _decoding(config, plan)
    if slow is not None:
        warnings.append(slow)
    if plan.data is None:
        warnings.append("the datasets are still to be built: every sample is taken to be as large as the config allows")
    if plan.data is not None and plan.data.samples < config.data.global_batch:
        warnings.append(
            f"a batch of {config.data.global_batch} has every one of the {plan.data.samples} samples more than once"
        )
    elif plan.epochs is not None and plan.epochs < 1:
        warnings.append(f"train.max_steps ends the run after {plan.epochs:.0%} of the data")
    return problems, warnings


def no_room(config: Config, num_bytes: float) -> str | None:
    """Why not one checkpoint fits on the file system of the run directory."""
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= num_bytes:
        return None
    found = f"run.dir: {amount(free)} free in {folder}, a checkpoint takes {amount(num_bytes)}"
    return f"{found}: make room, or use another run.dir"


def _memory(plan: Plan) -> str | None:
    if plan.fits:
        return None
    device, own = plan.accelerator, plan.options[0]
    need = f"a rank takes {amount(plan.memory.total)} of the {amount(device.memory_bytes)} of {device.name}"
    if own.largest_micro_batch:
        size_that_fits = _divisor(plan, own.largest_micro_batch)
        return f"{need}: use data.micro_batch {size_that_fits} instead of {plan.micro_batch}"
    better = _cheapest(plan.options)
    if better is None:
        return f"{need}, and no ZeRO stage or offload helps: use more ranks, or an accelerator with more memory"
    return f"{need}, and not even data.micro_batch 1 fits: use {_as_settings(plan, better)}"


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


def _divisor(plan: Plan, largest: int) -> int:
    """The largest micro-batch up to this one that divides a rank's share."""
    share = plan.micro_batch * plan.accumulation
    return max(size for size in range(1, min(largest, share) + 1) if share % size == 0)


def _as_settings(plan: Plan, option: Option) -> str:
    layout = option.memory.layout
    words = [f"engine.zero_stage={layout.zero_stage}"]
    words += ["engine.offload_optimizer=true"] if layout.offload_optimizer else []
    words += ["engine.offload_parameters=true"] if layout.offload_parameters else []
    words += ["model.gradient_checkpointing=true"] if option.gradient_checkpointing else []
    return " ".join([*words, f"data.micro_batch={_divisor(plan, option.largest_micro_batch)}"])


def _host_memory(plan: Plan) -> str | None:
    """Only on CPUs is the host that will run known: it is taken to be like this one."""
    if plan.accelerator.is_gpu or plan.host_start_bytes <= (have := float(psutil.virtual_memory().total)):
        return None
    return (
        f"the ranks of a node each make the whole model first, {amount(plan.host_start_bytes)} together, and a node "
        f"has {amount(have)}: use fewer ranks a node"
    )


def _time_limit(plan: Plan) -> str | None:
    """Only what no start-up, however quick, would leave time for: how long it takes is no more than an estimate."""
    limit, step = plan.time_limit_seconds, plan.step_seconds
    if limit is None or limit - plan.margin_seconds - _QUICKEST_START_SECONDS >= step:
        return None
    enough = round_up((plan.restart_seconds + max(4 * plan.margin_seconds / 3, 180) + 10 * step) / 60)
    return (
        f"a time limit of {duration(limit)} leaves no time for a step of {duration(step)} before the signal to save, "
        f"{duration(plan.margin_seconds)} ahead of it: ask for at least {enough} min"
    )


def _many_jobs(config: Config, plan: Plan) -> str | None:
    if plan.time_limit_seconds is None:
        return None
    limit = duration(plan.time_limit_seconds)
    if plan.jobs is None:
        return (
            f"start-up takes about {duration(plan.restart_seconds)}, and a job of {limit} has no time left to train in"
        )
    most = MAX_REQUEUES if config.slurm.max_requeues is None else config.slurm.max_requeues
    if plan.jobs.requeues <= most:
        return None
    return (
        f"jobs of {limit} are requeued {plan.jobs.requeues} times before the run is done, and slurm.max_requeues is "
        f"{most}: ask for more time, or for more requeues"
    )


def _hang(config: Config, plan: Plan) -> str | None:
    one = plan.step_seconds / plan.accumulation
    if one <= config.supervisor.hang_seconds:
        return None
    return (
        f"one micro-batch takes about {one:.0f} s, and the supervisor ends ranks that are silent for "
        f"{config.supervisor.hang_seconds} s: use supervisor.hang_seconds {round_up(one) * 3}, or a smaller "
        "data.micro_batch"
    )


def _decoding(config: Config, plan: Plan) -> str | None:
    """What to say of too few loader workers: the run would work, and wait for data."""
    needed = plan.decode_cores / plan.world_size
    if needed <= max(1, config.data.num_workers) or not plan.accelerator.is_gpu:
        return None
    return (
        f"decoding takes {needed:.1f} cores a rank at {plan.samples_per_second:.0f} samples/s, and data.num_workers is "
        f"{config.data.num_workers}: use data.num_workers {round_up(needed)}, and as many CPUs a task"
    )

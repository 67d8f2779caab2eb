"""`triptych plan`: tables and bars for people, JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_pipelines.errors import BadInput
from launch.json_output import messages_to_stderr, print_json, say
from launch.plan.words import amount, count, duration
from launch.train_command import default_num_processes
from pretrain.config import Config, load_config

if TYPE_CHECKING:
    from launch.plan.planning import Option, Plan

_COLOURS = {
    "process": "grey50",
    "weights": "blue",
    "gathered weights": "cyan",
    "fp32 weights": "dark_blue",
    "moments": "magenta",
    "gradients": "green",
    "buckets": "dark_green",
    "activations": "yellow",
    "logits": "orange3",
    "contrastive gather": "red",
    "temporaries": "bright_black",
    "checkpoint copy": "dark_goldenrod",
}
# So that bars say the same without colours.
_LETTERS = {
    "process": "p",
    "weights": "W",
    "gathered weights": "w",
    "fp32 weights": "F",
    "moments": "M",
    "gradients": "G",
    "buckets": "b",
    "activations": "A",
    "logits": "L",
    "contrastive gather": "C",
    "temporaries": "t",
    "checkpoint copy": "s",
}
_BAR_COLUMNS = 64


def plan_command(
    path: Path,
    overrides: Sequence[str],
    accelerator_name: str | None,
    num_nodes: int | None,
    num_processes: int | None,
    mfu: float | None,
    time_limit: str | None,
    as_json: bool,
) -> bool:
    """Print the plan of a run; true when it can work.

    Raises:
        BadInput: the config, an override or an option is wrong.
    """
    config = load_config(path, overrides)
    with messages_to_stderr():
        from launch.plan.accelerators import DEFAULT_MFU, accelerator, this_machine
        from launch.plan.cost import parse_time_limit
        from launch.plan.planning import plan_run
        from launch.plan.verdict import divides

        name = accelerator_name or this_machine()
        if num_processes is None:
            num_processes = config.slurm.gpus_per_node or _usual_processes(accelerator_name)
        device = accelerator(name, num_processes)
        limit = parse_time_limit(time_limit if time_limit is not None else config.slurm.time)
        num_nodes = num_nodes or config.slurm.nodes or 1
        world = num_nodes * num_processes
        problem = divides(config, world)
        if problem is not None:
            if as_json:
                say(f"error: {problem}")
                return _only_problem(problem)
            raise BadInput(problem)
        if sys.stderr.isatty():
            say("running the model on shapes alone ...")
        plan = plan_run(config, world, device, num_nodes, DEFAULT_MFU if mfu is None else mfu, limit)
    if as_json:
        print_json(as_dict(plan))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        for shown in (_facts(config, plan), _memory_table(plan), _bars(plan)):
            console.print(shown)
            console.print()
        _verdict(console, plan)
    return not plan.problems


def _usual_processes(accelerator_name: str | None) -> int:
    """Of this machine, or of a node with such accelerators."""
    if accelerator_name is None:
        return default_num_processes()
    return 2 if accelerator_name.lower() == "cpu" else 8


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan for JSON, with sums and names beside the numbers."""
    made: dict[str, Any] = asdict(plan)
    made["ok"] = not plan.problems
    made["memory"] |= {"total": plan.memory.total}
    for option, each in zip(made["options"], plan.options, strict=True):
        option["memory"] |= {"total": each.memory.total, "name": each.memory.layout.name}
    made["parameters"]["total"] = plan.parameters.total
    made["network"]["total"] = plan.network.total
    return made


def _only_problem(problem: str) -> bool:
    print_json({"ok": False, "problems": [problem], "warnings": []})
    return False


def _facts(config: Config, plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    device = plan.accelerator
    kind = "GPUs" if device.is_gpu else "processes"
    parts = ", ".join(f"{part} {count(number)}" for part, number in plan.parameters.by_part.items())
    table.add_row(
        "model", f"{config.model.init_from or config.model.preset}: {count(plan.parameters.total)} parameters ({parts})"
    )
    table.add_row(
        "ranks",
        f"{plan.world_size} {kind} ({device.name}) on {plan.num_nodes} node(s), ZeRO {config.engine.zero_stage}, "
        f"{config.engine.precision}; {plan.micro_batch} samples x {plan.accumulation} micro-batch(es) x "
        f"{plan.world_size} ranks = {config.data.global_batch}",
    )
    if plan.data is None:
        table.add_row("data", "not there yet; every sample is taken to be as large as the config allows")
    else:
        data = plan.data
        table.add_row(
            "data",
            f"{data.samples:,} samples ({amount(data.bytes)}) an epoch: {count(data.text_tokens)} text tokens, "
            f"{count(data.soft_tokens)} of images and sounds, {data.audio_hours:,.1f} h of sound; "
            f"{plan.epochs:.2f} epochs in {config.train.max_steps:,} steps",
        )
    peak = device.flops(config.engine.precision)
    table.add_row(
        "step",
        f"{plan.flops / 1e12:,.2f} TFLOP; {duration(plan.step_seconds)} at an MFU of {plan.mfu:.0%} of "
        f"{peak / 1e12:,.1f} TFLOP/s a rank ({plan.samples_per_second:,.1f} samples/s)",
    )
    sent = plan.network
    table.add_row(
        "network",
        f"{amount(sent.total)} a rank and step: gradients {amount(sent.gradients)}, weights {amount(sent.weights)}, "
        f"contrastive {amount(sent.contrastive)}; {duration(plan.network_seconds)}",
    )
    known = {"measured": "measured on this machine", "index": "from the index", "assumed": "assumed"}
    table.add_row(
        "decoding",
        f"{plan.decode_seconds * 1e3:.2f} ms of a core a sample ({known[plan.decode_known_by]}); "
        f"{plan.decode_cores:.1f} cores keep up, {plan.decode_cores / plan.num_nodes:.1f} a node",
    )
    table.add_row(
        "checkpoint",
        f"{amount(plan.checkpoint_bytes)}, written in {duration(plan.checkpoint_seconds)} while training goes on; "
        f"{amount(plan.checkpoint_bytes * (config.checkpoint.keep_last + 1))} of disk for those that stay and the next",
    )
    unit = "GPU" if device.is_gpu else "process"
    table.add_row(
        "run",
        f"{duration(plan.run_seconds)} of training, {duration(plan.wall_seconds)} with start-ups: "
        f"{plan.device_hours:,.1f} {unit}-hours",
    )
    if plan.time_limit_seconds is not None:
        cut = "no job has time to train"
        if plan.jobs is not None:
            useful = duration(plan.jobs.useful_seconds)
            cut = f"{plan.jobs.number} job(s), {plan.jobs.requeues} requeue(s), up to {useful} of training each"
        table.add_row("time limit", f"{duration(plan.time_limit_seconds)}: {cut}")
    return table


_COLUMNS = {
    "weights": ("weights", "gathered weights"),
    "grads": ("gradients",),
    "optim.": ("fp32 weights", "moments"),
    "activ.": ("activations",),
    "logits": ("logits",),
    "contrast": ("contrastive gather",),
    "buckets": ("buckets",),
    "other": ("process", "temporaries", "checkpoint copy"),
}
"""Of the table, from the parts of the bars."""


def _memory_table(plan: Plan) -> Table:
    title = "memory of a rank at its fullest moment"
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in (*_COLUMNS, "total", "host", "at most"):
        table.add_column(name, justify="right")
    for option in plan.options:
        device = option.memory.device
        sizes = [amount(sum(device[part] for part in parts)) for parts in _COLUMNS.values()]
        total = Text(amount(option.memory.total), style="green" if option.fits else "bold red")
        host = amount(option.memory.host) if option.memory.host else ""
        largest = f"{option.largest_micro_batch:,}" if option.largest_micro_batch else "none"
        own = option is plan.options[0]
        table.add_row(_name(option), *sizes, total, host, largest, style="bold" if own else "")
    table.caption = (
        "The first line is the config's own. at most: about the largest micro-batch that fits. recomputed: with\n"
        "gradient checkpointing. offload: of the optimizer; all: of the weights too."
    )
    table.caption_justify = "left"
    return table


def _bars(plan: Plan) -> Table:
    """One bar a layout, coloured by what memory is for; a line where the device's memory ends."""
    limit = plan.accelerator.memory_bytes
    most = max(each.memory.total for each in plan.options)
    # Where the device has much more than any of them takes, its end would leave the bars no room.
    shows_limit = limit <= 2 * most
    longest = max(most, limit) if shows_limit else most
    table = Table.grid(padding=(0, 1))
    end = min(_BAR_COLUMNS - 1, int(limit / longest * _BAR_COLUMNS))
    for option in plan.options:
        bar, at = Text(), 0.0
        for part, num_bytes in option.memory.device.items():
            cells = round((at + num_bytes) / longest * _BAR_COLUMNS) - round(at / longest * _BAR_COLUMNS)
            bar.append(_LETTERS[part] * cells, style=f"{_text_colour(part)} on {_COLOURS[part]}")
            at += num_bytes
        bar.append(" " * (_BAR_COLUMNS - len(bar)))
        if shows_limit:
            bar = bar[:end] + Text("│", style="bold") + bar[end + 1 :]
        table.add_row(_name(option), bar, amount(option.memory.total))
    used = [part for part in _COLOURS if any(option.memory.device[part] for option in plan.options)]
    legend = [
        Text.assemble((f" {_LETTERS[part]} ", f"{_text_colour(part)} on {_COLOURS[part]}"), f" {part}") for part in used
    ]
    ends = f"│ {amount(limit)}" if shows_limit else f"of {amount(limit)}"
    table.add_row("", Text("  ").join([*legend, Text(ends)]), "")
    return table


def _text_colour(part: str) -> str:
    return "black" if part in ("activations", "logits", "gathered weights", "checkpoint copy") else "white"


def _verdict(console: Console, plan: Plan) -> None:
    for warning in plan.warnings:
        console.print(Text.assemble(("warning ", "yellow"), warning), soft_wrap=True)
    for problem in plan.problems:
        console.print(Text.assemble(("cannot work ", "bold red"), problem), soft_wrap=True)
    if not plan.problems:
        console.print(Text("can work", style="green"))


def _name(option: Option) -> str:
    return option.memory.layout.name + (", recomputed" if option.gradient_checkpointing else "")

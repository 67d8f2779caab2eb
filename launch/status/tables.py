"""What `triptych status` prints once: a run's facts, or a line for each of several runs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from data_pipelines.errors import printable
from launch.status.metrics import number, values
from launch.status.run_files import ago, span
from launch.status.slurm import FORGOTTEN, Job
from launch.status.snapshot import Snapshot
from launch.status.spark import sparkline
from launch.status.state import Word

COLOURS: dict[Word, str] = {
    "new": "cyan",
    "queued": "cyan",
    "starting": "cyan",
    "training": "green",
    "stalled": "red",
    "stopping": "yellow",
    "restarting": "yellow",
    "silent": "red",
    "done": "green",
    "stopped": "yellow",
    "failed": "red",
    "killed": "red",
}
_LOG_RATIO = 8.0
_JOBS_SHOWN = 5
PARTS = ("text", "align", "image", "audio")


class Curve:
    """A sparkline as wide as its place."""

    def __init__(self, given: Sequence[float | None], height: int = 1, style: str = "cyan", low: float | None = None):
        self._given, self._height, self._style, self._low = given, height, style, low

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        style = Style.parse(self._style)
        for line in sparkline(self._given, options.max_width, self._height, self._low):
            yield Segment(line, style)
            yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(8, options.max_width), options.max_width)


def for_the_eye(given: Sequence[float | None]) -> Sequence[float | None]:
    """The logarithms of losses that fell by more than a factor of 8, as in the report; else the values themselves."""
    known = [value for value in given if value is not None]
    if known and min(known) > 0 and max(known) > _LOG_RATIO * min(known):
        return [None if value is None else math.log(value) for value in given]
    return given


def rate(value: float) -> str:
    """Samples or tokens a second, in as many digits as say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def badge(snapshot: Snapshot) -> Text:
    """The state, in its colour."""
    return Text(snapshot.state.word, style=f"bold {COLOURS[snapshot.state.word]}")


def place(snapshot: Snapshot) -> str:
    """The run directory as one would type it here."""
    short = os.path.relpath(snapshot.run.path)
    return os.path.abspath(snapshot.run.path) if short.startswith(os.pardir) else short


def steps(snapshot: Snapshot) -> str:
    """`412 of 900`."""
    progress = snapshot.progress
    return f"{progress.step:,} of {progress.max_steps:,}" if progress.max_steps else f"{progress.step:,}"


def ending(snapshot: Snapshot) -> str:
    """When the run will be done, if that can be said."""
    if snapshot.end is None or snapshot.progress.seconds_left is None:
        return ""
    left = snapshot.progress.seconds_left
    day = "%H:%M" if left < 12 * 3600 else "%a %d %b %H:%M"
    text = f"ends in {span(left)}, {time.strftime(day, time.localtime(snapshot.end))}"
    more = snapshot.starts_needed
    return f"{text}; {more} more start{'s' * (more > 1)} by the job's time limit" if more else text


def bar(snapshot: Snapshot, width: int | None = None) -> ProgressBar:
    """The share of the steps that is done."""
    done = COLOURS[snapshot.state.word]
    return ProgressBar(
        total=1.0,
        completed=snapshot.progress.share or 0.0,
        width=width,
        style="bright_black",
        complete_style=done,
        finished_style=done,
    )


def facts(snapshot: Snapshot) -> list[tuple[str, RenderableType]]:
    """What there is to say besides progress and curves, as pairs of name and text; empty ones are left out."""
    run, save = snapshot.run, snapshot.last_checkpoint
    config = run.config
    found: list[tuple[str, RenderableType]] = []
    for each in _jobs_to_show(snapshot):
        found.append(("job", _text(f"{each.id} {each.name}: {_of_job(snapshot, each)}")))
    if snapshot.slurm_is_silent:
        found.append(("job", Text(f"{run.job_ids[-1]}: Slurm does not answer", style="yellow")))
    worlds = run.run.get("world_sizes") or []
    if run.starts:
        ranks = f"{worlds[-1]} rank{'s' * (worlds[-1] != 1)}" if worlds else "ranks"
        stage = f", ZeRO {config.engine.zero_stage}, {config.engine.precision}" if config else ""
        found.append(("runs as", _text(f"{ranks}{stage}, on {snapshot.nodes} ({run.starts[-1].get('device')})")))
    if save is not None:
        kept = f" ({len(run.checkpoints)} kept)" if len(run.checkpoints) > 1 else ""
        found.append(("checkpoint", _text(f"step {save[0]:,}, {span(save[1])} ago{kept}")))
    elif run.starts:
        found.append(("checkpoint", Text("none yet", style="yellow")))
    failed = [line for line in run.saves if line.get("reason")]
    if failed and (save is None or float(failed[-1].get("time", 0)) > snapshot.now - save[1]):
        found.append(("", Text(printable(f"the last save failed: {failed[-1]['reason']}"), style="red")))
    if snapshot.restarts:
        last = run.starts[-1]
        when = f"last {ago(last.get('time'), snapshot.now)} from step {last.get('step', 0):,}"
        found.append(("restarts", _text(f"{snapshot.restarts}, {when}")))
    if run.num_incidents:
        newest = run.incidents[-1] if run.incidents else None
        told = f", last {ago(newest.time, snapshot.now)}: {newest.text}" if newest else ""
        where = f" (step {newest.step:,})" if newest and newest.step else ""
        found.append(("incidents", _text(f"{run.num_incidents}{told}{where}")))
    if run.unreadable:
        found.append(("unreadable", Text(f"{', '.join(run.unreadable)}: no permission", style="red")))
    if run.quarantined:
        found.append(("bad samples", _text(f"{run.quarantined:,} in {run.path / 'quarantine.jsonl'}")))
    if run.results and run.results.get("zero_shot"):
        from pretrain.results import summary_line

        try:
            found.append(("evaluation", _text(f"step {run.results.get('step')}: {summary_line(run.results)}")))
        except (KeyError, TypeError):
            pass
    return found


def details(snapshot: Snapshot, width: int) -> RenderableType:
    """Everything about one run, for a terminal of this width."""
    across = max(8, min(28, width - 66))
    last = snapshot.metrics.last or {}
    progress = snapshot.progress
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold", min_width=10)
    head.add_column(overflow="fold")
    told = Text.assemble(badge(snapshot), Text(printable(f"  {snapshot.state.why}" if snapshot.state.why else "")))
    head.add_row("run", _text(f"{snapshot.run.name}, {place(snapshot)}"))
    head.add_row("state", told)
    if progress.max_steps and progress.step:
        line = Table.grid(padding=(0, 2))
        line.add_row(Text(f"{steps(snapshot)}, {progress.share:.1%}"), bar(snapshot, across), Text(ending(snapshot)))
        head.add_row("step", line)
    loss = number(last.get("loss"))
    if loss is not None:
        known = [(name, number(last.get(f"loss_{name}"))) for name in PARTS]
        parts = "  ".join(f"{name} {value:.3f}" for name, value in known if value is not None)
        curve = sparkline(for_the_eye(values(snapshot.metrics.overview, "loss")), across)[0]
        head.add_row("loss", Text.assemble(f"{loss:.4f}  ", (curve, "cyan"), f"  {parts}"))
    if progress.samples_per_second is not None and progress.seconds_a_step is not None:
        head.add_row("speed", _speed(snapshot))
    if progress.data_wait is not None:
        style = "red" if progress.data_wait > 0.2 else "yellow" if progress.data_wait > 0.05 else ""
        head.add_row("data wait", Text(f"{progress.data_wait:.1%} of the step", style=style))
    for name, told_ in facts(snapshot):
        head.add_row(name, told_)
    if snapshot.run.beats:
        where = ", ".join(f"rank {beat.rank} in {beat.phase} of step {beat.step}" for beat in snapshot.run.beats[:8])
        head.add_row("now", _text(where))
    return head


def overview(snapshots: Sequence[Snapshot]) -> RenderableType:
    """A line for each run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "step", "done", "loss", "samples/s", "checkpoint", "restarts", "incidents", "ends in"):
        right = name in ("step", "done", "loss", "samples/s", "restarts", "incidents", "ends in")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=name != "run")
    for each in snapshots:
        progress, save = each.progress, each.last_checkpoint
        loss = number((each.metrics.last or {}).get("loss"))
        table.add_row(
            _text(place(each)),
            badge(each),
            f"{progress.step:,}",
            "" if progress.share is None else f"{progress.share:.0%}",
            "" if loss is None else f"{loss:.4f}",
            "" if progress.samples_per_second is None or not each.state.live else rate(progress.samples_per_second),
            "" if save is None else f"{save[0]:,}, {span(save[1])} ago",
            str(each.restarts),
            str(each.run.num_incidents),
            "" if progress.seconds_left is None else span(progress.seconds_left),
        )
    return Group(table)


def _speed(snapshot: Snapshot) -> Text:
    progress = snapshot.progress
    parts = [
        (progress.samples_per_second, "samples/s"),
        (progress.tokens_per_second, "tokens/s"),
        (progress.seconds_a_step, "s a step"),
    ]
    return Text(", ".join(f"{rate(value)} {unit}" for value, unit in parts if value is not None))


def _jobs_to_show(snapshot: Snapshot) -> list[Job]:
    """Those under way, and the last ones that Slurm still knows."""
    known = [job for job in snapshot.jobs if job.state != FORGOTTEN]
    return [job for job in known if not job.has_left or job in known[-_JOBS_SHOWN:]]


def _of_job(snapshot: Snapshot, job: Job) -> str:
    text = snapshot.words(job)
    if job.nodes and not job.has_left:
        text += f" on {job.nodes}"
    if job.state == "RUNNING" and job.seconds_left is not None:
        limit = f" of {span(job.limit_seconds)}" if job.limit_seconds else ""
        text += f", {span(job.seconds_left)}{limit} left"
    if job.restarts:
        text += f", requeued {job.restarts} time{'s' * (job.restarts > 1)}"
    return text


def _text(text: str) -> Text:
    return Text(printable(text))

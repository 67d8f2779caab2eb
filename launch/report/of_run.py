"""From a run directory to its page."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.errors import BadInput
from launch.ledger_command import summary
from launch.report.charts import Chart, chart
from launch.report.curves import Floats, Table, curve
from launch.report.page import Page, Section, differences, rows, shown, write_page
from launch.report.timeline import Stretch, Timeline, timeline
from launch.status.events import Event, events
from launch.status.run_files import RunFiles, evaluations, read_run, span
from launch.status.snapshot import Looker
from pretrain.config import Config, dump_config
from pretrain.ledger import Ledger
from pretrain.results import blocks

if TYPE_CHECKING:
    from pretrain.examples import Group

_MAX_INCIDENTS = 2000
_MAX_EVENTS = 400
_MAX_MARKS = 60
_POINTS, _WIDE_POINTS = 300, 900
_PARTS = (
    ("loss_text", "text", "nats a token"),
    ("loss_align", "alignment", "nats a pair"),
    ("loss_image", "image", "masked patches"),
    ("loss_audio", "audio", "masked frames"),
)


def write_run_report(
    run_dir: Path,
    out: Path,
    groups: Sequence[Group] = (),
    verification: tuple[bool, str] | None = None,
    results: dict[str, Any] | None = None,
    more_facts: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a run's page.

    Args:
        run_dir: the run directory.
        out: the HTML file.
        groups: samples to show.
        verification: whether an export was verified, and a line about it.
        results: an evaluation; by default the run's last one.
        more_facts: pairs of name and text for the table about the run.

    Raises:
        BadInput: it is no run directory.
    """
    run = read_run(run_dir, _MAX_INCIDENTS)
    state = Looker(run_dir).look().state
    table = Table.read(run_dir / "metrics.jsonl")
    happened = events(run)
    drawn = _timeline(run, table, happened)
    results = results or run.results
    told = [event for event in reversed(happened) if event.kind != "checkpoint"]
    measured = [block for block in blocks(results) if block.rows] if results else []
    page = Page(
        name=run.name,
        subtitle=_subtitle(run, table),
        state=state.word,
        why="" if state.word == "done" else state.why,
        tiles=_tiles(run, table, drawn, results),
        verification=verification,
        timeline=drawn,
        timeline_note=_timeline_note(drawn),
        sections=_sections(run, table, happened),
        evaluation_note=_evaluation_note(results),
        blocks=measured,
        groups=[group for group in groups if group.examples],
        events=told[:_MAX_EVENTS],
        events_left_out=max(0, len(told) - _MAX_EVENTS) + run.num_incidents - len(run.incidents),
        facts=[*_facts(run, table), *more_facts],
        settings=_settings(run.config),
        changes=[
            (str(each.get("field")), shown(each.get("old")), shown(each.get("new")), f"{each.get('step', 0):,}")
            for each in run.run.get("changes", [])
        ],
        versions=rows(list(run.run.get("versions", {}).items())),
        config=dump_config(run.config) if run.config is not None else "",
    )
    write_page(page, out)


def _sections(run: RunFiles, table: Table, happened: Sequence[Event]) -> list[Section]:
    last = float(table.steps[-1]) if len(table) else None
    marks = [(float(event.step), "start") for event in happened if event.kind == "start" and event.step]
    marks += [(float(event.step), "fault") for event in happened if event.kind == "fault" and event.step]
    marks = marks[-_MAX_MARKS:]

    def draw(name: str, title: str, unit: str = "", wide: bool = False, **how: Any) -> Chart | None:
        points = _WIDE_POINTS if wide else _POINTS
        return chart(table.curve(name, points), title, unit, marks=marks, last_step=last, wide=wide, **how)

    losses = [
        draw("loss", "total loss", wide=True, log=8),
        *(draw(name, title, unit, log=8) for name, title, unit in _PARTS),
    ]
    memory = curve(table.steps, table.column("rss_bytes") / 2**30, _POINTS)
    speed = [
        draw("samples_per_second", "throughput", "samples/s", zero=True),
        draw("data_wait_fraction", "data wait", "of the step", zero=True, percent=True),
        draw("step_seconds", "step", "seconds", zero=True),
        chart(memory, "memory", "GiB, rank 0", marks=marks, last_step=last),
    ]
    optimizer = [
        draw("lr", "learning rate"),
        draw("grad_norm", "gradient norm", log=20),
        draw("logit_scale", "logit scale"),
    ]
    spread = "Every step faintly" if len(table) <= _POINTS else "The spread of the values faintly"
    note = f"{spread}, and the mean of the fortieth of the run around each as a line. "
    what = "Dotted lines: restarts (grey), faults (red). The pointer reads all charts at a step." if marks else ""
    return [
        Section("losses", "Losses", note + (what or "The pointer reads all charts at a step."), _there(losses)),
        Section("speed", "Speed", "As rank 0 saw it, step by step.", _there(speed)),
        Section("optimizer", "Optimizer", "What the weights were changed by.", _there(optimizer)),
        Section("scores", "Scores", "Each evaluation of the run.", _scores(run, last)),
    ]


def _scores(run: RunFiles, last: float | None) -> list[Chart]:
    found = evaluations(run.path)
    if len(found) < 2:
        return []
    steps = np.array([each["step"] for each in found], dtype=np.float64)
    shown_as = (
        ("zero_shot", "image_top1", "images named", "zero-shot", True),
        ("zero_shot", "audio_top1", "sounds named", "zero-shot", True),
        ("retrieval", "image_to_audio_class_p1", "image to sound", "class P@1", True),
        ("caption", "loss", "caption loss", "nats a token", False),
    )
    charts = []
    for part, name, title, unit, percent in shown_as:
        values = [each.get(part, {}).get(name) for each in found]
        column: Floats = np.array([np.nan if value is None else float(value) for value in values])
        charts.append(chart(curve(steps, column), title, unit, percent=percent, zero=percent, last_step=last))
    return _there(charts)


def _timeline(run: RunFiles, table: Table, happened: Sequence[Event]) -> Timeline | None:
    starts = [(float(start.get("time", 0)), int(start.get("step", 0))) for start in run.starts]
    times = table.times(starts)
    return timeline(table.steps, times, table.column("step_seconds"), _stretches(run, table, times, happened), happened)


def _stretches(run: RunFiles, table: Table, times: Floats, happened: Sequence[Event]) -> list[Stretch]:
    try:
        found = summary(Ledger.read(run.path))["starts"]
    except BadInput:
        found = [{"time": start.get("time", 0), "step": start.get("step", 0)} for start in run.starts]
    stretches = []
    each_seconds = float(np.nanmedian(table.column("step_seconds"))) if len(table) else 0.0
    for place, one in enumerate(found):
        following = found[place + 1] if place + 1 < len(found) else None
        limit = float(following["time"]) if following else float("inf")
        begin = float(one["time"])
        mine = (times > begin) & (times <= limit) & (table.steps > one["step"])
        kept = one.get("last_step_kept", int(table.steps[mine].max(initial=one["step"])))
        last = max(int(one.get("last_step", kept)), int(kept))
        end = float(times[mine].max(initial=begin))
        if following is not None and following.get("kind") == "roll_back":
            end = limit
        ended = [event.time for event in happened if event.kind in ("fault", "stop") and end <= event.time <= limit]
        if ended:
            end = min(ended)
        elif last > kept:
            end = min(limit, end + (last - kept) * each_seconds)
        stretches.append(Stretch(begin, end, int(one["step"]), int(kept), last))
    return stretches


def _timeline_note(drawn: Timeline | None) -> str:
    if drawn is None:
        return ""
    lost = f" Red: {drawn.lost_steps:,} steps that were lost and done again." if drawn.lost_steps else ""
    return (
        f"Steps over {span(drawn.seconds)} from the first start to the last sign; shaded where nothing ran."
        f"{lost} {_share(drawn.training_seconds, drawn.seconds)} of the time went into steps that count, the rest into "
        "starting, saving, evaluating, lost steps and standing still."
    )


def _tiles(
    run: RunFiles, table: Table, drawn: Timeline | None, results: dict[str, Any] | None
) -> list[tuple[str, str]]:
    tiles: list[tuple[str, str]] = []
    if results:
        zero_shot, retrieval = results["zero_shot"], results["retrieval"]
        shares = (
            (zero_shot["image_top1"], "images named, zero-shot"),
            (zero_shot["audio_top1"], "sounds named, zero-shot"),
            (retrieval["image_to_audio_class_p1"], "image to sound, class P@1"),
        )
        tiles += [(f"{100 * value:.1f} %", label) for value, label in shares if value is not None]
        if results["caption"]["loss"] is not None:
            tiles.append((f"{results['caption']['loss']:.3f}", "caption loss, nats a token"))
    if len(table):
        of = f" of {run.config.train.max_steps:,}" if run.config is not None else ""
        tiles.append((f"{table.steps[-1]:,.0f}", f"steps{of}, {table.last('samples_seen') or 0:,.0f} samples"))
        curve_of_loss = table.curve("loss", _WIDE_POINTS)
        if curve_of_loss is not None:
            tiles.append((f"{curve_of_loss.smooth[-1]:.4g}", "total loss"))
        speed = table.column("samples_per_second")
        tiles.append((f"{np.nanmedian(speed):,.4g}", "samples a second, median"))
        waits = float(np.nanmean(table.column("data_wait_fraction")))
        tiles.append((f"{100 * waits:.1f} %", "of the step waiting for data"))
        tiles.append((span(float(np.nansum(table.column("step_seconds")))), "in training steps that count"))
    if drawn is not None and len(run.starts) > 1:
        tiles.append((_share(drawn.training_seconds, drawn.seconds), f"of the {span(drawn.seconds)} since the start"))
    if len(run.starts) > 1 or run.num_incidents:
        kinds = Counter("odd step" if each.of_numbers else "fault" for each in run.incidents)
        told = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in kinds.items())
        restarts = max(0, len(run.starts) - 1)
        tiles.append((f"{restarts}", f"restart{'s' * (restarts != 1)}{told and '; ' + told}"))
    return tiles


def _subtitle(run: RunFiles, table: Table) -> str:
    config = run.config
    parts = [f"{config.model.preset} model"] if config is not None else []
    if len(table):
        parts.append(f"step {table.steps[-1]:,.0f}")
    if run.starts:
        parts.append(f"begun {time.strftime('%Y-%m-%d %H:%M', time.localtime(float(run.starts[0].get('time', 0))))}")
    return ", ".join([*parts, str(run.path)])


def _facts(run: RunFiles, table: Table) -> list[tuple[str, str]]:
    config, worlds = run.config, run.run.get("world_sizes") or []
    hosts = list(dict.fromkeys(str(start.get("host")) for start in run.starts))
    found: list[tuple[str, Any]] = [
        ("run", run.run.get("run_id")),
        ("processes", " then ".join(str(world) for world in dict.fromkeys(worlds))),
        ("hosts", ", ".join(hosts[:20])),
        ("device", run.starts[-1].get("device") if run.starts else None),
        ("Slurm jobs", ", ".join(run.job_ids)),
    ]
    if config is not None:
        losses = {name: weight for name, weight in config.losses.model_dump().items() if weight}
        train = config.train
        found += [
            ("training data", ", ".join(source.path for source in config.data.train_sources)),
            ("evaluation data", ", ".join(source.path for source in config.data.eval_sources)),
            ("losses", ", ".join(f"{name} {weight:g}" for name, weight in losses.items())),
            (
                "optimizer",
                f"AdamW, learning rate {train.learning_rate:g}, {train.schedule}, {train.warmup_steps} warm-up steps, "
                f"weight decay {train.weight_decay:g}, global batch {config.data.global_batch}",
            ),
            ("engine", f"ZeRO {config.engine.zero_stage}, {config.engine.precision}"),
        ]
    if run.checkpoints:
        found.append(("checkpoints", ", ".join(f"{step:,}" for step, _ in run.checkpoints)))
    saves = [float(line.get("stall_seconds", 0)) for line in run.saves if not line.get("reason")]
    if saves:
        found.append(("saving", f"{len(saves)} times; training stood still for {sum(saves):.1f} s in all"))
    if run.quarantined:
        found.append(("bad samples", f"{run.quarantined:,}, in quarantine.jsonl"))
    if len(table) and table.last("epoch") is not None:
        found.append(("epochs", f"{table.last('epoch'):.2f}"))
    return rows(found)


def _settings(config: Config | None) -> list[tuple[str, str]]:
    if config is None:
        return []
    required = {"run": {"dir": config.run.dir}, "data": {"train": config.data.model_dump(mode="json")["train"]}}
    defaults = Config.model_validate(required).model_dump(mode="json")
    return differences(config.model_dump(mode="json"), defaults)


def _evaluation_note(results: dict[str, Any] | None) -> str:
    if not results:
        return ""
    step = f", at step {results['step']:,}" if results.get("step") is not None else ""
    return f"On {results.get('data', {}).get('name', '')}, {results.get('num_samples', 0):,} samples{step}."


def _there(charts: Sequence[Chart | None]) -> list[Chart]:
    return [each for each in charts if each is not None]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else ""

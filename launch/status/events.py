"""What happened to a run, in the order of time: starts, stops, faults, odd steps, checkpoints, evaluations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launch.ranks import DONE, RUN_AGAIN, STOPPED_BY_FILE
from launch.status.run_files import Incident, RunFiles

Kind = Literal["start", "stop", "fault", "numbers", "checkpoint", "no checkpoint", "evaluation"]


@dataclass(frozen=True)
class Event:
    """Something that happened."""

    time: float
    """Seconds since 1970."""
    kind: Kind
    step: int
    text: str
    """In one line."""
    file: str = ""
    """Where there is more, in the run directory."""


def events(run: RunFiles, incidents: Sequence[Incident] | None = None) -> list[Event]:
    """Everything that the run's files tell, oldest first; of incidents those given, or the newest."""
    found = [*_starts(run), *_ends(run), *_saves(run), *_results(run)]
    found += [_incident(each) for each in (run.incidents if incidents is None else incidents)]
    return sorted(found, key=lambda event: event.time)


def _starts(run: RunFiles) -> Iterator[Event]:
    worlds: list[Any] = run.run.get("world_sizes") or []
    before = None
    for place, start in enumerate(run.starts):
        world = worlds[place] if place < len(worlds) else None
        ranks = f"{world} rank{'s' * (world != 1)}" if world else "ranks"
        step = int(start.get("step", 0))
        changed = f", {before} before" if before and world and before != world else ""
        how = f"from step {step}" if step else "from nothing"
        yield Event(
            float(start.get("time", 0)), "start", step, f"{ranks} on {start.get('host')} started {how}{changed}"
        )
        before = world


def _ends(run: RunFiles) -> Iterator[Event]:
    for line in run.supervisor:
        status, when = line.get("status"), float(line.get("time", 0))
        if line.get("event") == "end" and status in (DONE, RUN_AGAIN, STOPPED_BY_FILE):
            text = "done" if status == DONE else "stopped on purpose, with a checkpoint"
            yield Event(when, "stop", 0, text)
        elif line.get("event") == "gave up":
            yield Event(when, "stop", 0, f"not started again: {line.get('why')}")


def _saves(run: RunFiles) -> Iterator[Event]:
    for line in run.saves:
        when, step = float(line.get("time", 0)), int(line.get("step", 0))
        if line.get("reason"):
            yield Event(when, "no checkpoint", step, f"no checkpoint of step {step:,}: {line['reason']}")
            continue
        size, seconds = float(line.get("bytes", 0)) / 1e6, float(line.get("seconds", 0))
        yield Event(when, "checkpoint", step, f"checkpoint of step {step:,}: {size:,.1f} MB in {seconds:.1f} s")


def _results(run: RunFiles) -> Iterator[Event]:
    for file in sorted((run.path / "eval").glob("step-*.json")):
        try:
            step, when = int(file.stem[5:]), file.stat().st_mtime
        except (ValueError, OSError):
            continue
        yield Event(when, "evaluation", step, f"evaluated at step {step:,}", f"eval/{file.name}")


def _incident(each: Incident) -> Event:
    kind: Kind = "numbers" if each.of_numbers else "fault"
    who = f"rank {each.rank}: " if each.rank >= 0 and kind == "fault" else ""
    where = f"step {each.step:,}: " if each.step else "before the first step: "
    done = f" ({each.done})" if each.done else ""
    return Event(each.time, kind, each.step, f"{where}{who}{each.text}{done}", each.file)

"""The dashboard and the tables at terminals of every size, for runs of every age."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from launch.status.dashboard import Dashboard
from launch.status.run_files import RankBeat
from launch.status.slurm import Job
from launch.status.snapshot import Looker, Snapshot, look_at_all
from launch.status.state import State
from launch.status.tables import details, overview
from tests.launch.status.test_state import CONFIG

SIZES = [(40, 10), (60, 24), (80, 24), (95, 30), (96, 30), (132, 36), (240, 70)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """300 steps of a loss that falls from 9 to 0.9, the last ones with a spike, and a save that failed."""
    path = tmp_path / "a run with [red]a name[/red]"
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG % "x")
    now = time.time()
    lines = [
        {"step": step, "time": now - 300 + step, "step_seconds": 0.9, "loss": 9 / (1 + step / 33), "lr": 1e-4}
        | {"loss_text": 2.0, "samples_per_second": 8.5, "data_wait_fraction": 0.3, "grad_norm": 1.5, "rss_bytes": 2**31}
        for step in range(1, 301)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    starts = [{"time": now - 300, "step": 0, "host": "node1", "device": "cuda"}]
    (path / "run.json").write_text(json.dumps({"starts": starts, "world_sizes": [16]}))
    (path / "checkpoints.jsonl").write_text(json.dumps({"time": now, "step": 200, "reason": "no room [bold]"}) + "\n")
    return path


def shown(what: RenderableType, width: int, height: int = 200) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def under_way(run: Path) -> Snapshot:
    beats = [RankBeat(rank, "forward", 301, 5, "stopped" if rank == 1 else "alive") for rank in range(16)]
    snapshot = Looker(run).look()
    job = Job("47", "digits", "RUNNING", nodes="node[1-2]", num_nodes=2, seconds_left=60, limit_seconds=600, restarts=1)
    return replace(snapshot, run=replace(snapshot.run, beats=beats), jobs=[job], state=State("training"))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_it_fills_the_screen_and_no_more(run: Path, width: int, height: int) -> None:
    for snapshot in (under_way(run), Looker(run).look()):
        lines = shown(Dashboard().render(snapshot, width, height), width, height)
        assert len(lines) == height and {len(line) for line in lines} <= {width}
        assert "[red]" in lines[0] or width < 130, "a name is no markup"
        assert snapshot.state.word in lines[1]


def test_what_is_on_it(run: Path) -> None:
    text = "\n".join(shown(Dashboard().render(under_way(run), 200, 50), 200, 50))
    for word in ("losses, over 300 steps, log scale", "data wait", "30%", "GiB, rank 0", "1.00e-4"):
        assert word in text, word
    for word in (
        "rank 1      forward, step 301, stopped",
        "and 8 more ranks",
        "47 digits: running on node[1-2]",
        "no room",
    ):
        assert word in text, word
    assert "1 min of 10 min left, requeued 1 time" in text


def test_a_run_without_anything_yet(tmp_path: Path) -> None:
    run = tmp_path / "new"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(CONFIG % run)
    lines = shown(Dashboard().render(Looker(run).look(), 80, 24), 80, 24)
    assert len(lines) == 24 and "nothing has started yet" in lines[1]
    assert "nothing yet" in "\n".join(lines)
    assert "state       new  nothing has started yet" in [
        line.rstrip() for line in shown(details(Looker(run).look(), 60), 60)
    ]


@pytest.mark.parametrize("width", [30, 60, 160])
def test_the_tables_keep_to_the_width(run: Path, width: int) -> None:
    lines = shown(details(under_way(run), width), width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "the last save failed: no room [bold]" in text and "rank 0 in forward" in text
    table = shown(overview(look_at_all([run, run.parent / "gone"])), width)
    assert max(map(len, table)) <= width and len(table) >= 2

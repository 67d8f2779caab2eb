"""metrics.jsonl as it grows, is torn, is written anew and gets long; and curves of it for a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from launch.status.metrics import Metrics, every_line, thinned, values
from launch.status.spark import column_means, sparkline


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "loss": 10.0 / step, "filling": "x" * 500, **more}) + "\n"


def bytes_read() -> int:
    """What this process has read so far, from files and otherwise."""
    return int(Path("/proc/self/io").read_text().split()[1])


def steps(records: list[dict[str, Any]]) -> list[int]:
    return [record["step"] for record in records]


def test_it_follows_what_is_appended_and_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    assert not metrics.poll() and metrics.last is None
    path.write_text(line(1) + line(2)[:50])
    assert metrics.poll() and steps(metrics.recent) == [1]
    with path.open("a") as file:
        file.write(line(2)[50:])
    assert metrics.poll() and steps(metrics.recent) == [1, 2] == steps(metrics.overview)
    assert not metrics.poll()


def test_a_resume_writes_it_anew_and_shorter(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(map(line, range(1, 30))))
    metrics = Metrics(path)
    metrics.poll()
    new = tmp_path / "new"
    new.write_text("".join(map(line, range(1, 11))))
    new.rename(path)
    assert metrics.poll() and steps(metrics.recent) == list(range(1, 11))


def test_torn_lines_and_other_things_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + '{"step": 2, "lo\n' + "[]\n" + '{"loss": 1}\n' + '{"step": "x"}\n' + line(3, loss=None))
    metrics = Metrics(path)
    metrics.poll()
    assert steps(metrics.recent) == [1, 3] and values(metrics.recent, "loss") == [10.0, None]
    assert [record["step"] for record in every_line(path)] == [1, 3]


def test_a_long_run_is_read_at_places_over_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        file.writelines(map(line, range(1, 40_001)))
    assert path.stat().st_size > 20 << 20
    metrics = Metrics(path, places=100, recent=50)
    before = bytes_read()
    assert metrics.poll()
    assert bytes_read() - before < 2 << 20, "it read more than it needs"
    found = steps(metrics.overview)
    assert found == sorted(set(found)) and 100 <= len(found) <= 200 and found[0] == 1 and found[-1] == 40_000
    assert max(b - a for a, b in zip(found, found[1:], strict=False)) < 1200
    assert steps(metrics.recent) == list(range(39_951, 40_001))
    with path.open("a") as file:
        file.writelines(map(line, range(40_001, 40_500)))
    assert metrics.poll() and steps(metrics.overview)[-1] == 40_499 and len(metrics.overview) <= 200


@given(st.lists(st.integers(1, 10_000), unique=True, min_size=1), st.integers(2, 50))
def test_thinning_keeps_order_ends_and_number(numbers: list[int], wanted: int) -> None:
    records = [{"step": step} for step in sorted(numbers)]
    kept = thinned(records, wanted)
    assert len(kept) <= max(wanted, 2) or len(records) <= wanted
    assert steps(kept) == sorted(set(steps(kept))) and set(steps(kept)) <= set(numbers)
    assert kept[0] == records[0] and kept[-1] == records[-1]


@given(st.lists(st.none() | st.floats(-1e9, 1e9)), st.integers(1, 80), st.integers(1, 5))
def test_a_sparkline_has_its_size_and_its_shape(given_: list[float | None], width: int, height: int) -> None:
    rows = sparkline(given_, width, height)
    assert len(rows) == height and all(len(row) == width for row in rows)
    filled = [sum(" ▁▂▃▄▅▆▇█".index(row[column]) for row in rows) for column in range(width)]
    means = column_means(given_, width)
    for column, mean in enumerate(means):
        assert (filled[column] > 0) == (mean is not None)
    known = [(mean, filled[column]) for column, mean in enumerate(means) if mean is not None]
    ordered = sorted(known)
    assert all(a[1] <= b[1] for a, b in zip(ordered, ordered[1:], strict=False))

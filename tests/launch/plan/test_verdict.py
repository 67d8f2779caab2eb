"""What cannot work is refused, with what would; what can is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.plan import reject
from launch.plan.accelerators import ACCELERATORS
from launch.plan.cost import jobs
from launch.plan.planning import Plan, plan_run
from launch.plan.verdict import divides, judge
from pretrain.config import Config, load_config
from tests.small_run import config_text, small_dataset


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    small_dataset(folder / "train", "small-train", range(32))
    path = folder / "config.yaml"
    path.write_text(config_text(folder / "run", folder / "train", folder / "train"))
    return path


@pytest.fixture(scope="module")
def config(path: Path) -> Config:
    return load_config(path)


@pytest.fixture(scope="module")
def planned(config: Config) -> Plan:
    return plan_run(config, 2, ACCELERATORS["h100-80g"], time_limit_seconds=3600)


def problems(config: Config, plan: Plan, **changes: Any) -> list[str]:
    return judge(config, replace(plan, **changes))[0]


def test_a_run_that_works_is_not_refused(config: Config, planned: Plan) -> None:
    assert planned.problems == []
    assert planned.fits and planned.options[0].memory == planned.memory
    assert planned.jobs is not None and planned.jobs.requeues == 0
    assert planned.epochs == pytest.approx(1.0)
    assert reject(config, 2, "cpu", 3600.0) == []
    assert reject(config, 2, None, None) == []


def test_a_world_that_does_not_divide_the_batch_is_refused_with_ones_that_do(config: Config) -> None:
    (line,) = reject(config, 3, "cpu", None)
    assert "does not divide" in line and "2 or 4 ranks" in line
    odd = config.model_copy(update={"data": config.data.model_copy(update={"global_batch": 12, "micro_batch": 4})})
    assert divides(odd, 2) is not None and "data.micro_batch 3" in str(divides(odd, 2))
    assert divides(odd, 3) is None
    assert "use 1 or 3 ranks, or data.global_batch 20" in str(divides(odd, 5))
    assert all(divides(odd, ranks) is None for ranks in (1, 3))


def test_absent_data_are_refused(config: Config, tmp_path: Path) -> None:
    data = config.data.model_copy(update={"train": str(tmp_path / "nowhere")})
    (line,) = reject(config.model_copy(update={"data": data}), 2, "cpu", None)
    assert "nowhere" in line


def test_what_does_not_fit_is_refused_with_what_does(config: Config, planned: Plan) -> None:
    state = sum(size for part, size in planned.memory.device.items() if part not in ("activations", "logits"))
    small = replace(ACCELERATORS["h100-80g"], memory_bytes=(state + planned.memory.total) / 2 / 0.94)
    plan = plan_run(config, 2, small)
    (line,) = plan.problems
    assert "use data.micro_batch" in line
    size = int(line.split("use data.micro_batch ")[1].split()[0])
    assert 1 <= size < 4 and 4 % size == 0
    data = config.data.model_copy(update={"micro_batch": size})
    assert plan_run(config.model_copy(update={"data": data}), 2, small).problems == []
    none = plan_run(config, 2, replace(small, memory_bytes=1e9)).problems
    assert len(none) == 1 and "more memory" in none[0]


def test_a_short_time_limit_is_refused_with_one_that_is_long_enough(config: Config) -> None:
    (line,) = reject(config, 2, "cpu", 15.0)
    assert "leaves no time for a step" in line
    enough = float(line.split("at least ")[1].split()[0]) * 60
    assert reject(config, 2, "cpu", enough) == []


def test_more_requeues_than_are_allowed_are_a_warning(config: Config, planned: Plan) -> None:
    many = jobs(100_000.0, 600.0, 60.0, 150.0)
    assert many is not None and many.requeues == 256
    problems, warnings = judge(config, replace(planned, time_limit_seconds=600.0, margin_seconds=150.0, jobs=many))
    assert problems == [] and any("requeued 256 times" in line for line in warnings)
    _, warnings = judge(config, replace(planned, time_limit_seconds=70.0, margin_seconds=17.0, jobs=None))
    assert any("no time left to train in" in line for line in warnings)


def test_workers_that_cannot_keep_up_are_a_warning(config: Config, planned: Plan) -> None:
    few, many = (judge(config, replace(planned, decode_cores=cores)) for cores in (2.0, 40.0))
    assert few[0] == many[0] == []
    assert not any("data.num_workers" in line for line in few[1])
    assert any("data.num_workers 20" in line for line in many[1])


def test_a_step_longer_than_the_watchdog_allows_is_refused(config: Config, planned: Plan) -> None:
    (line,) = problems(config, planned, step_seconds=2000.0, time_limit_seconds=None)
    assert "supervisor.hang_seconds 6000" in line


def test_a_checkpoint_that_the_disk_cannot_hold_is_refused(config: Config, planned: Plan) -> None:
    (line,) = problems(config, planned, checkpoint_bytes=1e18)
    assert line.startswith("run.dir:")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_prints_json_alone(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = run(str(path), "--accelerator", "h100", "--nproc", "4", "--time-limit", "1:00:00", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout or capfd.readouterr().out)
    assert found["ok"] and found["world_size"] == 4 and found["accelerator"]["name"] == "h100-80g"
    assert found["memory"]["total"] == pytest.approx(sum(found["memory"]["device"].values()))
    assert {option["memory"]["layout"]["zero_stage"] for option in found["options"]} == {0, 1, 2, 3}
    assert {option["gradient_checkpointing"] for option in found["options"]} == {True, False}
    assert found["jobs"]["requeues"] == 0 and found["time_limit_seconds"] == 3600


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--nproc", "2", "--accelerator", "cpu"), 0, ("ZeRO 3, recomputed", "activations", "can work", "TFLOP")),
        (("--nproc", "3", "--accelerator", "cpu"), 2, ("2 or 4 ranks",)),
        (("--accelerator", "abacus"), 2, ("not in the table",)),
        (("--time-limit", "soon", "--accelerator", "cpu"), 2, ("no time limit",)),
    ],
)
def test_the_command_says_it_to_people(
    path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], status: int, words: tuple[str, ...]
) -> None:
    done = run(str(path), *arguments)
    captured = capfd.readouterr()
    text = done.output + captured.out + captured.err
    assert done.exit_code == status, text
    for word in words:
        assert word in text
    assert "Traceback" not in text

"""Every fault of the table, at a drawn rank and step, one after the other on one run for each ZeRO stage.

Each time: what the run ended with, said and wrote; that nothing of it is left; that a valid checkpoint is. In the end:
every loss, weight, moment and generator equal to an undisturbed run's, and every sample exactly once. The default is a
short row of faults; `soak` goes through all of them.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from pretrain import checkpoint
from tests.faults.harness import Running, incidents, recipe
from tests.faults.states import compare_runs
from tests.faults.table import FAULTS, RANKS, Fault

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3000)]
SHORT = ("SIGSTOP to a rank", "SIGKILL to a data worker", "killed, a bit of the newest checkpoint flipped")
EVERY_STEPS = 5


def survive(folder: Path, stage: int, names: tuple[str, ...], seed: int) -> None:
    """Hit one run with these faults, one a start, and compare it with a golden one."""
    draw = random.Random(seed)
    faults = [fault for fault in FAULTS if fault.name in names]
    draw.shuffle(faults)
    common = {
        "train": {"max_steps": EVERY_STEPS * (3 + 2 * len(faults))},
        "supervisor": {"hang_seconds": 8, "start_seconds": 90, "max_restarts": 0},
        "checkpoint": {"every_steps": EVERY_STEPS, "keep_last": 3},
    }
    golden = Running(recipe(folder, "golden", stage, **common))
    assert golden.end(900) == 0, golden.said
    config = recipe(folder, "hit", stage, **common)
    expected_now = ""
    for fault in faults:
        run = Running(config)
        rank, step = draw.randrange(RANKS), _newest(config) + EVERY_STEPS * 2 + draw.randrange(EVERY_STEPS)
        print(f"{fault.name}: rank {rank}, after step {step}, ZeRO-{stage}, seed {seed}", flush=True)
        expected_now = _hit(run, fault, rank, step, draw, expected_now)
    last = Running(config)
    assert last.end(900) == 0, last.said
    assert re.search(expected_now, last.said), last.said
    assert compare_runs(golden.run_dir, last.run_dir) == []


def _hit(run: Running, fault: Fault, rank: int, step: int, draw: random.Random, expected: str) -> str:
    """One start of the run, up to its end by the fault; what the next start must say."""
    before = len(incidents(run.run_dir))
    assert run.wait_for_step(step), run.said
    run.family()
    fault.inject(run, rank, draw)
    if not fault.statuses:
        assert run.running and run.wait_for_step(step + 1), run.said
        run.kill()
    else:
        status = run.end()
        assert status in fault.statuses, (status, run.said)
    assert re.search(expected, run.said), (expected, run.said)
    assert re.search(fault.says.format(rank=rank) if "{rank}" in fault.says else fault.says, run.said), run.said
    new = incidents(run.run_dir)[before:]
    assert [each["kind"] for each in new] == list(fault.incident), (fault.name, new, run.said)
    if "{rank}" in fault.says:
        assert new[0]["rank"] == rank and new[0]["checkpoint"] is not None, new
    if fault.incident == ("hang",):
        assert set(new[0]["stacks"]) >= {str(other) for other in range(RANKS) if other != rank}, new
    found, _ = checkpoint.find_latest(run.run_dir)
    assert found is not None, fault.name
    return fault.later


def _newest(config: Path) -> int:
    """Step of the newest valid checkpoint of the run; 0 without any."""
    found, _ = checkpoint.find_latest(config.with_suffix(""))
    return found.step if found else 0


def test_a_few_faults_in_a_row(tmp_path: Path) -> None:
    survive(tmp_path, stage=2, names=SHORT, seed=4)


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_fault_of_the_table(tmp_path: Path, stage: int) -> None:
    survive(tmp_path, stage, tuple(fault.name for fault in FAULTS), random.SystemRandom().randrange(1 << 31))

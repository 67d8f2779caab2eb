"""Random faults against a real run; at its end, nothing lost, nothing repeated, and the weights of an undisturbed run.

    python -m tests.faults.chaos --minutes 30 --seed 1        the same as `make chaos MINUTES=30 SEED=1`

One run goes undisturbed, the other is hit again and again, at random moments (exponential, --mean-seconds apart), and
started again by the same command each time that it ends. Faults stop when the minutes are over, and the run is let to
its end. Everything that is drawn comes from the seed, which is printed; the moments within a step are the machine's.
Exit status 0 when all of this holds, 1 with what did not.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.harness import Running, incidents, metrics, recipe
from tests.faults.states import compare_runs
from tests.faults.table import FAULTS, RANKS, Fault

HANG_SECONDS, START_SECONDS = 8, 60


def chaos(folder: Path, minutes: float, seed: int, mean_seconds: float, stage: int, steps: int | None) -> list[str]:
    """Run it all below `folder` and return what did not hold; empty when everything did."""
    supervisor = {"hang_seconds": HANG_SECONDS, "start_seconds": START_SECONDS, "max_restarts": 0}
    common = {"checkpoint": {"every_steps": 10, "keep_last": 4}, "supervisor": supervisor, "data": {"num_workers": 1}}
    speed = _undisturbed(recipe(folder, "speed", stage, train={"max_steps": 60}, **common))
    # Half of the time goes to starting again, and to steps that are done a second time.
    steps = steps or max(60, round(minutes * 60 / speed / 2))
    print(f"seed {seed}, {speed:.2f} s a step, {steps} steps, ZeRO-{stage}", flush=True)
    golden = recipe(folder, "golden", stage, train={"max_steps": steps}, **common)
    _undisturbed(golden)

    draw = random.Random(seed)
    config = recipe(folder, "chaos", stage, train={"max_steps": steps}, **common)
    hit: Counter[str] = Counter()
    wrong: list[str] = []
    end = time.monotonic() + minutes * 60
    starts = 0
    while not wrong:
        run = Running(config)
        starts += 1
        try:
            fault = _hit_once(run, draw, end, mean_seconds, hit)
            status = run.end(600)
        except AssertionError as error:
            run.kill()
            wrong.append(str(error))
            break
        if status == 0:
            break
        # It may have come to its own end before the fault did anything, but to no other one.
        if fault is None or status not in fault.statuses:
            wrong.append(f"{fault.name if fault else 'no fault'}: ended with {status}:\n{run.said[-3000:]}")
    for name, count in sorted(hit.items()):
        print(f"{count:4}  {name}")
    kinds = Counter(incident["kind"] for incident in incidents(folder / "chaos"))
    print(f"{starts} starts, incidents: {dict(kinds)}")
    return wrong or compare_runs(folder / "golden", folder / "chaos")


def _hit_once(run: Running, draw: random.Random, end: float, mean_seconds: float, hit: Counter[str]) -> Fault | None:
    """Faults at random moments, up to the first that ends the run; None when the time or the run is over before one."""
    # One start in five may be hit before its first step, the others are let get somewhere.
    early = draw.random() < 0.2
    run.wait_for(lambda: bool(run.ranks()) and (early or run.has_trained()), 2 * START_SECONDS)
    while time.monotonic() < end and run.running:
        until = time.monotonic() + draw.expovariate(1 / mean_seconds)
        fault = draw.choice(FAULTS)
        while time.monotonic() < until and run.running:
            time.sleep(0.05)
        if not run.running:
            break
        hit[fault.name] += 1
        print(f"step {run.step()}: {fault.name}", flush=True)
        run.family()
        fault.inject(run, draw.randrange(RANKS), draw)
        if fault.statuses and _ends_within(run, 2 * START_SECONDS):
            return fault
    return None


def _ends_within(run: Running, seconds: float) -> bool:
    """Whether the command ends; a fault may also hit a process that nobody needs."""
    try:
        run.process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        print("  without effect", flush=True)
        return False
    return True


def _undisturbed(config: Path) -> float:
    """Run a config to its end; median seconds a step."""
    run = Running(config)
    if run.end(7200):
        raise AssertionError(f"the undisturbed run failed:\n{run.said[-4000:]}")
    seconds = sorted(line["step_seconds"] for line in metrics(run.run_dir))
    return float(seconds[len(seconds) // 2])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests.faults.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long faults go on (30)")
    parser.add_argument("--seed", type=int, default=None, help="of the faults; drawn and printed by default")
    parser.add_argument("--mean-seconds", type=float, default=30.0, help="mean time between two faults (30)")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3), help="ZeRO stage (2)")
    parser.add_argument("--steps", type=int, default=None, help="steps of the run; by default to fit the minutes")
    parser.add_argument("--keep", type=Path, default=None, help="folder to leave everything in")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        wrong = chaos(folder, options.minutes, seed, options.mean_seconds, options.stage, options.steps)
    for each in wrong:
        print(f"WRONG: {each}")
    print("chaos: " + ("failed" if wrong else "everything held"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

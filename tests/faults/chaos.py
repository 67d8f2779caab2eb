"""Random faults against a real run; at its end, nothing lost, nothing repeated, and the weights of an undisturbed run.

    python -m tests.faults.chaos --minutes 30 --seed 1        the same as `make chaos MINUTES=30 SEED=1`

One run goes undisturbed, the other is hit again and again, at random moments (exponential, --mean-seconds apart), and
started again by the same command each time that it ends. Faults stop when the minutes are over, and the run is let to
its end. Everything that is drawn comes from the seed, which is printed; the moments within a step are the machine's.
Exit status 0 when all of this holds, 1 with what did not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.harness import Running, incidents, metrics, recipe, triptych
from tests.faults.states import differences

HANG_SECONDS, START_SECONDS = 8, 60
STOPPED, DEAD = 75, 76

Inject = Callable[[Running, random.Random], None]


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run, and what `triptych train` may end with because of it."""

    name: str
    inject: Inject
    statuses: tuple[int, ...]


def _signal_one(
    find: Callable[[Running], list[psutil.Process]], number: int
) -> Callable[[Running, random.Random], None]:
    def inject(run: Running, draw: random.Random) -> None:
        if run.wait_for(lambda: bool(find(run))):
            _send(draw.choice(find(run)), number)

    return inject


def _everything_killed(run: Running, draw: random.Random) -> None:
    run.kill()


def _stop_file(run: Running, draw: random.Random) -> None:
    (run.run_dir / "STOP").touch()


def _second_starter(run: Running, draw: random.Random) -> None:
    done = triptych("train", str(run.config), "--nproc", "2")
    if run.running and done.returncode != 2:
        raise AssertionError(f"a second starter ended with {done.returncode}:\n{done.stderr}")


def _killed_and_flipped(run: Running, draw: random.Random) -> None:
    run.kill()
    path = _file_of_newest(run, draw)
    if path is not None:
        data = bytearray(path.read_bytes())
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data)


def _killed_and_deleted(run: Running, draw: random.Random) -> None:
    run.kill()
    path = _file_of_newest(run, draw)
    if path is not None:
        path.unlink()


def _killed_and_torn(run: Running, draw: random.Random) -> None:
    """What a power cut may leave of files that nobody waits for."""
    run.kill()
    for path in [run.run_dir / "metrics.jsonl", *(run.run_dir / "ledger").glob("*")]:
        size = path.stat().st_size if path.is_file() else 0
        newest = max((found["step"] for found in _checkpoints(run)), default=0)
        if path.name == "metrics.jsonl" and size and metrics(run.run_dir)[-1]["step"] > newest:
            os.truncate(path, size - draw.randrange(1, 20))


def _file_of_newest(run: Running, draw: random.Random) -> Path | None:
    """A file of the newest checkpoint, where an older one is there to go back to."""
    found = sorted((run.run_dir / "checkpoints").glob("step-*"))
    if len(found) < 2:
        return None
    return draw.choice(sorted(path for path in found[-1].rglob("*") if path.is_file()))


def _checkpoints(run: Running) -> list[dict[str, int]]:
    return list(json.loads(triptych("checkpoints", str(run.run_dir), "--json").stdout or "[]"))


def _send(one: psutil.Process, number: int) -> None:
    try:
        one.send_signal(number)
    except psutil.NoSuchProcess:
        pass


FAULTS = (
    Fault("SIGKILL to a rank", _signal_one(Running.ranks, signal.SIGKILL), (DEAD,)),
    Fault("SIGSEGV to a rank", _signal_one(Running.ranks, signal.SIGSEGV), (DEAD,)),
    Fault("SIGSTOP to a rank", _signal_one(Running.ranks, signal.SIGSTOP), (DEAD,)),
    Fault("SIGKILL to a data worker", _signal_one(Running.workers, signal.SIGKILL), (DEAD, 1)),
    Fault("SIGSTOP to a data worker", _signal_one(Running.workers, signal.SIGSTOP), (DEAD,)),
    Fault(
        "SIGKILL to the launcher",
        _signal_one(lambda run: [run.launcher()] if run.ranks() else [], signal.SIGKILL),
        (DEAD, 137),
    ),
    Fault("SIGKILL to the supervisor", lambda run, draw: run.process.kill(), (-signal.SIGKILL,)),
    Fault("SIGKILL to everything", _everything_killed, (-signal.SIGKILL,)),
    Fault("SIGTERM", lambda run, draw: run.process.terminate(), (STOPPED,)),
    Fault("SIGUSR1", lambda run, draw: run.process.send_signal(signal.SIGUSR1), (STOPPED,)),
    Fault("SIGINT", lambda run, draw: run.process.send_signal(signal.SIGINT), (STOPPED,)),
    Fault("a STOP file", _stop_file, (STOPPED,)),
    Fault("a second starter", _second_starter, ()),
    Fault("killed, a bit of the newest checkpoint flipped", _killed_and_flipped, (-signal.SIGKILL,)),
    Fault("killed, a file of the newest checkpoint deleted", _killed_and_deleted, (-signal.SIGKILL,)),
    Fault("killed, the last lines torn", _killed_and_torn, (-signal.SIGKILL,)),
)


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
    while not wrong:
        run = Running(config)
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
    return wrong or _compare(Path(folder / "golden"), Path(folder / "chaos"))


def _hit_once(run: Running, draw: random.Random, end: float, mean_seconds: float, hit: Counter[str]) -> Fault | None:
    """Faults at random moments, up to the first that ends the run; None when the time or the run is over before one."""
    # One start in five may be hit before its first step, the others are let get somewhere.
    before, early = len(metrics(run.run_dir)), draw.random() < 0.2
    run.wait_for(lambda: bool(run.ranks()) and (early or len(metrics(run.run_dir)) != before), 2 * START_SECONDS)
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
        fault.inject(run, draw)
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


def _compare(golden: Path, other: Path) -> list[str]:
    wrong = []
    expected, found = metrics(golden), metrics(other)
    if [(m["step"], m["loss_hex"]) for m in expected] != [(m["step"], m["loss_hex"]) for m in found]:
        first = next((a["step"] for a, b in zip(expected, found, strict=False) if a["loss_hex"] != b["loss_hex"]), None)
        wrong.append(f"losses differ (first at step {first}; {len(expected)} and {len(found)} lines)")
    wrong += differences(golden, other)
    for option in ("--repeated", "--unseen"):
        done = triptych("ledger", str(other), option, "--json")
        if done.returncode or json.loads(done.stdout) != []:
            wrong.append(f"ledger {option}: {done.stdout[:500]} {done.stderr[-500:]}")
    done = triptych("ledger", str(other), "--verify")
    if done.returncode:
        wrong.append(f"ledger --verify: {done.stderr[-500:]}")
    left = [path.name for path in (other / "checkpoints").iterdir() if path.name.startswith(".tmp")]
    if left:
        wrong.append(f"left behind: {left}")
    kinds = Counter(incident["kind"] for incident in incidents(other))
    restarts = json.loads((other / "run.json").read_text())["restarts"]
    print(f"{restarts} restarts, {len(found)} steps, incidents: {dict(kinds)}")
    return wrong


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

"""The table of faults: how each is injected from outside, and what a run must end with, say and write because of it.

`test_table.py` goes through it by rank, step and ZeRO stage; `chaos.py` draws from it at random.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pretrain import checkpoint
from tests.faults.harness import Running, metrics, triptych

STOPPED, DEAD = 75, 76
KILLED = -signal.SIGKILL
RANKS = 2
_ON_PURPOSE = "stopped with a checkpoint; the same command goes on from there"


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run, and what follows."""

    name: str
    inject: Callable[[Running, int, random.Random], None]
    """Takes the run, a rank, and a source of everything else that is drawn."""
    statuses: tuple[int, ...] = ()
    """What `triptych train` may end with; it must not end at all where there is none."""
    says: str = ""
    """Regular expression for what it prints before it ends; `{rank}` is the rank that was hit."""
    incident: tuple[str, ...] = ()
    """Kinds that its `incident-*.json` may be of; there must be none where there is none here."""
    later: str = ""
    """Regular expression for what the next start prints, if there was more than one checkpoint."""


def _signal_one(find: Callable[[Running], list[psutil.Process]], number: int) -> Callable[..., None]:
    def inject(run: Running, rank: int, draw: random.Random) -> None:
        if run.wait_for(lambda: len(find(run)) > rank or not rank and bool(find(run))):
            _send(find(run)[rank], number)

    return inject


def _of_rank_zero(find: Callable[[Running], list[psutil.Process]], number: int) -> Callable[..., None]:
    inject = _signal_one(find, number)
    return lambda run, rank, draw: inject(run, 0, draw)


def _signal_command(*numbers: int) -> Callable[..., None]:
    def inject(run: Running, rank: int, draw: random.Random) -> None:
        for number in numbers:
            run.process.send_signal(number)
            if number != numbers[-1]:
                run.wait_for(lambda: "a second one stops at once" in run.said)

    return inject


def _everything_killed(run: Running, rank: int, draw: random.Random) -> None:
    run.kill()


def _stop_file(run: Running, rank: int, draw: random.Random) -> None:
    (run.run_dir / "STOP").touch()


def _second_starter(run: Running, rank: int, draw: random.Random) -> None:
    done = triptych("train", str(run.config), "--nproc", str(RANKS))
    if run.running and (done.returncode != 2 or "process" not in done.stderr):
        raise AssertionError(f"a second starter ended with {done.returncode}:\n{done.stderr}")


def _killed_and_flipped(run: Running, rank: int, draw: random.Random) -> None:
    run.kill()
    path = _file_of_newest(run, draw)
    if path is not None:
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)


def _killed_and_deleted(run: Running, rank: int, draw: random.Random) -> None:
    run.kill()
    path = _file_of_newest(run, draw)
    if path is not None:
        path.unlink()


def _killed_and_torn(run: Running, rank: int, draw: random.Random) -> None:
    """What a power cut may leave of a file whose last lines nobody has waited for."""
    run.kill()
    newest, _ = checkpoint.find_latest(run.run_dir)
    lines = metrics(run.run_dir)
    if lines and lines[-1]["step"] > (newest.step if newest else 0):
        path = run.run_dir / "metrics.jsonl"
        os.truncate(path, path.stat().st_size - draw.randrange(1, 20))


def _file_of_newest(run: Running, draw: random.Random) -> Path | None:
    """A file of the newest checkpoint, where an older one is there to go back to."""
    found = sorted((run.run_dir / "checkpoints").glob("step-*"))
    if len(found) < 2:
        return None
    return draw.choice(sorted(path for path in found[-1].rglob("*") if path.is_file() and path.stat().st_size))


def _send(one: psutil.Process, number: int) -> None:
    try:
        one.send_signal(number)
    except psutil.NoSuchProcess:
        pass


def _launcher(run: Running) -> list[psutil.Process]:
    return [run.launcher()] if run.ranks() else []


_HANG = r"rank {rank}: no sign of life for .*\(in \w+"
FAULTS = (
    Fault(
        "SIGKILL to a rank",
        _signal_one(Running.ranks, signal.SIGKILL),
        (DEAD,),
        r"rank {rank}: killed by SIGKILL.*\(in \w+[\s\S]*last checkpoint: .*[\s\S]*go on with: .*triptych train",
        ("rank_died",),
    ),
    Fault(
        "SIGSEGV to a rank",
        _signal_one(Running.ranks, signal.SIGSEGV),
        (DEAD,),
        r"rank {rank}: killed by SIGSEGV.*\(in \w+[\s\S]*go on with: ",
        ("rank_died",),
    ),
    Fault("SIGSTOP to a rank", _signal_one(Running.ranks, signal.SIGSTOP), (DEAD,), _HANG, ("hang",)),
    Fault(
        "SIGKILL to a data worker",
        _signal_one(Running.workers, signal.SIGKILL),
        (DEAD,),
        r"rank {rank}: DataLoader worker \(pid.* is killed by signal: Killed",
        ("worker_died",),
    ),
    Fault("SIGSTOP to a data worker", _signal_one(Running.workers, signal.SIGSTOP), (DEAD,), _HANG, ("hang",)),
    Fault(
        "SIGKILL to the launcher",
        _of_rank_zero(_launcher, signal.SIGKILL),
        (DEAD,),
        r"the launcher: killed by SIGKILL",
        ("launcher_died",),
    ),
    Fault("SIGKILL to the supervisor", _signal_command(signal.SIGKILL), (KILLED,)),
    Fault("SIGKILL to everything", _everything_killed, (KILLED,)),
    Fault("SIGTERM", _signal_command(signal.SIGTERM), (STOPPED,), rf"SIGTERM: stopping with[\s\S]*{_ON_PURPOSE}"),
    Fault("SIGUSR1", _signal_command(signal.SIGUSR1), (STOPPED,), rf"SIGUSR1: stopping with[\s\S]*{_ON_PURPOSE}"),
    Fault("SIGINT", _signal_command(signal.SIGINT), (STOPPED,), rf"SIGINT: stopping with[\s\S]*{_ON_PURPOSE}"),
    Fault(
        "SIGINT twice", _signal_command(signal.SIGINT, signal.SIGINT), (128 + signal.SIGINT, STOPPED), "a second one"
    ),
    Fault("a STOP file", _stop_file, (STOPPED,), "STOP"),
    Fault("a second starter", _second_starter),
    Fault("killed, a bit of the newest checkpoint flipped", _killed_and_flipped, (KILLED,), later="passed over"),
    Fault("killed, a file of the newest checkpoint deleted", _killed_and_deleted, (KILLED,), later="passed over"),
    Fault("killed, the last lines torn", _killed_and_torn, (KILLED,)),
)

"""The processes below one of ours, as Linux shows them in /proc: who they are, what they do, and their end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterable
from pathlib import Path

GONE = "gone"
STOPPED = "stopped"
UNINTERRUPTIBLE = "in an uninterruptible wait"
_STATES = {"T": STOPPED, "t": STOPPED, "Z": GONE, "X": GONE, "D": UNINTERRUPTIBLE}


def children(pid: int) -> list[int]:
    """Process ids of the direct children of `pid`; empty when it is gone."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found += [int(word) for word in file.read().split()]
    except OSError:
        pass
    return found


def descendants(pid: int, others: Collection[int] = ()) -> list[int]:
    """Process ids of everything below `pid`, but for its children `others` and what is below them."""
    found = [child for child in children(pid) if child not in others]
    for child in list(found):
        found += descendants(child)
    return found


def state(pid: int) -> str:
    """What a process does: `gone`, `stopped`, `in an uninterruptible wait`, or `alive`."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return GONE
    return _STATES.get(letter, "alive")


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; of one without, the signal would be the end."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except (OSError, ValueError, IndexError):
        pass
    return False


def send(pids: Iterable[int], number: int) -> None:
    """Signal processes; those that are gone by now are passed over."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def end_all(root: int, others: Collection[int] = (), seconds: float = 5.0) -> list[int]:
    """Kill what is below `root` besides `others`, reap what became its child, and return what would not go."""
    end = time.monotonic() + seconds
    while left := descendants(root, others):
        send(left, signal.SIGKILL)
        for pid in children(root):
            if pid not in others:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    continue
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return left


def wait_until_gone(root: int, others: Collection[int], seconds: float) -> None:
    """Wait until nothing is alive below `root` besides `others`, at most this long."""
    end = time.monotonic() + seconds
    while any(state(pid) != GONE for pid in descendants(root, others)) and time.monotonic() < end:
        time.sleep(0.05)


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; numbers without a name stay numbers."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

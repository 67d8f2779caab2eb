"""`accelerate launch`, with the ranks' own exit status and with signals that reach the ranks.

`python -m launch.ranks ARGS` takes exactly the arguments of `accelerate launch ARGS` and starts the ranks through it,
in this process. Two things differ, because a scheduler needs them:

- Plain `accelerate launch` ends with 1 whatever a rank said. Here 2 (bad input), 75 (stopped, run me again) and the
  rest come through, and the launcher's own traceback, which says nothing about the cause, stays away.
- torchelastic answers SIGTERM and SIGINT by killing the ranks after 30 seconds, and dies of SIGUSR1. Here each of the
  three is passed on to the ranks, and they take the time that they need to save.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

DONE, FAULT, BAD_INPUT, RUN_AGAIN = 0, 1, 2, 75


def main(arguments: list[str] | None = None) -> int:
    """Run the ranks to their end and return the exit status of all of them together."""
    # c10d warns with a stack trace when the node that holds its store ends before another one, as one always does.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # What torchelastic logs about a failure is "exitcode: 1, error_file: <N/A>" in twenty lines.
    logging.disable(logging.ERROR)
    passing = _PassOn()
    args: Any = launch_command_parser().parse_args(arguments)
    # accelerate hands attributes that torchrun knows on to it; SIGQUIT stays torchelastic's, for debugging.
    args.signals_to_handle = "SIGQUIT"
    try:
        launch_command(args)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, code in sorted(codes.items()):
            # torchelastic ends the other ranks with SIGTERM when one has failed; that is no news.
            if code < 0 and -code not in (signal.SIGTERM, *passing.passed):
                print(f"triptych: rank {rank} was killed by {_signal_name(-code)}{_guess(-code)}", file=sys.stderr)
        return joint_status(codes.values(), passing.passed)
    return DONE


def joint_status(codes: Iterable[int], passed: Iterable[int] = ()) -> int:
    """One exit status for what the ranks returned (negative: died of that signal), as a shell would give it.

    Bad input wins, since it needs a person; then faults; 75 only when nothing else happened. A SIGTERM counts last: it
    is how torchelastic ends the ranks that did not fail. `passed` are the signals that were passed on: a rank that dies
    of SIGUSR1 had not yet begun, so the whole is to be run again.
    """
    statuses = {code if code >= 0 else 128 - code for code in codes}
    early = {128 + int(signal.SIGUSR1)} & {128 + number for number in passed}
    if statuses & early:
        statuses = statuses - early | {RUN_AGAIN}
    ended_with_others = 128 + int(signal.SIGTERM)
    for status in (BAD_INPUT, *sorted(statuses - {DONE, RUN_AGAIN, ended_with_others}), RUN_AGAIN, ended_with_others):
        if status in statuses:
            return status
    return DONE


class _PassOn:
    """Passes each signal on to the ranks, which torchelastic starts as this process's only children."""

    def __init__(self) -> None:
        self.passed: set[int] = set()
        for number in PASSED_ON:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.passed.add(number)
        ranks = children(os.getpid())
        if not ranks:
            # Nobody to pass it on to, and nothing lost: not a single rank is up yet.
            raise SystemExit(RUN_AGAIN if number == signal.SIGUSR1 else 128 + number)
        for pid in ranks:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass


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


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _guess(number: int) -> str:
    return " (most often the machine, or the job's limit, was out of memory)" if number == signal.SIGKILL else ""


if __name__ == "__main__":
    sys.exit(main())

"""`accelerate launch`, with the ranks' own exit status and with signals that reach the ranks.

`python -m launch.ranks ARGS` takes exactly the arguments of `accelerate launch ARGS` and starts the ranks through it,
in this process. Three things differ, because a scheduler needs them:

- Plain `accelerate launch` ends with 1 whatever a rank said. Here 2 (bad input), 75 (stopped, run me again) and the
  rest come through, and the launcher's own traceback, which says nothing about the cause, stays away.
- Under a supervisor it leaves in the folder of the heartbeats what ended which rank, and ends with its supervisor.
- torchelastic answers SIGTERM and SIGINT by killing the ranks after 30 seconds, and dies of SIGUSR1. Here each of the
  three is passed on to the ranks, and they take the time that they need to save.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from launch.processes import children, end_all, send, signal_name
from pretrain.heartbeat import FOLDER_VARIABLE
from pretrain.orphan import LAUNCHER_VARIABLE

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

DONE, FAULT, BAD_INPUT, RUN_AGAIN, ENDED = 0, 1, 2, 75, 76
STOPPED_BY_FILE = 79
"""What a node of a Slurm job ends with instead of 75 where a file named STOP asked: run me again, but not by itself."""
PRIVATE_FOLDER = "triptych-"
"""What the name of a supervisor's private folder begins with."""
ENDED_RANKS = "ended.json"
"""Where the launcher leaves `[[rank, exit code]]` of the ranks that ended badly by themselves."""
_SECONDS_TO_SAVE_ALONE = 30.0
# torchelastic kills what has not followed its SIGTERM after 30 seconds.
_TORCHELASTIC_PATIENCE_SECONDS = 25


def main(arguments: list[str] | None = None) -> int:
    """Run the ranks to their end and return the exit status of all of them together."""
    passing = _PassOn()
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    supervised = os.environ.get(FOLDER_VARIABLE)
    if supervised:
        threading.Thread(target=_end_with_supervisor, args=(os.getppid(),), daemon=True).start()
        atexit.register(_clear_after_supervisor, os.getppid(), Path(supervised).parent)
    # c10d warns with a stack trace when the node that holds its store ends before another one, as one always does.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # What torchelastic logs about a failure is "exitcode: 1, error_file: <N/A>" in twenty lines.
    logging.disable(logging.ERROR)
    args: Any = launch_command_parser().parse_args(arguments)
    # accelerate hands attributes that torchrun knows on to it; SIGQUIT stays torchelastic's, for debugging.
    args.signals_to_handle = "SIGQUIT"
    try:
        launch_command(args)
    except ChildFailedError as error:
        first = min(failure.timestamp for failure in error.failures.values())
        codes = {
            rank: failure.exitcode
            for rank, failure in sorted(error.failures.items())
            if failure.exitcode != -signal.SIGKILL or failure.timestamp < first + _TORCHELASTIC_PATIENCE_SECONDS
        }
        # torchelastic ends the other ranks with SIGTERM when one has failed; that is no news.
        own = {rank: code for rank, code in codes.items() if -code not in (signal.SIGTERM, *passing.passed)}
        if supervised:
            Path(supervised, ENDED_RANKS).write_text(json.dumps(list(own.items())))
        for rank, code in own.items() if not supervised else ():
            if code < 0:
                print(f"triptych: rank {rank} was killed by {signal_name(-code)}{_guess(-code)}", file=sys.stderr)
        return joint_status(codes.values(), passing.passed)
    return DONE


def joint_status(codes: Collection[int], passed: Iterable[int] = ()) -> int:
    """One exit status for what the ranks returned (negative: died of that signal), as a shell would give it.

    Bad input wins, since it needs a person; then a rank that was killed, since others fail for want of it; then faults;
    75 only when nothing else happened. SIGABRT comes after faults: gloo aborts a rank whose peer has failed. A SIGTERM
    counts last: it is how torchelastic ends the ranks that did not fail. `passed` are the signals that were passed on:
    a rank that dies of SIGUSR1 had not yet begun, so the whole is to be run again.
    """
    statuses = {code if code >= 0 else 128 - code for code in codes}
    early = {128 + int(signal.SIGUSR1)} & {128 + number for number in passed}
    if statuses & early:
        statuses = statuses - early | {RUN_AGAIN}
    killed = sorted(128 - code for code in codes if code < 0 and 128 - code in statuses)
    aborted, ended_with_others = 128 + int(signal.SIGABRT), 128 + int(signal.SIGTERM)
    last = (aborted, RUN_AGAIN, ended_with_others)
    order = (*(status for status in killed if status not in last), *sorted(statuses - {DONE, *last}), *last)
    return next((status for status in (BAD_INPUT, *order) if status in statuses), DONE)


def _end_with_supervisor(supervisor: int) -> None:
    """Have the ranks save and end when the process that watches them is gone."""
    while os.getppid() == supervisor:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_SAVE_ALONE)
    end_all(os.getpid())
    os._exit(ENDED)


def _clear_after_supervisor(supervisor: int, private: Path) -> None:
    """Remove the private folder of a supervisor that is gone and cannot do so itself."""
    if os.getppid() != supervisor and private.name.startswith(PRIVATE_FOLDER):
        shutil.rmtree(private, ignore_errors=True)


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
        send(ranks, number)


def _guess(number: int) -> str:
    return " (most often the machine, or the job's limit, was out of memory)" if number == signal.SIGKILL else ""


if __name__ == "__main__":
    sys.exit(main())

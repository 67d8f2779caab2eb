"""One log a rank: what a rank says goes where it went, and with the time of day to `logs/rank-N.log` of the run.

Appended over all starts of a run, each of which begins with a line that says which start it is, on which host and in
which job. Lines are written whole and at once, so that those of a rank that is killed are there to the last. What
libraries write below Python (NCCL_DEBUG) does not come here: NCCL_DEBUG_FILE names a file for that.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import TextIO


class _Copied:
    """A text stream that leaves a copy of each line in a log."""

    def __init__(self, stream: TextIO, log: int) -> None:
        self._stream, self._log, self._line = stream, log, ""

    def write(self, text: str) -> int:
        self._line += text
        *lines, self._line = self._line.split("\n")
        if lines:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            # What a progress bar overwrites on a terminal is not kept.
            whole = "".join(f"{stamp} {line.rpartition(chr(13))[2]}\n" for line in lines)
            try:
                os.write(self._log, whole.encode("utf-8", "backslashreplace"))
            except OSError:
                # A full disk is no reason to end; the stream itself still has it.
                pass
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def keep_rank_log(run_dir: Path, rank: int, start: int) -> None:
    """Copy standard output and error of this process to the rank's log from now on.

    Args:
        run_dir: the run directory; where no file can be made there, nothing is kept.
        rank: global rank.
        start: how often the run has started, this time included.
    """
    path = run_dir / "logs" / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        print(f"rank {rank}: no log at {path} ({error.strerror})", file=sys.stderr)
        return
    job = os.environ.get("SLURM_JOB_ID")
    where = f"on {platform.node()}, process {os.getpid()}"
    if job:
        where += f", job {job}, requeued {os.environ.get('SLURM_RESTART_COUNT') or 0} times"
    os.write(log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} == start {start} of the run, {where}\n".encode())
    sys.stdout = _Copied(sys.stdout, log)
    sys.stderr = _Copied(sys.stderr, log)

"""When a run has to stop by itself: a while before the time limit of its job."""

from __future__ import annotations

import os
import re
import time

from data_pipelines.errors import BadInput

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Seconds of a duration like `90s`, `5m` or `1.5h`.

    Raises:
        BadInput: it is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if not match:
        raise BadInput(f"run.stop_before: {text!r} is no duration; write for example 90s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2]]


class Deadline:
    """`run.stop_before` ahead of the job's end, which Slurm says in SLURM_JOB_END_TIME (seconds since the epoch).

    Without either there is no deadline.
    """

    def __init__(self, stop_before: str | None) -> None:
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        known = stop_before is not None and end.isdigit()
        margin = parse_duration(stop_before) if stop_before is not None else 0.0
        self._at = int(end) - margin if known else None

    def passed(self) -> bool:
        """Whether it is time to save and stop."""
        return self._at is not None and time.time() >= self._at

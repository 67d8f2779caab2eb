"""Standard output for results alone.

Libraries print: DeepSpeed logs to standard output when it is imported, transformers draws bars. While a command works,
all of that goes to standard error, so that what a program reads from `--json` is JSON and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def messages_to_stderr() -> Iterator[None]:
    """Send what is written to standard output inside, by Python or below it, to standard error."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        # Otherwise DeepSpeed warns that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def say(line: str) -> None:
    """A message for people, on standard error."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), flush=True)

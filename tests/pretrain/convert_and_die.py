"""Started by test_resume.py: convert a checkpoint again and again, killed at every flush and rename in turn.

Prints, as JSON, what was found after each death: whether the form is there under its own name, and whether it is valid.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipelines.progress import Progress
from pretrain import universal


def die_at(number: int) -> None:
    """SIGKILL this process right before its `number`-th fsync, replace or rename."""
    left = number

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapped

    for name in ("fsync", "replace", "rename"):
        setattr(os, name, counted(getattr(os, name)))
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]


def main(checkpoint: Path, run_dir: Path) -> list[dict[str, Any]]:
    universal._FILE_BYTES = 2_500_000
    found: list[dict[str, Any]] = []
    while True:
        child = os.fork()
        if not child:
            die_at(len(found))
            with Progress("converting", "MB", quiet=True) as progress:
                universal.convert(checkpoint, run_dir, progress)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        form = universal.folder_of(checkpoint, run_dir)
        reason = universal.why_not(form, checkpoint) if form.exists() else None
        found.append({"killed": os.WIFSIGNALED(status), "there": form.exists(), "reason": reason})
        if not os.WIFSIGNALED(status):
            return found
        if form.exists():
            form.rename(form.with_name(f".tmp-{len(found)}"))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))

"""The other end of `engines.local`: a process that takes tasks from a socket until the socket closes.

Started as `python -P -m data_pipelines.engines.worker DESCRIPTOR`. It does not import the caller's main module, as
multiprocessing's spawn would: beside a trainer that would load torch once a worker.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

_SECONDS_BETWEEN_TICKS = 0.1


class Ticker:
    """Tells the parent how many units of work are done, ten times a second at most.

    Telling fails with `BrokenPipeError` when the parent is gone, so no orphan works on for longer than one unit.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._count = 0
        self._last = time.monotonic()

    def __call__(self, count: int) -> None:
        """`count` more are done."""
        self._count += count
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_TICKS:
            self.flush()

    def flush(self) -> None:
        """Tell what has not been told yet."""
        self._connection.send(("tick", self._count))
        self._count, self._last = 0, time.monotonic()


def serve(connection: Connection) -> None:
    """Take a job, then tasks; answer each with its result or its exception."""
    tick = Ticker(connection)
    job = connection.recv()
    while True:
        task = connection.recv()
        try:
            answer: tuple[str, Any] = ("done", job(task, tick))
        except BrokenPipeError:
            raise
        except Exception as error:
            error.add_note(f"in a worker: {traceback.format_exc()}")
            answer = ("failed", error)
        tick.flush()
        connection.send(answer)


if __name__ == "__main__":
    # webdataset imports torch where there is one, 2.5 s a worker, and writes tars just as well without.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):
        # The parent closed its end, or died: what was begun here is nobody's any more.
        os._exit(0)

"""Run a test program on several gloo ranks, with a hard time limit, and end every rank whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(module: str, arguments: Sequence[str], world_size: int = 2, timeout: float = 240) -> list[str]:
    """Start `python -m module arguments` once a rank and return each rank's standard output.

    Raises:
        AssertionError: a rank failed or the time ran out; the message holds the ranks' standard error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", module, *arguments]
        pipe = subprocess.PIPE
        ranks.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
            )
        )
    try:
        results = [process.communicate(timeout=timeout) for process in ranks]
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{module} ran longer than {timeout} s") from error
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    for process, (_, errors) in zip(ranks, results, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [output for output, _ in results]

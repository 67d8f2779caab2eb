"""Run a test program on several gloo ranks, with a hard time limit, and end every rank whatever happens.

Ranks are forked from one process that has imported torch, transformers and DeepSpeed: that takes seconds a rank,
and tests start many. What the imports set up is what `prepare_environment` would find in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["deepspeed", "pretrain.model.omni", "pretrain.trainer", "data_pipelines.loader"])


def run_ranks(
    module: str, arguments: Sequence[str], world_size: int = 2, timeout: float = 240, exitcode: int = 0
) -> list[str]:
    """Run `python -m module arguments` once a rank and return each rank's standard output.

    Raises:
        AssertionError: a rank did not end with `exitcode` (-9: of SIGKILL), or the time ran out; the message holds its
            standard error.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
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
            files = (f"{folder}/{rank}.out", f"{folder}/{rank}.err")
            ranks.append(_FORKED.Process(target=_rank, args=(module, list(arguments), environment, *files)))
        try:
            for process in ranks:
                process.start()
            deadline = time.monotonic() + timeout
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
                assert process.exitcode is not None, f"{module} ran longer than {timeout} s"
        finally:
            for process in ranks:
                if process.pid is not None and process.exitcode is None:
                    process.kill()
                    process.join()
        for rank, process in enumerate(ranks):
            assert process.exitcode == exitcode, Path(folder, f"{rank}.err").read_text()[-4000:]
        return [Path(folder, f"{rank}.out").read_text() for rank in range(world_size)]


def _rank(module: str, arguments: list[str], environment: dict[str, str], out: str, errors: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for descriptor, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    [
        "deepspeed",
        "pretrain.model.omni",
        "pretrain.trainer",
        "data_pipelines.loader",
        # What DeepSpeed and transformers import only when an engine is made: seconds of each rank.
        "accelerate",
        "torch._functorch.partitioners",
        "torch._inductor.compile_fx",
        "transformers.models.gemma4.modeling_gemma4",
    ]
)


@dataclass
class Rank:
    """One started rank, and the files with what it says."""

    process: Any
    out: Path
    err: Path

    def end(self) -> None:
        """Kill it if it is still there."""
        if self.process.pid is not None and self.process.exitcode is None:
            self.process.kill()
            self.process.join()


@contextmanager
def started_ranks(module: str, arguments: Sequence[str], world_size: int = 2) -> Iterator[list[Rank]]:
    """`python -m module arguments` once a rank, started; on leaving every rank is ended, whatever happened."""
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
            out, err = Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")
            process = _FORKED.Process(target=_rank, args=(module, list(arguments), environment, str(out), str(err)))
            ranks.append(Rank(process, out, err))
        try:
            for one in ranks:
                one.process.start()
            yield ranks
        finally:
            for one in ranks:
                one.end()


def run_ranks(
    module: str, arguments: Sequence[str], world_size: int = 2, timeout: float = 240, exitcode: int = 0
) -> list[str]:
    """Run `python -m module arguments` once a rank and return each rank's standard output.

    Raises:
        AssertionError: a rank did not end with `exitcode` (-9: of SIGKILL), or the time ran out; the message holds its
            standard error.
    """
    with started_ranks(module, arguments, world_size) as ranks:
        deadline = time.monotonic() + timeout
        for one in ranks:
            one.process.join(max(0.0, deadline - time.monotonic()))
            assert one.process.exitcode is not None, f"{module} ran longer than {timeout} s"
        for one in ranks:
            assert one.process.exitcode == exitcode, one.err.read_text()[-4000:]
        return [one.out.read_text() for one in ranks]


def _rank(module: str, arguments: list[str], environment: dict[str, str], out: str, errors: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for descriptor, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

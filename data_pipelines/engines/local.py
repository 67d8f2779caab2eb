"""Runs tasks in processes of this machine.

Tasks are handed out in order, so whenever one fails, all before it have been started: the failure that is reported is
that of the first task that fails, whatever the number of workers. Workers are fresh interpreters (see `worker`) in
process groups of their own, so Ctrl-C reaches this process alone; they end when it does, however it ends.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[int], None]
Job = Callable[[Task, Tick], Result]


class WorkerDied(RuntimeError):
    """A worker ended without an answer: killed, most likely for memory, or unable to start."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    task: int | None = None


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(job: Job[Task, Result], tasks: Sequence[Task], workers: int, tick: Tick) -> Iterator[tuple[Task, Result]]:
    """Yield (task, result) as they come. `job` and tasks are pickled; `tick` gets the units of work that are done.

    One worker, or one task, runs in this process. Raises what the first failing task raised, after the ones before it
    are done; `WorkerDied` when a process ended on its own.
    """
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            yield task, job(task, tick)
        return
    pool: list[_Worker] = []
    try:
        for _ in range(min(workers, len(tasks))):
            pool.append(_start(job))
        yield from _share_out(pool, tasks, tick)
    finally:
        for worker in pool:
            worker.connection.close()
            worker.process.kill()
        for worker in pool:
            worker.process.wait()


def _start(job: Any) -> _Worker:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "data_pipelines.engines.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # Standard output is for what programs read.
            stdout=2,
            process_group=0,
            env=environment,
        )
        worker = _Worker(process, Connection(ours.detach()))
    _send(worker, job)
    return worker


def _send(worker: _Worker, value: Any) -> None:
    try:
        worker.connection.send(value)
    except ConnectionError as error:
        raise _died(worker) from error


def _share_out(pool: list[_Worker], tasks: Sequence[Task], tick: Tick) -> Iterator[tuple[Task, Any]]:
    waiting = iter(range(len(tasks)))
    first_failed, failure = len(tasks), None

    def hand_out(worker: _Worker) -> None:
        worker.task = next(waiting, None) if failure is None else None
        if worker.task is not None:
            _send(worker, tasks[worker.task])

    for worker in pool:
        hand_out(worker)
    while True:
        busy = {w.connection: w for w in pool if w.task is not None and w.task < first_failed}
        if not busy:
            break
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]
            try:
                kind, value = worker.connection.recv()
            except (EOFError, ConnectionError) as error:
                raise _died(worker) from error
            assert worker.task is not None
            if kind == "tick":
                tick(value)
                continue
            number, worker.task = worker.task, None
            if kind == "failed" and number < first_failed:
                first_failed, failure = number, value
            elif kind == "done":
                yield tasks[number], value
            hand_out(worker)
    if failure is not None:
        raise failure


def _died(worker: _Worker) -> WorkerDied:
    try:
        status = worker.process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return WorkerDied("a worker closed its connection")
    how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    hint = " (out of memory? use fewer workers)" if status == -9 else ""
    return WorkerDied(f"a worker {how}{hint}")

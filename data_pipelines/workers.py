"""Work ahead in threads or processes, results in order.

Decoders release the interpreter's lock, so threads decode in parallel without the cost of moving batches between
processes; processes share no lock at all. Nothing outlives the iterator: when it is closed or dropped, what has not
begun is cancelled.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

_PR_SET_PDEATHSIG = 1

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_threads(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, ahead: int
) -> Iterator[Result]:
    """Yield `function(item)` for each item in order, at most `ahead` of them begun before they are asked for.

    An exception of the function is raised in its item's turn.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="loader")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def forked_processes(
    steps: Any, numbers: range, num_processes: int, ahead: int, forked: Callable[[], None]
) -> Generator[Any, None, None]:
    """Yield `steps[number]`, made in forked processes, for each number in order.

    Each process begins at most `ahead` before they are asked for. `forked` is called as soon as there are processes.
    """
    # Without it, tokenizers prints a warning for every fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    by_main_thread = threading.current_thread() is threading.main_thread()
    loader: DataLoader[Any] = DataLoader(
        steps,
        sampler=numbers,
        batch_size=None,
        num_workers=num_processes,
        prefetch_factor=ahead,
        collate_fn=_as_it_is,
        worker_init_fn=functools.partial(_start_worker, os.getpid(), by_main_thread),
        # A fork starts in milliseconds where a fresh interpreter imports torch for seconds. It is safe here: a worker
        # touches no device and no lock of the parent's threads, and runs no parallel region of OpenMP.
        multiprocessing_context="fork",
        # Its base seed would be drawn from torch's own generator, one number at each start of a run: a run that was
        # resumed would go on with other random numbers than one that was not.
        generator=torch.Generator(),
    )
    loading = iter(loader)
    forked()
    yield from loading


def _as_it_is(made: Any) -> Any:
    return made


def _obey_parent_alone(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)


def _start_worker(parent: int, by_main_thread: bool, _worker: int) -> None:
    # A scheduler signals every process of a job. The rank decides what a signal means; a worker that died of it would
    # take the rank down before its checkpoint is saved. The rank's own SIGTERM must still end the worker: Python sends
    # it at exit and then waits. SIGUSR2 stays as it is: a rank has it print stacks, and so do its workers.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent_alone, args=(parent,), name="signals", daemon=True).start()
    torch.set_num_threads(1)
    # The kernel sends this when the thread that forked ends, so it is for workers of the main thread alone.
    if by_main_thread and hasattr(signal, "SIGKILL") and os.name == "posix":
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        except (OSError, AttributeError):
            # Not Linux: torch's own watch over the parent ends the worker, within seconds.
            return
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

"""Work ahead in threads, results in order.

Decoders release the interpreter's lock, so threads decode in parallel without the cost of moving batches between
processes. Nothing outlives the iterator: when it is closed or dropped, what has not begun is cancelled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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

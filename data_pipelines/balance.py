"""Who takes what: equal counts and even costs over the ranks, and segments packed into rows.

Both are decided from numbers that are known before a byte is read, by every rank alone and alike. Dealing is the
longest-processing-time rule (Graham, 1969) under equal counts. Packing fills as few rows as first-fit decreasing
(Johnson, 1973) needs, and then spreads the segments evenly over them: rows are as long as the longest, so what counts
is that they are alike, not that the first ones are full.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# Rows beyond the fewest that are tried: one more row may be narrower by more than it costs.
_MORE_ROWS = 2


def deal(costs: npt.ArrayLike, world_size: int) -> list[IntArray]:
    """Deal samples to ranks: the same number to each, the sums of the costs close to each other.

    Returns `world_size` int64 arrays of places in `costs`, ascending; together they are every place once. Ties go to
    the earlier place and the lower rank, so that the result is a function of the costs. Raises ValueError when the
    samples do not divide evenly.
    """
    cost = np.asarray(costs, dtype=np.float64).reshape(-1)
    if world_size < 1 or len(cost) % world_size:
        raise ValueError(f"{len(cost)} samples do not divide evenly among {world_size} ranks")
    if world_size == 1:
        return [np.arange(len(cost), dtype=np.int64)]
    share = len(cost) // world_size
    hands: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0.0, rank) for rank in range(world_size)]
    for place in np.argsort(-cost, kind="stable").tolist():
        load, rank = loads[0]
        hands[rank].append(place)
        if len(hands[rank]) < share:
            heapq.heapreplace(loads, (load + float(cost[place]), rank))
        else:
            heapq.heappop(loads)
    return [np.array(sorted(hand), dtype=np.int64) for hand in hands]


def pack(lengths: Sequence[int] | IntArray, row_tokens: int, multiple: int = 1) -> list[IntArray]:
    """Pack segments into rows of at most `row_tokens` tokens, so that rows as wide as the longest hold little else.

    `multiple` is what the width of the rows will be rounded up to. Returns one int64 array a row of places in
    `lengths`, ascending; together they are every place once. Raises ValueError for a segment that is longer than a row
    or has a negative length.
    """
    length = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if length.size and (int(length.min()) < 0 or int(length.max()) > row_tokens):
        raise ValueError(f"segments of {length.min()} to {length.max()} tokens in rows of {row_tokens}")
    order = np.argsort(-length, kind="stable").tolist()
    sizes = length.tolist()
    fewest = _first_fit(order, sizes, row_tokens)
    best, least = fewest, _area(fewest, sizes, multiple)
    for num_rows in range(max(1, -(-sum(sizes) // row_tokens)), len(fewest) + _MORE_ROWS + 1):
        if num_rows > len(order):
            break
        rows = _spread(order, sizes, num_rows)
        area = _area(rows, sizes, multiple)
        # Fewer rows win a draw: they come first.
        if max(sum(sizes[place] for place in row) for row in rows) <= row_tokens and area < least:
            best, least = rows, area
    return [np.array(sorted(row), dtype=np.int64) for row in best]


def _area(rows: list[list[int]], sizes: list[int], multiple: int) -> int:
    """Tokens of all rows, padding included, when each is as wide as the longest."""
    longest = max((sum(sizes[place] for place in row) for row in rows), default=0)
    return len(rows) * -(-longest // multiple) * multiple


def _first_fit(order: list[int], sizes: list[int], row_tokens: int) -> list[list[int]]:
    room = np.full(len(order), row_tokens, dtype=np.int64)
    rows: list[list[int]] = []
    for place in order:
        # Rows that are not begun have all their room, so the search always ends within one more than there are.
        row = int(np.argmax(room[: len(rows) + 1] >= sizes[place]))
        if row == len(rows):
            rows.append([])
        rows[row].append(place)
        room[row] -= sizes[place]
    return rows


def _spread(order: list[int], sizes: list[int], num_rows: int) -> list[list[int]]:
    """Each segment, longest first, to the emptiest row."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = [(0, row) for row in range(num_rows)]
    for place in order:
        load, row = loads[0]
        rows[row].append(place)
        heapq.heapreplace(loads, (load + sizes[place], row))
    return rows

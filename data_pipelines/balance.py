"""Who takes what: equal counts and even costs over the ranks, and segments packed into rows.

Both are decided from numbers that are known before a byte is read, by every rank alone and alike. Dealing is the
longest-processing-time rule (Graham, 1969) under equal counts; packing is first-fit decreasing (Johnson, 1973).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


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


def pack(lengths: Sequence[int] | IntArray, row_tokens: int) -> list[IntArray]:
    """Pack segments into as few rows of `row_tokens` tokens as first-fit decreasing finds.

    Returns one int64 array a row of places in `lengths`, ascending; together they are every place once. Raises
    ValueError for a segment that is longer than a row or has a negative length.
    """
    length = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if length.size and (int(length.min()) < 0 or int(length.max()) > row_tokens):
        raise ValueError(f"segments of {length.min()} to {length.max()} tokens in rows of {row_tokens}")
    room = np.full(len(length), row_tokens, dtype=np.int64)
    rows: list[list[int]] = []
    for place in np.argsort(-length, kind="stable").tolist():
        # Rows that are not begun have all their room, so the search always ends within one more than there are.
        row = int(np.argmax(room[: len(rows) + 1] >= length[place]))
        if row == len(rows):
            rows.append([])
        rows[row].append(place)
        room[row] -= length[place]
    return [np.array(sorted(row), dtype=np.int64) for row in rows]

"""Are all ranks of the same make? Versions and clocks of the nodes, compared once at the start."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_pipelines.errors import BadInput
from pretrain.engine import Engine

LARGEST_CLOCK_DIFFERENCE_SECONDS = 5.0


@dataclass(frozen=True)
class RankEnvironment:
    """What one rank runs on."""

    host: str
    versions: Mapping[str, str]
    clock: float
    """Seconds since 1970, taken on all ranks at the same moment."""


def check_same_environment(engine: Engine, versions: Mapping[str, str]) -> None:
    """Compare the ranks' versions and clocks; all ranks call it.

    Raises:
        BadInput: a package has another version on another rank.
    """
    engine.barrier()
    mine = RankEnvironment(platform.node(), versions, time.time())
    ranks: list[RankEnvironment] = engine.gather_objects(mine)
    warning = difference(ranks)
    if warning and engine.is_main:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def difference(ranks: Sequence[RankEnvironment]) -> str | None:
    """What is different enough for a warning, or null.

    Raises:
        BadInput: a package has another version on another rank.
    """
    first = ranks[0]
    for number, other in enumerate(ranks):
        for name in sorted(first.versions.keys() | other.versions.keys()):
            ours, theirs = first.versions.get(name), other.versions.get(name)
            if ours != theirs:
                raise BadInput(
                    f"{name} is {ours} on rank 0 ({first.host}) and {theirs} on rank {number} ({other.host}): "
                    "give all nodes the same environment"
                )
    early, late = min(ranks, key=lambda rank: rank.clock), max(ranks, key=lambda rank: rank.clock)
    apart = late.clock - early.clock
    if apart <= LARGEST_CLOCK_DIFFERENCE_SECONDS:
        return None
    return f"the clock of {late.host} is {apart:.0f} s ahead of {early.host}'s: deadlines and logs will disagree"

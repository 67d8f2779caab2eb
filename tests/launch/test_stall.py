"""Who is to blame when all ranks stand still: every kind of evidence, and none at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.stall import RankView, Verdict, find_guilty

COLLECTIVE = """Thread 0x01 (most recent call first):
  File "/lib/python3.11/threading.py", line 1 in wait

Current thread 0x02 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 2 in all_reduce
  File "/site-packages/torch/distributed/c10d_logger.py", line 3 in wrapper
  File "/triptych/pretrain/engine.py", line 4 in sum
"""
ELSEWHERE = """Current thread 0x02 (most recent call first):
  File "/lib/python3.11/socket.py", line 2 in recv
  File "/lib/a.py", line 3 in a
  File "/lib/b.py", line 3 in b
  File "/lib/c.py", line 3 in c
  File "/site-packages/torch/distributed/elastic/x.py", line 3 in main
"""


def view(rank: int, **changes: object) -> RankView:
    waiting = RankView(rank, f"node{rank // 2}", 7, "forward", 40, 60.0, "alive", True, COLLECTIVE)
    return replace(waiting, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"state": "gone"}, "gone"),
        ({"state": "stopped"}, "SIGSTOP"),
        ({"state": "stopped, its worker 99"}, "its data worker is stopped"),
        ({"state": "in an uninterruptible wait", "answered": False}, "file system"),
        ({"answered": False}, "does not answer signals"),
        ({"count": 39, "phase": "data"}, "the others are ahead of it"),
        ({"stacks": ELSEWHERE}, "the others wait for it in a collective"),
    ],
)
def test_each_kind_of_evidence(changes: dict[str, object], why: str) -> None:
    views = [view(0), view(1), view(2, **changes), view(3)]
    found = find_guilty(views)
    assert (found.rank, found.step, found.phase) == (2, 7, changes.get("phase", "forward"))
    assert why in found.why


def test_harder_evidence_wins() -> None:
    stopped, behind, elsewhere = view(3, state="stopped"), view(1, count=2), view(0, stacks=ELSEWHERE)
    assert find_guilty([elsewhere, behind, view(2), stopped]).rank == 3
    assert find_guilty([elsewhere, behind, view(2)]).rank == 1


def test_nobody_is_blamed_without_evidence() -> None:
    assert find_guilty([view(0), view(1)]) == Verdict(
        -1, 7, "forward", "all ranks stand in the same place, and none of them is behind"
    )
    assert find_guilty([view(0, stacks=ELSEWHERE), view(1, stacks=ELSEWHERE)]).rank == -1
    assert find_guilty([view(0, state="in an uninterruptible wait"), view(1)]).rank == -1
    silent = find_guilty([view(0), view(1, count=3)], silent=["node 1"])
    assert silent.rank == -1 and "supervisor on node 1 does not answer" in silent.why
    assert find_guilty([view(0)], silent=["node 1"]).rank == -1
    assert find_guilty([]).rank == -1
    ended = find_guilty([view(0, state="gone"), view(1, state="gone")])
    assert ended.rank == -1 and "their launcher has not" in ended.why
    assert find_guilty([view(0)]).rank == 0

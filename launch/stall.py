"""Ranks that stand still: seeing it, asking each for its stacks, and finding the one that the others wait for.

Ranks go through the same phases and meet in collectives, so within moments of one that hangs all stand still. What
tells them apart: a rank that is stopped or gone, one that does not answer a signal, one that is behind the others, and
one that is not in a collective while the others wait in theirs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.processes import GONE, STOPPED, UNINTERRUPTIBLE, catches, descendants, send, state
from pretrain.heartbeat import STACKS_SIGNAL, Beat, read_beat, stacks_file

_ANSWER_SECONDS = 3.0
_BETWEEN_STACKS_SECONDS = 0.02
# Longer than this between two looks, and it was this process that stood still (a suspended machine, SIGSTOP).
_OWN_PAUSE_SECONDS = 5.0
_COLLECTIVE = re.compile(r'File "[^"]*/(torch/distributed|deepspeed/comm)/')
_FRAMES_OF_A_COLLECTIVE = 4


@dataclass(frozen=True)
class RankView:
    """Where a rank stands, as its node's supervisor sees it."""

    rank: int
    host: str
    step: int
    phase: str
    count: int
    """Beats so far; 0 from a rank that has not begun."""
    still_seconds: float
    """Time since its last sign of life."""
    state: str
    """Of the process, or of the first one below it that is stopped."""
    answered: bool | None
    """Whether it answered the stack signal; None where it could not be asked."""
    stacks: str
    """What it answered."""

    @property
    def in_collective(self) -> bool:
        """Whether one of its threads waits for other ranks."""
        threads = self.stacks.split("most recent call first")
        return any(
            _COLLECTIVE.search("\n".join(thread.strip().splitlines()[1 : 1 + _FRAMES_OF_A_COLLECTIVE]))
            for thread in threads[1:]
        )

    def where(self) -> str:
        """Phase and step in words."""
        return f"in {self.phase} of step {self.step}" if self.step else f"in {self.phase}, before its first step"


@dataclass(frozen=True)
class Verdict:
    """Whom the others wait for. `rank` is -1 where that cannot be told."""

    rank: int
    step: int
    phase: str
    why: str


class Watch:
    """Sees when the ranks of this node stand still."""

    def __init__(self, folder: Path, ranks: range, hang_seconds: float, start_seconds: float) -> None:
        self._folder, self._ranks = folder, ranks
        self._hang_seconds, self._start_seconds = hang_seconds, start_seconds
        self._beats: dict[int, Beat] = {}
        self._looked = time.monotonic()
        self._moved = dict.fromkeys(ranks, self._looked)

    def look(self) -> bool:
        """Read all heartbeats; true when no rank has shown a sign of life for the limit of where they are."""
        now = time.monotonic()
        pause = now - self._looked
        if pause > _OWN_PAUSE_SECONDS:
            self.postpone(pause)
        self._looked = now
        for rank in self._ranks:
            beat = read_beat(self._folder, rank)
            if beat is not None and beat != self._beats.get(rank):
                self._beats[rank], self._moved[rank] = beat, now
        return self.still_seconds > self.limit_seconds

    @property
    def still_seconds(self) -> float:
        """Time since the last sign of life of any rank, as of the last look."""
        return self._looked - max(self._moved.values())

    @property
    def limit_seconds(self) -> float:
        """How long the ranks may stand still where they are."""
        starting = any(rank not in self._beats or self._beats[rank].phase == "start" for rank in self._ranks)
        return self._start_seconds if starting else self._hang_seconds

    @property
    def step(self) -> int:
        """The furthest step that a rank is in."""
        return max((beat.step for beat in self._beats.values()), default=0)

    def beat(self, rank: int) -> Beat | None:
        """The last beat of a rank."""
        return self._beats.get(rank)

    def postpone(self, seconds: float) -> None:
        """Let the ranks stand still for this much longer."""
        self._moved = {rank: moved + seconds for rank, moved in self._moved.items()}

    def ask(self, host: str, pids: Sequence[int]) -> list[RankView]:
        """Ask every rank for its stacks and see where it stands. `pids` are the processes that may be ranks."""
        self.look()
        now = time.monotonic()
        asked: dict[int, int] = {}
        states: dict[int, str] = {}
        for rank, beat in self._beats.items():
            states[rank] = _state(beat.pid) if beat.pid in pids else GONE
            # A stopped process cannot answer, and need not be waited for.
            if beat.pid in pids and state(beat.pid) != STOPPED and catches(beat.pid, STACKS_SIGNAL):
                asked[rank] = _size(stacks_file(self._folder, rank))
                workers = [pid for pid in descendants(beat.pid) if catches(pid, STACKS_SIGNAL)]
                for pid in (beat.pid, *workers):
                    send([pid], STACKS_SIGNAL)
                    # They write into one file, and would mix their lines.
                    time.sleep(_BETWEEN_STACKS_SECONDS)
        answers = self._wait_for_answers(asked)
        views = []
        for rank in self._ranks:
            at = self._beats.get(rank) or Beat(0, 0, "start", 0, 0)
            text = answers.get(rank, "")
            answered = bool(text) if rank in asked else None
            still = round(now - self._moved[rank], 1)
            process = states.get(rank, "not seen yet")
            views.append(RankView(rank, host, at.step, at.phase, at.count, still, process, answered, text))
        return views

    def _wait_for_answers(self, asked: dict[int, int]) -> dict[int, str]:
        """What each rank has appended to its file since it had the size in `asked`."""
        end = time.monotonic() + _ANSWER_SECONDS
        sizes: dict[int, int] = {}
        while time.monotonic() < end:
            before, sizes = sizes, {rank: _size(stacks_file(self._folder, rank)) for rank in asked}
            if sizes == before and all(sizes[rank] > asked[rank] for rank in asked):
                break
            time.sleep(0.2)
        answers = {}
        for rank, start in asked.items():
            with stacks_file(self._folder, rank).open("rb") as file:
                file.seek(start)
                answers[rank] = file.read().decode(errors="replace")
        return answers


def find_guilty(views: Sequence[RankView], silent: Sequence[str] = ()) -> Verdict:
    """The rank that the others wait for.

    Args:
        views: every rank that could be seen, of all nodes.
        silent: hosts whose supervisor did not say where its ranks are.
    """
    named = [
        (view, why)
        for wrong, why in (
            (GONE, "its process is gone"),
            (STOPPED, "it is stopped (SIGSTOP)"),
            (UNINTERRUPTIBLE, f"it is {UNINTERRUPTIBLE}, most often for a file system that does not answer"),
        )
        for view in views
        # A moment in an uninterruptible wait is nothing; one in which no signal is answered is.
        if view.state.startswith(wrong) and (wrong != UNINTERRUPTIBLE or not view.answered)
    ]
    if named and all(view.state == GONE for view in views):
        return Verdict(-1, views[0].step, views[0].phase, "every rank has ended and their launcher has not")
    if named:
        view, why = named[0]
        if "worker" in view.state:
            why = f"its data worker is {view.state.split(', ')[0]}"
        return Verdict(view.rank, view.step, view.phase, why)
    step = max((view.step for view in views), default=0)
    if silent:
        return Verdict(-1, step, "unknown", f"the supervisor on {', '.join(silent)} does not answer")
    deaf = [view for view in views if view.answered is False]
    behind = [view for view in views if view.count < max(other.count for other in views)]
    outside = [view for view in views if not view.in_collective]
    for suspects, why in (
        (views if len(views) == 1 else (), "it is the only rank"),
        (deaf, "it does not answer signals"),
        (behind, "the others are ahead of it"),
        (outside, "the others wait for it in a collective"),
    ):
        if suspects and (len(suspects) < len(views) or len(views) == 1):
            view = min(suspects, key=lambda suspect: suspect.count)
            return Verdict(view.rank, view.step, view.phase, why)
    phase = views[0].phase if views else "start"
    return Verdict(-1, step, phase, "all ranks stand in the same place, and none of them is behind")


def _state(pid: int) -> str:
    """What a rank does; or the first process below it that stands still, since the rank waits for it."""
    own = state(pid)
    if own != "alive":
        return own
    for worker in descendants(pid):
        if state(worker) == STOPPED:
            return f"{STOPPED}, its worker {worker}"
    return own


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0

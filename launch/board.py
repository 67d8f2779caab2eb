"""What the supervisors of a run's nodes tell each other, in a folder of the run directory.

Nothing is written while all goes well. A supervisor whose ranks stand still raises an alarm; every other one then says
where its own ranks are, so that the rank that all wait for is named wherever it is, and ranks that wait for a node
which is busy are left alone. Whoever ends its ranks says so, and the other nodes end theirs.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipelines.atomic import atomic_file
from launch.stall import RankView

SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_ANSWER = 8.0
# Longer than a node takes to answer an alarm, between two calls while its ranks stand still.
_PAUSE_SECONDS = 15.0


class Board:
    """One node's access to the folder."""

    def __init__(self, folder: Path, node: int, num_nodes: int) -> None:
        self._folder, self._node, self._num_nodes = folder, node, num_nodes
        self._answered = ""
        self._next_look = 0.0
        self._standing = ("", 0.0, 0.0)

    def due(self) -> bool:
        """Whether it is time to look at the folder again, which may be on a slow file system."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + SECONDS_BETWEEN_LOOKS
        return True

    def alarm(self) -> str | None:
        """Id of another node's alarm that this one has not answered."""
        found = self._read("alarm.json")
        name = str(found["id"]) if found and found.get("node") != self._node else None
        return name if name != self._answered else None

    def standing_seconds(self) -> float:
        """For how long this node has been kept by another one's alarm, or by the folder, from raising its own.

        The time begins with the first call after a pause, and anew with another alarm: nodes ask in turn.
        """
        found = self._read("alarm.json")
        name, now = str(found["id"]) if found else "", time.monotonic()
        before, since, last = self._standing
        if name != before or now - last > _PAUSE_SECONDS:
            since = now
        self._standing = name, since, now
        return now - since

    def answer(self, alarm: str, views: Sequence[RankView]) -> None:
        """Say where this node's ranks are, if the folder takes it; else the other nodes do without."""
        self._answered = alarm
        with suppress(OSError), atomic_file(self._folder / f"node-{self._node}.json") as file:
            file.write(json.dumps({"alarm": alarm, "ranks": [asdict(view) for view in views]}).encode())

    def raise_alarm(self) -> str | None:
        """Ask all nodes where their ranks are; the alarm's id, or None where another node has asked already."""
        name = secrets.token_hex(4)
        return name if self._create("alarm.json", {"id": name, "node": self._node}) else None

    def collect(self, alarm: str) -> tuple[list[RankView], list[int]]:
        """The ranks of the other nodes, and the nodes that did not answer in time."""
        found: dict[int, list[RankView]] = {}
        others = [node for node in range(self._num_nodes) if node != self._node]
        end = time.monotonic() + _SECONDS_TO_ANSWER
        while len(found) < len(others) and time.monotonic() < end:
            for node in others:
                table = self._read(f"node-{node}.json")
                if node not in found and table and table.get("alarm") == alarm:
                    found[node] = [RankView(**view) for view in table["ranks"]]
            time.sleep(0.1)
        views = [view for node in sorted(found) for view in found[node]]
        return views, [node for node in others if node not in found]

    def withdraw(self) -> None:
        """The alarm was none."""
        with suppress(OSError):
            (self._folder / "alarm.json").unlink()

    def announce_end(self, why: str, status: int) -> None:
        """Have the other nodes end their ranks with the same status, unless one has said so already."""
        self._create("ended.json", {"node": self._node, "why": why, "status": status})

    def ended(self, seconds: float = 0.0) -> tuple[str, int] | None:
        """Why and with what status another node has ended its ranks, waiting this long for it to say so."""
        end = time.monotonic() + seconds
        while True:
            found = self._read("ended.json")
            if found and found.get("node") != self._node:
                return str(found["why"]), int(found["status"])
            if time.monotonic() >= end:
                return None
            time.sleep(0.1)

    def _create(self, name: str, value: dict[str, Any]) -> bool:
        """Make a file whole, if no other node has and the folder takes it."""
        temporary = self._folder / f".tmp-{name}.{secrets.token_hex(4)}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(value), encoding="utf-8")
            os.link(temporary, self._folder / name)
        except OSError:
            return False
        finally:
            with suppress(OSError):
                temporary.unlink()
        return True

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self._folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

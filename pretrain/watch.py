"""Numbers that went wrong: what to do about a step's loss and gradient before they reach the weights.

Every rank asks with the same global numbers and so comes to the same answer in the same step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.config import WatchConfig

Action = Literal["go", "skip", "stop"]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step, and why where it is not simply trained."""

    action: Action
    reason: str | None = None

    @property
    def update(self) -> bool:
        """Whether the step changes the weights."""
        return self.action == "go"


GO = Verdict("go")


class Watch:
    """Judges each step twice: its loss before the update, then the norm of its gradient."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._non_finite = 0
        self._loss = math.nan
        self.verdict = GO

    def see_loss(self, loss: float) -> None:
        """Begin to judge a step by its global loss."""
        self._loss = loss
        self.verdict = GO if math.isfinite(loss) else Verdict("skip", f"the loss is {loss}")

    def accepts(self, norm: float) -> bool:
        """Judge the same step by the norm of its whole gradient (inf where not finite), and settle `verdict`."""
        if self.verdict.update and not math.isfinite(norm):
            self.verdict = Verdict("skip", "the gradient is not finite")
        wrong = not (math.isfinite(self._loss) and math.isfinite(norm))
        self._non_finite = self._non_finite + 1 if wrong else 0
        if self._non_finite >= self._config.max_non_finite:
            reason = f"{self._non_finite} steps in a row had a loss or gradient that is not finite"
            self.verdict = Verdict("stop", f"{reason} (watch.max_non_finite)")
        return self.verdict.update

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on judging as this one would, for JSON."""
        return {"non_finite": self._non_finite}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from `state`; what it lacks is what it was at the start."""
        self._non_finite = int(state.get("non_finite", 0))

"""Numbers that went wrong: what to do about a step's loss and gradient before they reach the weights.

Every rank asks with the same global numbers and so comes to the same answer in the same step. What is not finite never
reaches the weights. A spike, far above the last steps (`pretrain/spikes.py`), is let through, skipped or rolled back
by `watch.policy`. All that an answer depends on is in `state`, so a resumed run answers as an undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from data_pipelines.progress import counted
from pretrain.config import WatchConfig
from pretrain.spikes import Recent

_MAKE_THE_LOSS = ("losses.", "objectives.")

Action = Literal["go", "skip", "roll_back", "stop"]
Kind = Literal["loss_not_finite", "gradient_not_finite", "loss_spike", "gradient_spike"]


class LimitPassed(RuntimeError):
    """The run stopped itself, for a reason that all ranks saw in the same step. One line, for a person to read."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step, and why where there is something to say."""

    action: Action
    kind: Kind | None = None
    """What is wrong with the step; None for an ordinary one."""
    reason: str | None = None
    z: float | None = None
    """Robust z-score of a spike."""

    @property
    def update(self) -> bool:
        """Whether the step changes the weights."""
        return self.action == "go"


GO = Verdict("go")


class Watch:
    """Judges each step twice: its loss before the update, then the norm of its gradient."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._losses = Recent("loss", config.window)
        self._norms = Recent("norm", config.window)
        self._non_finite = 0
        self._spikes = 0
        self.roll_backs = 0
        """Times that the run went back to a checkpoint."""
        self._step, self._loss = 0, math.nan
        self.verdict = GO

    def see_loss(self, step: int, loss: float) -> None:
        """Begin to judge a step, of which 1 is the first, by its global loss."""
        self._step, self._loss = step, loss
        self.verdict = GO if math.isfinite(loss) else Verdict("skip", "loss_not_finite", f"the loss is {loss}")

    def accepts(self, norm: float) -> bool:
        """Judge the same step by the norm of its whole gradient (inf where not finite), and settle `verdict`."""
        if self.verdict.update and not math.isfinite(norm):
            self.verdict = Verdict("skip", "gradient_not_finite", "the gradient is not finite")
        if self.verdict.update:
            self._non_finite = 0
            self.verdict = self._spike(norm)
        else:
            self._non_finite += 1
            if self._non_finite >= self._config.max_non_finite:
                had = f"{counted(self._non_finite, 'step')} in a row had a loss or gradient that is not finite"
                self._stop(f"{had} (watch.max_non_finite): {self._last(self._non_finite)}")
        if self.verdict.update:
            self._spikes = 0
            self._losses.add(self._loss)
            self._norms.add(norm)
        return self.verdict.update

    def _spike(self, norm: float) -> Verdict:
        """What is to be done about a step whose numbers are finite."""
        scores = (self._losses.score(self._loss), self._norms.score(norm))
        worst = max((score for score in scores if score is not None), default=0.0)
        if worst < self._config.threshold:
            return GO
        by_loss = scores[0] == worst
        what, value, recent = ("loss", self._loss, self._losses) if by_loss else ("gradient's norm", norm, self._norms)
        kind: Kind = "loss_spike" if by_loss else "gradient_spike"
        reason = f"the {what} is {value:.4g}, {worst:.1f} robust deviations above the usual {recent.typical():.4g}"
        if self._config.policy == "log":
            return Verdict("go", kind, reason, worst)
        self._spikes += 1
        self.verdict = Verdict(self._config.policy, kind, reason, worst)
        if self._spikes >= self._config.max_spikes:
            row = f"spikes in a row: {self._spikes} (watch.max_spikes), {self._last(self._spikes)}"
            self._stop(f"{row}; of the last one {reason}")
        elif self._config.policy == "roll_back" and self.roll_backs >= self._config.max_roll_backs:
            self._stop(f"{reason}, and the run has gone back {self.roll_backs} times (watch.max_roll_backs)")
        return self.verdict

    def _last(self, count: int) -> str:
        return f"step {self._step}" if count == 1 else f"steps {self._step - count + 1} to {self._step}"

    def _stop(self, reason: str) -> None:
        self.verdict = replace(self.verdict, action="stop", reason=reason)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on judging as this one would, for JSON."""
        return {
            "non_finite": self._non_finite,
            "spikes": self._spikes,
            "roll_backs": self.roll_backs,
            "losses": self._losses.state(),
            "norms": self._norms.state(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from `state`; what an older version did not write is as at the beginning."""
        self._non_finite = int(state.get("non_finite", 0))
        self._spikes = int(state.get("spikes", 0))
        self.roll_backs = int(state.get("roll_backs", 0))
        self._losses.resume(state.get("losses", ()))
        self._norms.resume(state.get("norms", ()))

    def forget(self, changed: Iterable[str]) -> None:
        """Begin a new history where settings changed that the loss is made of: the old numbers are of another loss."""
        if any(field.startswith(_MAKE_THE_LOSS) for field in changed):
            self._losses.resume(())
            self._norms.resume(())

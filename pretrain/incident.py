"""What is written down of a step whose numbers went wrong: the samples of its batch, those of the guilty rank first.

Every rank sees the same global numbers and cannot tell from them whose samples are to blame. So the batch is gone
through once more, which happens in an incident only: forward, for each rank's own losses, and for a gradient that is
not finite also backward, with an eye on each rank's own gradients before they are summed. Nothing of it stays: neither
gradients nor a draw from a random generator.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_pipelines.atomic import atomic_file

if TYPE_CHECKING:
    from pretrain.callbacks import StepRecord
    from pretrain.model.omni import Plan
    from pretrain.trainer import Trainer

_PARTS = ("text", "image", "audio")


@dataclass(frozen=True)
class Share:
    """A rank's part of the batch."""

    rank: int
    finite: bool
    """Whether the losses, embeddings and, where those of all ranks were, the gradients of its own samples are."""
    loss: float | None
    """Mean loss of its own samples, without alignment, which has no owner; None where it is not finite."""
    keys: list[str]


@dataclass(frozen=True)
class Incident:
    """A step whose numbers went wrong; the content of an `incident-*.json`."""

    kind: str
    rank: int
    """The rank whose samples are to blame, or look most like it."""
    phase: str
    step: int
    time: float
    stacks: dict[str, Any] = field(default_factory=dict)
    """Of the ranks' threads, where a rank hangs. Here nobody does."""
    action: str = "log"
    """What was done: log (trained nevertheless), skip, roll_back or stop."""
    reason: str = ""
    batch: int = 0
    loss: str = ""
    """As `float.hex()` writes it, or nan or inf."""
    grad_norm: float | None = None
    z: float | None = None
    """Robust z-score of a spike."""
    keys: list[str] = field(default_factory=list)
    """All samples of the batch, those of `rank` first."""
    ranks: list[Share] = field(default_factory=list)
    """The same by rank, the guilty ones first."""

    @property
    def file_name(self) -> str:
        """Where it lies in the run directory."""
        when = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self.time))
        return f"incident-{when}-{self.kind}-step-{self.step:08d}.json"

    def line(self, run_dir: Path) -> str:
        """The incident and the decision, for a person."""
        done = {"log": "trained nevertheless", "skip": "skipped", "roll_back": "going back", "stop": "stopping"}
        where = f"step {self.step} (batch {self.batch})"
        return f"{where}: {self.reason}; {done[self.action]}; samples in {run_dir / self.file_name}"

    def write(self, run_dir: Path) -> None:
        """Write the file. A disk that does not take it is no reason to end the run."""
        path = run_dir / self.file_name
        try:
            with atomic_file(path) as file:
                file.write((json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
        except OSError as error:
            print(f"{path}: could not be written ({error.strerror})", file=sys.stderr, flush=True)


def share_of(
    trainer: Trainer, keys: list[str], micro_batches: list[dict[str, Any]], plans: list[Plan], counts: dict[str, int]
) -> Share:
    """This rank's part in the step that was just judged (all ranks call it, with the step's update behind them).

    Args:
        trainer: the run's.
        keys: of this rank's samples.
        micro_batches: this rank's samples.
        plans: of the micro-batches.
        counts: global counts of what the losses average over.
    """
    with _without_trace(trainer.engine.device):
        sums = dict.fromkeys(_PARTS, 0.0)
        own = dict.fromkeys(_PARTS, 0)
        finite = True
        with torch.no_grad():
            for micro, plan in zip(micro_batches, plans, strict=True):
                output = trainer.engine.module(micro, plan)
                finite = finite and all(bool(x.isfinite().all()) for x in output.embeddings.vectors.values())
                for name in _PARTS:
                    sums[name] += float(getattr(output, name))
                    own[name] += plan.counts[name]
        loss = sum(getattr(trainer.config.losses, name) * sums[name] / own[name] for name in _PARTS if own[name])
        finite = finite and all(map(math.isfinite, sums.values()))
        if trainer.watch.verdict.kind == "gradient_not_finite":
            finite = _own_gradient_is_finite(trainer, micro_batches, plans, counts) and finite
    return Share(trainer.engine.rank, finite, loss if math.isfinite(loss) else None, keys)


def describe(trainer: Trainer, record: StepRecord, mine: Share) -> Incident:
    """The incident of the step just done, from all ranks' shares (all ranks call it)."""
    verdict = trainer.watch.verdict
    shares = [Share(**each) for each in trainer.engine.gather_objects(asdict(mine))]
    shares.sort(key=lambda share: (share.finite, -(share.loss if share.loss is not None else math.inf), share.rank))
    return Incident(
        kind=str(verdict.kind),
        rank=shares[0].rank,
        phase="optimizer",
        step=record.step,
        time=time.time(),
        action="log" if verdict.update else verdict.action,
        reason=f"{verdict.reason}{_blame(shares)}",
        batch=record.batch,
        loss=record.loss_hex,
        grad_norm=record.grad_norm,
        z=verdict.z,
        keys=[key for share in shares for key in share.keys],
        ranks=shares,
    )


def decided(incident: Incident, action: str, more: str) -> Incident:
    """The same incident, once it is clear what was done about it."""
    return replace(incident, action=action, reason=f"{incident.reason}{more}")


def _blame(shares: list[Share]) -> str:
    bad = [str(share.rank) for share in shares if not share.finite]
    if not bad or len(bad) == len(shares):
        return ""
    return f", from the samples of rank{'s' * (len(bad) > 1)} {', '.join(bad)}"


def _own_gradient_is_finite(
    trainer: Trainer, micro_batches: list[dict[str, Any]], plans: list[Plan], counts: dict[str, int]
) -> bool:
    bad: list[bool] = []

    def see(gradient: Tensor) -> None:
        if not bad and not bool(gradient.isfinite().all()):
            bad.append(True)

    handles = [each.register_hook(see) for each in trainer.engine.model.parameters() if each.requires_grad]
    try:
        trainer.backward(micro_batches, plans, dict(counts))
        trainer.engine.update(0.0, lambda norm: False)
    finally:
        for handle in handles:
            handle.remove()
    return not bad


@contextmanager
def _without_trace(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield

"""What hangs on the loop: the loop knows steps, everything optional is a callback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.incident import Incident
    from pretrain.trainer import Trainer


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did; the fields of a line in metrics.jsonl."""

    step: int
    time: float
    """When it was done, in seconds since 1970 by the clock of rank 0."""
    batch: int
    """Number of the global batch; it runs ahead of `step - 1` once batches were passed over."""
    epoch: float
    """Of all sources together, by the place in the data's order that the step came to."""
    samples_seen: int
    """Place in the data's order; batches that were passed over count."""
    loss: float | None
    """None where it is not finite; `loss_hex` says which way."""
    loss_hex: str
    loss_text: float | None
    loss_align: float | None
    loss_image: float | None
    loss_audio: float | None
    lr: float
    grad_norm: float | None
    logit_scale: float
    samples_per_second: float
    tokens_per_second: float
    data_wait_fraction: float
    remote_wait_seconds: float
    step_seconds: float
    rss_bytes: int
    skipped: str | None
    """Why the step did not change the weights; None where it did."""


class Callback:
    """Base of all callbacks. Every rank calls every method, in the same order."""

    def on_start(self, trainer: Trainer) -> None:
        """After the model and a checkpoint are loaded, before the first step."""

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After an optimizer step."""

    def on_incident(self, trainer: Trainer, incident: Incident) -> None:
        """After a step whose numbers went wrong, and what is done about it is decided; before any roll-back."""

    def on_roll_back(self, trainer: Trainer, incident: Incident) -> None:
        """After the run went back to the checkpoint of `trainer.step`: what came after it is undone."""

    def before_checkpoint(self, trainer: Trainer) -> None:
        """Before a checkpoint of this step is begun: what it will rely on has to be on the disk."""

    def on_checkpoint(self, trainer: Trainer, path: Any) -> None:
        """After a checkpoint is whole."""

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        """After the step's logs and checkpoint: the place for what takes long."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of this process, whatever ended it in good order."""

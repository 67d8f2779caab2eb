"""Keep the run's ledger, on rank 0: what each step consumed, each start and roll-back, every decision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.callbacks import Callback, StepRecord
from pretrain.incident import Incident
from pretrain.ledger import FORMAT_VERSION, LedgerWriter, Outcome

if TYPE_CHECKING:
    from pretrain.trainer import Trainer


class LedgerKeeper(Callback):
    """Writes RUN/ledger/.

    Args:
        run_dir: the run directory.
        data: what `pretrain.consumption.data_facts` says of the data that this process reads.
    """

    def __init__(self, run_dir: Path, data: dict[str, Any]) -> None:
        self._run_dir, self._data = run_dir, data
        self._writer: LedgerWriter | None = None
        self._next_batch = 0

    def on_start(self, trainer: Trainer) -> None:
        if trainer.engine.is_main:
            self._writer = LedgerWriter(self._run_dir)
            facts = {"format_version": FORMAT_VERSION, "world_size": trainer.engine.world_size, "data": self._data}
            self._begin(trainer, "start", **facts)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if self._writer is None:
            return
        for batch in range(self._next_batch, record.batch):
            self._writer.add(record.step, batch, 0, Outcome.PASSED_OVER)
        kind = None if trainer.watch.verdict.update else trainer.watch.verdict.kind
        outcome = Outcome.TRAINED if kind is None else Outcome[kind.upper()]
        self._writer.add(record.step, record.batch, trainer.consumed, outcome)
        self._next_batch = record.batch + 1

    def on_incident(self, trainer: Trainer, incident: Incident) -> None:
        if self._writer is not None:
            told = ("step", "batch", "action", "reason", "loss", "grad_norm", "z", "rank")
            facts = {name: getattr(incident, name) for name in told}
            self._writer.tell(incident.kind, **facts, file=incident.file_name)

    def on_roll_back(self, trainer: Trainer, incident: Incident) -> None:
        passed_over = sorted(number for number in trainer.cursor.passed_over if number >= trainer.cursor.batch)
        self._begin(trainer, "roll_back", spike=incident.step, passed_over=passed_over)

    def before_checkpoint(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.flush()

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        # Again, for what a full disk did not take before.
        if self._writer is not None:
            self._writer.flush()

    def on_end(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _begin(self, trainer: Trainer, kind: str, **facts: Any) -> None:
        self._next_batch = trainer.cursor.batch
        if self._writer is not None:
            self._writer.begin(kind, trainer.step, trainer.cursor.batch, **facts)

"""Logs of a run: metrics.jsonl, TensorBoard, a progress bar on a terminal and plain lines elsewhere. Rank 0 writes."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.atomic import atomic_file
from data_pipelines.errors import printable
from pretrain.callbacks import Callback, StepRecord

if TYPE_CHECKING:
    from pretrain.incident import Incident
    from pretrain.trainer import Trainer

_BUFFER_BYTES = 1 << 20
_CHARTS = {
    "loss/total": "loss",
    "loss/text": "loss_text",
    "loss/align": "loss_align",
    "loss/image": "loss_image",
    "loss/audio": "loss_audio",
    "optimizer/learning_rate": "lr",
    "optimizer/grad_norm": "grad_norm",
    "align/logit_scale": "logit_scale",
    "speed/samples_per_second": "samples_per_second",
    "speed/tokens_per_second": "tokens_per_second",
    "speed/data_wait_fraction": "data_wait_fraction",
    "speed/remote_wait_seconds": "remote_wait_seconds",
    "memory/rss_bytes": "rss_bytes",
}


class MetricsFile(Callback):
    """One JSON object a step in metrics.jsonl. Going on from a checkpoint drops the lines that it has not seen."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.engine.is_main:
            self._go_on_from(trainer.step)

    def on_roll_back(self, trainer: Trainer, incident: Incident) -> None:
        if self._file is not None:
            self._file.close()
            self._go_on_from(trainer.step)

    def _go_on_from(self, step: int) -> None:
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= step]
            with atomic_file(self._path) as file:
                file.write("".join(f"{line}\n" for line in kept).encode())
        self._file = self._path.open("ab", buffering=_BUFFER_BYTES)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if self._file is None:
            return
        self._file.write((json.dumps(asdict(record)) + "\n").encode())
        try:
            self._file.flush()
        except OSError as error:
            # A full disk need not end the run: what is not written stays in the buffer for the next step.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def on_end(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoard(Callback):
    """TensorBoard scalars under `tensorboard/`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.engine.is_main:
            self._go_on_from(trainer.step)

    def on_roll_back(self, trainer: Trainer, incident: Incident) -> None:
        if self._writer is not None:
            self._writer.close()
            self._go_on_from(trainer.step)

    def _go_on_from(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if self._writer is None:
            return
        for chart, field in _CHARTS.items():
            value = getattr(record, field)
            if value is not None:
                self._try(lambda chart=chart, value=value: self._writer.add_scalar(chart, value, record.step))

    def on_end(self, trainer: Trainer) -> None:
        self._try(lambda: self._writer.close())

    def _try(self, what: Callable[[], Any]) -> None:
        if self._writer is None:
            return
        try:
            what()
        except OSError as error:
            # Its thread is gone, and charts are not worth a run; metrics.jsonl has the same numbers.
            print(f"{self._folder}: {error.strerror}; no more charts until the next start", file=sys.stderr, flush=True)
            self._writer = None


class Console(Callback):
    """A rich progress bar on a terminal, one plain line every few steps elsewhere; on standard error."""

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps
        self._bar: Any = None
        self._task: Any = None

    def on_start(self, trainer: Trainer) -> None:
        if not (trainer.engine.is_main and sys.stderr.isatty()):
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
        )
        self._bar = Progress(*columns, console=RichConsole(stderr=True))
        self._bar.start()
        self._task = self._bar.add_task("train", total=trainer.config.train.max_steps, completed=trainer.step, line="")

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        if not trainer.engine.is_main:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, line=_line(record))
        elif record.step % self._every_steps == 0 or record.step == trainer.config.train.max_steps:
            print(f"step {record.step}/{trainer.config.train.max_steps}  {_line(record)}", file=sys.stderr, flush=True)

    def on_incident(self, trainer: Trainer, incident: Incident) -> None:
        # Where the run stops, that is the last thing said.
        if trainer.engine.is_main and incident.action != "stop":
            self._say(printable(incident.line(trainer.run_dir)))

    def on_roll_back(self, trainer: Trainer, incident: Incident) -> None:
        if not trainer.engine.is_main:
            return
        left = ", ".join(str(number) for number in sorted(trainer.cursor.passed_over) if number >= trainer.cursor.batch)
        self._say(f"back at step {trainer.step}, passing over the batches {left}")
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.step)

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _step_of(line: str) -> float:
    """Step of a metrics line; a torn last line counts as infinitely late."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def _line(record: StepRecord) -> str:
    losses = {
        "text": record.loss_text,
        "align": record.loss_align,
        "image": record.loss_image,
        "audio": record.loss_audio,
    }
    parts = "  ".join(f"{name} {value:.3f}" for name, value in losses.items() if value is not None)
    loss = "not finite" if record.loss is None else f"{record.loss:.4f}"
    return (
        f"loss {loss}  {parts}  lr {record.lr:.2e}  {record.samples_per_second:.0f} samples/s  "
        f"data wait {record.data_wait_fraction:.0%}"
    )

"""The loop.

One optimizer step: take this rank's share of the global batch, cut it into micro-batches, plan them (rows, masks,
counts), sum the counts over ranks, and backpropagate each loss divided by its global count. With more than one
micro-batch the contrastive loss still sees the whole global batch: embeddings are made first without gradient, the
loss's gradient with respect to them is cached, and each micro-batch then backpropagates its part (GradCache, Gao et
al., 2021). Losses therefore do not depend on world size or accumulation.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from pretrain import checkpoint, universal
from pretrain.callbacks import Callback, StepRecord
from pretrain.config import Config
from pretrain.cursor import Cursor
from pretrain.engine import Engine
from pretrain.heartbeat import Pulse
from pretrain.incident import Share, decided, describe, share_of
from pretrain.ledger import CHECKSUM_MODULUS, id_checksums
from pretrain.model.omni import Plan
from pretrain.objectives import joint
from pretrain.objectives.align import Embeddings, align_loss
from pretrain.roll_back import roll_back
from pretrain.schedule import learning_rate
from pretrain.stopping import StopRequest
from pretrain.watch import LimitPassed, Watch

_LOCAL_COUNTS = ("text", "image", "audio")


@dataclass
class Told:
    """What each rank tells the others once a step, before the backward pass; what comes back is the sum over ranks."""

    text: float
    image: float
    audio: float
    tokens: float
    stop: float
    """More than 0 from a rank that was asked to stop; which way, `StopRequest` knows."""
    saved: float
    """1 from a rank that has done its part of the checkpoint that is being written."""
    consumed: float
    """Checksum of the ids of the samples at hand; a whole number below 2**32."""


class Trainer:
    """One rank's training state: what has been done and what comes next."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        run_dir: Path,
        run_id: str,
        samples_an_epoch: int,
        callbacks: list[Callback],
        data_state: Callable[[int], dict[str, Any]],
        remote_wait_seconds: Callable[[], float] = float,
        pulse: Pulse | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.run_dir = run_dir
        self.run_id = run_id
        self.samples_an_epoch = samples_an_epoch
        self.callbacks = callbacks
        self.data_state = data_state
        self.remote_wait_seconds = remote_wait_seconds
        self.pulse = pulse or Pulse(engine.rank)
        self.watch = Watch(config.watch)
        self.saver = checkpoint.Saver(
            engine, run_dir, run_id, config.checkpoint, self.pulse.tick, lambda: self.check_owner()
        )
        self.step = 0
        """Optimizer steps done, skipped ones among them."""
        self.cursor = Cursor()
        """Where the run is in the data."""
        self.consumed = 0
        """Checksum of the sample ids that all ranks together had in the last step (`ledger.id_checksums`)."""
        self.committed: list[Path] = []
        """Checkpoints that this run may go back to, oldest first."""
        self._suspect: Share | None = None
        self.made_with: dict[str, Any] = {}
        """What every checkpoint says of what the run was made with besides its config, for JSON."""
        self.stop_request = StopRequest(config, engine.rank, engine.world_size)
        self.check_owner: Callable[[], None] = lambda: None
        """Rank 0 asks it when a save begins and before it commits; it raises when another run has the run directory."""

    def run(self, batches: Callable[[range], Iterator[dict[str, Any]]]) -> bool:
        """Train to the last step, or until a signal asks to stop.

        Args:
            batches: gives this rank's share of the global batches with these numbers, in order.

        Returns:
            True when all steps are done, false when stopped on purpose with a checkpoint saved.

        Raises:
            LimitPassed: the numbers went wrong for too long; the last checkpoint is older than that.
            SaveFailed: a checkpoint could not be written, and it was the last one or `checkpoint.on_failure` says stop.
        """
        self.stop_request.catch_signals()
        for callback in self.callbacks:
            callback.on_start(self)
        self.engine.module.train()
        stopped = False
        coming = self._coming(batches)
        while self.step < self.config.train.max_steps and not stopped:
            record, stopped = self._one_step(coming)
            for callback in self.callbacks:
                callback.on_step(self, record)
            if self._went_back(record):
                coming.close()
                coming = self._coming(batches)
                continue
            done = self.step == self.config.train.max_steps
            if stopped:
                self._say_why()
            if done or stopped or self.step % self.config.checkpoint.every_steps == 0:
                self._save(last=done or stopped)
            if not stopped:
                for callback in self.callbacks:
                    callback.after_step(self, record)
        if not stopped and self.stop_request.reason:
            # The evaluation after the last step was left; the next start catches up on it.
            stopped = True
            self._say_why()
        for callback in self.callbacks:
            callback.on_end(self)
        if stopped:
            self.stop_request.done()
        self.pulse.beat("end", self.step)
        return not stopped

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop; all ranks ask together, in what takes long between two steps."""
        return self.stop_request.agree(*self.engine.sum([self.stop_request.told()]))

    def _say_why(self) -> None:
        if self.engine.is_main:
            print(f"stopping after step {self.step}: {self.stop_request.reason}", file=sys.stderr, flush=True)

    def _coming(self, batches: Callable[[range], Iterator[dict[str, Any]]]) -> Generator[dict[str, Any], None, None]:
        for numbers in list(self.cursor.ranges(self.config.train.max_steps - self.step)):
            yield from batches(numbers)

    def _went_back(self, record: StepRecord) -> bool:
        """See to a step whose numbers went wrong; whether the run is at an earlier step now.

        Raises:
            LimitPassed: they went wrong for too long.
        """
        if self._suspect is None:
            return False
        incident = describe(self, record, self._suspect)
        self._suspect = None
        back = roll_back(self, record.batch) if incident.action == "roll_back" else None
        if incident.action == "roll_back" and back is None:
            incident = decided(incident, "skip", "; there is no checkpoint to go back to")
        if self.engine.is_main:
            incident.write(self.run_dir)
        for callback in self.callbacks:
            callback.on_incident(self, incident)
        if incident.action == "stop":
            self.finish_saving()
            raise LimitPassed(f"step {record.step}: {incident.reason}; samples in {self.run_dir / incident.file_name}")
        if back is not None:
            for callback in self.callbacks:
                callback.on_roll_back(self, incident)
        return back is not None

    def _one_step(self, batches: Iterator[dict[str, Any]]) -> tuple[StepRecord, bool]:
        self.pulse.beat("data", self.step + 1)
        started, remote_wait = time.perf_counter(), self.remote_wait_seconds()
        batch = next(batches)
        # From here on a rank may wait for another one that still waits for its data.
        self.pulse.beat("forward", self.step + 1)
        data_wait, remote_wait = time.perf_counter() - started, self.remote_wait_seconds() - remote_wait

        micro_batches = split(batch, self.engine.accumulation)
        plans = [self.engine.model.plan(micro) for micro in micro_batches]
        local = [float(sum(plan.counts[name] for plan in plans)) for name in _LOCAL_COUNTS]
        tokens = float(sum(plan.num_tokens for plan in plans))
        consumed = float(id_checksums(batch["index"].numpy()))
        stop = self.stop_request.told()
        all_ranks = self._tell(Told(*local, tokens=tokens, stop=stop, saved=self.saver.told(), consumed=consumed))
        self._settle(self.saver.hear(all_ranks.saved))
        self.consumed = int(all_ranks.consumed) % CHECKSUM_MODULUS
        counts = {name: int(getattr(all_ranks, name)) for name in _LOCAL_COUNTS}

        rate = learning_rate(self.step, self.config.train)
        totals, counts, scale = self.backward(micro_batches, plans, counts)
        loss, parts = joint.means(totals, counts, self.config.losses)
        self.watch.see_loss(self.step + 1, loss)
        self.pulse.beat("optimizer", self.step + 1)
        self.saver.before_update()
        self.engine.update(rate, self.watch.accepts)

        number, norm, verdict = int(batch["step"]), self.engine.grad_norm(), self.watch.verdict
        if verdict.kind is not None:
            self._suspect = share_of(self, batch["keys"], micro_batches, plans, counts)

        self.step += 1
        self.cursor.consume(number)
        seconds = time.perf_counter() - started
        global_batch = self.config.data.global_batch
        record = StepRecord(
            step=self.step,
            time=time.time(),
            batch=number,
            epoch=self.cursor.batch * global_batch / self.samples_an_epoch,
            samples_seen=self.cursor.batch * global_batch,
            loss=finite(loss),
            loss_hex=loss.hex(),
            loss_text=finite(parts["text"]),
            loss_align=finite(parts["align"]),
            loss_image=finite(parts["image"]),
            loss_audio=finite(parts["audio"]),
            lr=rate,
            grad_norm=norm,
            logit_scale=scale,
            samples_per_second=global_batch / seconds,
            tokens_per_second=all_ranks.tokens / seconds,
            data_wait_fraction=data_wait / seconds,
            remote_wait_seconds=remote_wait,
            step_seconds=seconds,
            rss_bytes=psutil.Process().memory_info().rss,
            skipped=None if verdict.update else verdict.reason,
        )
        return record, self.stop_request.agree(all_ranks.stop)

    def _tell(self, mine: Told) -> Told:
        return Told(*self.engine.sum(astuple(mine)))

    def backward(
        self, micro_batches: list[dict[str, Any]], plans: list[Plan], counts: dict[str, int]
    ) -> tuple[dict[str, float], dict[str, int], float]:
        """Forward and backward of one step -> global loss sums, all counts, logit scale."""
        step, last = self.step + 1, len(micro_batches) - 1
        self.pulse.beat("forward", step)
        cached = self._cached_alignment(micro_batches, plans) if last else None
        totals = dict.fromkeys(joint.NAMES, 0.0)
        for i, (micro, plan) in enumerate(zip(micro_batches, plans, strict=True)):
            self.pulse.beat("forward", step)
            output = self.engine.module(micro, plan)
            if cached is None:
                align, pairs = align_loss(output.embeddings, self.config.objectives)
                totals["align"] = float(align.detach())
            else:
                align, pairs = cached.surrogate(output.embeddings, i), cached.pairs
                totals["align"] = cached.loss
            scale = float(output.embeddings.scale.detach())
            sums = {"text": output.text, "image": output.image, "audio": output.audio, "align": align}
            counts["align"] = pairs
            self.pulse.beat("backward", step)
            self.engine.backward(joint.weighted_sum(sums, counts, self.config.losses))
            for name in _LOCAL_COUNTS:
                totals[name] += float(sums[name].detach())
            if i < last:
                self.engine.accumulate()
        summed = self.engine.sum([totals[name] for name in joint.NAMES])
        return dict(zip(joint.NAMES, summed, strict=True)), counts, scale

    def _cached_alignment(self, micro_batches: list[dict[str, Any]], plans: list[Plan]) -> CachedAlignment:
        with torch.no_grad():
            found = [
                self.engine.module(micro, plan).embeddings for micro, plan in zip(micro_batches, plans, strict=True)
            ]
        return CachedAlignment(found, self.config)

    def _save(self, last: bool) -> None:
        self.finish_saving()
        if self.engine.is_main:
            self.check_owner()
        for callback in self.callbacks:
            callback.before_checkpoint(self)
        state = {
            "step": self.step,
            **self.cursor.state(),
            "samples_consumed": self.cursor.batch * self.config.data.global_batch,
            "data": self.data_state(self.cursor.batch),
            "watch": self.watch.state(),
            "config": self.config.model_dump(mode="json"),
            **self.made_with,
        }
        self._settle(self.saver.begin(self.step, state), last)
        if last:
            self.finish_saving(last)

    def finish_saving(self, last: bool = False) -> None:
        """Wait until the checkpoint that is being written, if any, is whole and in `committed`."""
        self.pulse.beat("checkpoint", self.step)
        self._settle(self.saver.wait(), last)

    def _settle(self, saved: checkpoint.Saved | None, last: bool = False) -> None:
        if saved is None:
            return
        if saved.reason is None:
            path = checkpoint.folder_of(self.run_dir, saved.step)
            self.committed = [each for each in self.committed if each != path] + [path]
            if self.engine.is_main:
                universal.prune(self.run_dir)
            for callback in self.callbacks:
                callback.on_checkpoint(self, path)
            return
        if self.engine.is_main:
            # A run that was displaced stops; any other failure may be one that passes.
            self.check_owner()
        problem = f"no checkpoint of step {saved.step}: {saved.reason}"
        if last or self.config.checkpoint.on_failure == "stop":
            raise checkpoint.SaveFailed(problem)
        if self.engine.is_main:
            print(f"{problem}; training goes on, the next one is due as planned", file=sys.stderr, flush=True)


class CachedAlignment:
    """The alignment loss of a whole step, and its gradient with respect to each micro-batch's embeddings."""

    def __init__(self, found: list[Embeddings], config: Config) -> None:
        def leaf(x: Tensor) -> Tensor:
            return x.detach().clone().requires_grad_()

        names = found[0].vectors
        self._vectors = [{name: leaf(part.vectors[name]) for name in names} for part in found]
        self._scale, self._bias = leaf(found[0].scale), leaf(found[0].bias)
        whole = Embeddings(
            vectors={name: torch.cat([part[name] for part in self._vectors]) for name in names},
            present={name: torch.cat([part.present[name] for part in found]) for name in names},
            scale=self._scale,
            bias=self._bias,
        )
        loss, self.pairs = align_loss(whole, config.objectives)
        loss.backward()
        self.loss = float(loss.detach())

    def surrogate(self, live: Embeddings, index: int) -> Tensor:
        """A scalar whose gradient is the alignment loss's gradient through micro-batch `index`."""
        total = 0.0 * (live.scale.sum() + live.bias.sum())
        if index == 0:
            total = total + (live.scale * self._scale.grad).sum() + (live.bias * self._bias.grad).sum()
        for name, vector in live.vectors.items():
            total = total + (vector * self._vectors[index][name].grad).sum()
        return total


def split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """Cut a rank's share into `parts` equal micro-batches, in order."""
    if parts == 1:
        return [batch]
    size = len(batch["keys"])
    each = size // parts

    def piece(value: Any, i: int) -> Any:
        return value[i * each : (i + 1) * each] if isinstance(value, (list, Tensor)) and len(value) == size else value

    return [{name: piece(value, i) for name, value in batch.items()} for i in range(parts)]


def finite(value: float | None) -> float | None:
    """The value, or None where it is not finite: JSON has no word for that."""
    return value if value is not None and math.isfinite(value) else None

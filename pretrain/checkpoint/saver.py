"""A checkpoint from the loop's side: train on while the state is copied and written, hear when it is whole.

All ranks call the same methods in the same steps. How far each is, the ranks say in the sum that they make every step
anyway, so that no thread of a writer ever waits in a collective:

    copying     each rank's thread copies what is large to host memory, which must be done before the next update
    writing     each rank's thread writes its files; when the sum says that all are through, one gather brings what
                they wrote, or why they could not, to all
    committing  rank 0's thread gives the checkpoint its name and removes old ones; then the ranks hear the outcome
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as to_safetensors

from pretrain.checkpoint import retention
from pretrain.checkpoint.commit import available_bytes, commit, discard, lack_of_room, temporary_folder, write_hint
from pretrain.checkpoint.generators import generator_file, generators
from pretrain.checkpoint.manifest import (
    FORMAT_VERSION,
    IDENTITY,
    TRAINER_STATE,
    ZERO_FOLDER,
    ZERO_TAG,
    ZERO_TAG_FILE,
    folder_of,
    seal,
)
from pretrain.checkpoint.snapshot import FrozenFile, HostBuffers
from pretrain.checkpoint.writer import Bytes, Content, Work, WriterThread, write_files

if TYPE_CHECKING:
    from pretrain.config import CheckpointConfig
    from pretrain.engine import Engine

LOG = "checkpoints.jsonl"
_POLL_SECONDS = 0.02
_FULL = (errno.ENOSPC, errno.EDQUOT)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written and the run must not go on without; the message is one line for a person."""


@dataclass(frozen=True)
class Saved:
    """How saving the checkpoint of a step ended; a line of checkpoints.jsonl."""

    step: int
    bytes: int
    """Of all ranks' files; 0 where it failed."""
    stall_seconds: float
    """How long the loop stood still for it."""
    seconds: float
    """From the first moment until it was whole, or had failed."""
    reason: str | None
    """Why there is no such checkpoint; null where there is one."""


@dataclass
class _Pending:
    step: int
    work: Path
    started: float
    writing: Work
    needed: int
    """Bytes that all ranks together may write at most."""
    stall_seconds: float = 0.0
    committing: Work | None = None
    """Rank 0's, once all ranks have written."""
    all_written: bool = False
    num_bytes: int = 0


class Saver:
    """Saves one checkpoint at a time. Of each, `hear`, `begin` or `wait` returns once how it ended."""

    def __init__(
        self,
        engine: Engine,
        run_dir: Path,
        run_id: str,
        config: CheckpointConfig,
        alive: Callable[[], None] = lambda: None,
        may_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Clear what an earlier process of this run left half done, too.

        Args:
            engine: the run's engine, prepared.
            run_dir: run directory on a file system that all ranks share, and that no other run writes to.
            run_id: id of the run, which goes into every file.
            config: how many to keep.
            alive: called while a wait makes progress.
            may_commit: called on rank 0, in its thread, before a checkpoint gets its name; what it raises is why not.
        """
        self._engine, self._run_dir, self._run_id, self._config = engine, run_dir, run_id, config
        self._alive, self._may_commit = alive, may_commit
        self._buffers = HostBuffers(pinned=engine.device.type == "cuda")
        self._thread = WriterThread()
        self._pending: _Pending | None = None
        self._copying: Work | None = None
        if engine.is_main:
            retention.clear_leftovers(run_dir)

    def begin(self, step: int, state: dict[str, Any]) -> Saved | None:
        """Freeze the state after `step` and start to write it. Nothing may be pending.

        Args:
            step: completed optimizer steps.
            state: JSON-able state of the trainer, the same on every rank.

        Returns:
            None; or, where there is no room for it, that it failed.
        """
        assert self._pending is None
        self.before_update()
        started = time.perf_counter()
        engine = self._engine
        # Nothing of the last checkpoint reads these any more.
        self._buffers.start_again()
        files = self._freeze(step, state)
        needed = int(engine.sum([sum(content.num_bytes for content in files.values())])[0])
        answer = None
        if engine.is_main:
            answer = (temporary_folder(self._run_dir, step), lack_of_room(self._run_dir, needed))
        work, problem = engine.gather_objects(answer)[0]
        if problem is not None:
            stall = time.perf_counter() - started
            return self._log(Saved(step, 0, round(stall, 4), round(stall, 4), problem))
        rank = engine.rank
        writing = self._thread.start(lambda count: write_files(work, files, rank, count))
        self._pending = _Pending(step, work, started, writing, needed, time.perf_counter() - started)
        return None

    def before_update(self) -> None:
        """Wait until the state after the last `begin` is copied. Whatever changes weights or moments calls it first."""
        if self._copying is None:
            return
        started = time.perf_counter()
        while not self._copying.done:
            self._copying.wait(_POLL_SECONDS)
        error, self._copying = self._copying.error, None
        if error is not None:
            raise error
        if self._pending is not None:
            self._pending.stall_seconds += time.perf_counter() - started

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None

    def told(self) -> float:
        """What this rank adds to the sum that `hear` gets: 1 when its own part of what all wait for is through."""
        pending = self._pending
        if pending is None:
            return 0.0
        if not pending.all_written:
            return float(pending.writing.done)
        return float(pending.committing is not None and pending.committing.done)

    def hear(self, told: float) -> Saved | None:
        """Go on from the sum of what all ranks told; returns how the checkpoint ended, once, when it has."""
        pending = self._pending
        if pending is None or told < (1 if pending.all_written else self._engine.world_size):
            return None
        started = time.perf_counter()
        outcome: tuple[int, str | None] | None
        outcome = self._hear_the_end(pending) if pending.all_written else self._hear_all_written(pending)
        pending.stall_seconds += time.perf_counter() - started
        if outcome is None:
            return None
        self._pending = None
        num_bytes, reason = outcome
        stall, seconds = round(pending.stall_seconds, 4), round(time.perf_counter() - pending.started, 4)
        return self._log(Saved(pending.step, num_bytes, stall, seconds, reason))

    def wait(self) -> Saved | None:
        """Stand still until nothing is pending; returns how it ended, or None where nothing was."""
        self.before_update()
        before = -1
        while self._pending is not None:
            started = time.perf_counter()
            work = self._pending.committing or self._pending.writing
            work.wait(_POLL_SECONDS)
            if work.progress != before:
                # Not where this rank is through and waits for another: that one may hang.
                before = work.progress
                self._alive()
            told = self._engine.sum([self.told()])[0]
            self._pending.stall_seconds += time.perf_counter() - started
            saved = self.hear(told)
            if saved is not None:
                return saved
        return None

    def _freeze(self, step: int, state: dict[str, Any]) -> dict[str, Content]:
        engine = self._engine
        identity = {"run_id": self._run_id, "step": step, "rank": engine.rank}
        files: dict[str, Content] = {}

        def take(path: Path, content: dict[str, Any]) -> None:
            files[str(path)] = FrozenFile(content | {IDENTITY: identity}, self._buffers)

        engine.save(Path(ZERO_FOLDER), take)
        files[generator_file(engine.rank)] = Bytes(
            to_safetensors(generators(engine.device), {IDENTITY: json.dumps(identity)})
        )
        if engine.is_main:
            files[TRAINER_STATE] = Bytes(json.dumps(state, indent=1).encode())
            files[ZERO_TAG_FILE] = Bytes(ZERO_TAG.encode())
        copied = torch.cuda.Event() if engine.device.type == "cuda" else None
        if copied is not None:
            copied.record()

        def copy(count: Callable[[int], None]) -> None:
            for content in files.values():
                if isinstance(content, FrozenFile):
                    content.copy()
            if copied is not None:
                copied.synchronize()

        self._copying = self._thread.start(copy)
        return files

    def _hear_all_written(self, pending: _Pending) -> tuple[int, str | None] | None:
        engine = self._engine
        error = pending.writing.error
        mine = _problem(error, engine.rank, pending) if error else pending.writing.result
        parts: list[Any] = engine.gather_objects(mine)
        problems = [part for part in parts if isinstance(part, str)]
        if problems:
            if engine.is_main:
                discard(pending.work)
            return 0, problems[0]
        entries = {name: entry for part in parts for name, entry in part.items()}
        pending.all_written = True
        pending.num_bytes = sum(entry["bytes"] for entry in entries.values())
        if engine.is_main:
            manifest: dict[str, Any] = {
                "format_version": FORMAT_VERSION,
                "run_id": self._run_id,
                "step": pending.step,
                "world_size": engine.world_size,
                "zero_stage": engine.config.engine.zero_stage,
                "files": dict(sorted(entries.items())),
            }
            pending.committing = self._thread.start(lambda count: self._commit(pending.work, seal(manifest)))
        return None

    def _hear_the_end(self, pending: _Pending) -> tuple[int, str | None]:
        problem = None
        if pending.committing is not None and pending.committing.error is not None:
            problem = _problem(pending.committing.error, 0, pending)
        problem = self._engine.gather_objects(problem)[0]
        return (0, problem) if problem else (pending.num_bytes, None)

    def _commit(self, work: Path, manifest: dict[str, Any]) -> None:
        try:
            self._may_commit()
            commit(work, self._run_dir, manifest)
        except BaseException:
            discard(work)
            raise
        # Here it is whole; what goes wrong with the rest takes nothing from it.
        try:
            write_hint(self._run_dir, manifest["step"])
            for path in retention.outdated(self._run_dir, self._config.keep_last, self._config.keep_every):
                retention.remove(path)
        except OSError as error:
            print(f"old checkpoints could not be removed: {error}", file=sys.stderr, flush=True)

    def _log(self, saved: Saved) -> Saved:
        if not self._engine.is_main:
            return saved
        if saved.reason is None:
            print(
                f"checkpoint of step {saved.step}: {saved.bytes / 1e6:,.1f} MB in {saved.seconds:.2f} s, "
                f"of which training stood still for {saved.stall_seconds:.2f} s",
                file=sys.stderr,
                flush=True,
            )
        try:
            with (self._run_dir / LOG).open("a") as file:
                file.write(json.dumps({"time": round(time.time(), 3), **asdict(saved)}) + "\n")
        except OSError as error:
            print(f"{self._run_dir / LOG}: {error.strerror}", file=sys.stderr, flush=True)
        return saved


def save(
    engine: Engine, run_dir: Path, step: int, state: dict[str, Any], run_id: str, config: CheckpointConfig
) -> Path:
    """Write the checkpoint of a step, and wait until it is whole; all ranks call it.

    Raises:
        SaveFailed: it could not be written.
    """
    saver = Saver(engine, run_dir, run_id, config)
    saved = saver.begin(step, state) or saver.wait()
    assert saved is not None
    if saved.reason is not None:
        raise SaveFailed(saved.reason)
    return folder_of(run_dir, step)


def _problem(error: BaseException, rank: int, pending: _Pending) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        where = f" at {error.filename}" if error.filename else ""
        if error.errno in _FULL:
            left = available_bytes(pending.work.parent)
            where += f", {pending.needed:,} bytes needed in all, {left:,} bytes available beside what is written of it"
        return f"rank {rank} could not write it: {os.strerror(error.errno)}{where}"
    text = " ".join(str(error).split())
    return f"rank {rank} could not write it: {type(error).__name__}: {text}"

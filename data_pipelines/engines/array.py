"""What a task of a Slurm array does: its part of the tasks, by `engines.local`; and the end, once all are done.

The work is a pickle in a submission folder that only its owner may enter. Nothing here knows of datatrove, so an sbatch
file of one's own can do the same:

    python -P -m data_pipelines.engines.array build SUBMISSION PART NUM_PARTS
    python -P -m data_pipelines.engines.array finish SUBMISSION

SUBMISSION may also be the dataset's folder: then it is the newest one there. Exit status 2 is bad input.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.atomic import atomic_file
from data_pipelines.engines import local
from data_pipelines.errors import BadInput

WORK_FILE = "work.pickle"
# Where the submissions of a build lie, within the dataset's folder.
SUBMISSIONS = ".build/slurm"
_FAILURES = "failures"
# Each restart goes on where the one before stopped, so many of them mean that one shard takes longer than the limit.
_MAX_RESTARTS = 100


@dataclass(frozen=True)
class ArrayWork:
    """`job` turns one of `tasks` into a file and `is_done` knows whether it is there; `str(task)` names it.

    `finish` is called after the array, done or not; it says in one line what is missing, or nothing.
    """

    job: Callable[[Any, local.Tick], Any]
    tasks: list[Any]
    num_parts: int
    is_done: Callable[[Any], bool]
    finish: Callable[[], str | None]

    def part_of(self, number: int) -> int:
        """The part that has task `number`."""
        return number % self.num_parts

    def save(self, submission: Path) -> None:
        """Write it for `load`."""
        with atomic_file(submission / WORK_FILE) as file:
            pickle.dump(self, file)

    @staticmethod
    def load(submission: Path) -> ArrayWork:
        """Raises `BadInput` when there is none, and when it may be somebody else's."""
        check_private(submission.parent)
        try:
            data = (submission / WORK_FILE).read_bytes()
        except OSError as error:
            raise BadInput(f"{submission / WORK_FILE}: {error.strerror}; submit the build again") from error
        # Only this user can have written it: `check_private` refuses a folder that others own or may open.
        work = pickle.loads(data)
        assert isinstance(work, ArrayWork)
        return work


@dataclass(frozen=True)
class Failure:
    """Why a task failed: bad input, in one line for its user, or a fault of ours."""

    name: str
    is_bad_input: bool
    message: str


@dataclass(frozen=True)
class _Recorded:
    """A job that leaves a note of its failure where `failures` finds it."""

    job: Callable[[Any, local.Tick], Any]
    submission: Path

    def __call__(self, task: Any, tick: local.Tick) -> None:
        note = self.submission / _FAILURES / f"{Path(str(task)).stem}.json"
        try:
            self.job(task, tick)
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                failure = Failure(str(task), True, f"{error.filename or task}: {error.strerror}")
            else:
                failure = Failure(str(task), isinstance(error, BadInput), str(error) or type(error).__name__)
            with atomic_file(note) as file:
                file.write(json.dumps(asdict(failure)).encode())
            if failure.is_bad_input and not isinstance(error, BadInput):
                raise BadInput(failure.message) from error
            raise
        # A requeued task may do what it failed at before.
        note.unlink(missing_ok=True)


@dataclass(frozen=True)
class BuildPart:
    """Builds one part of the work: the only step of datatrove's pipeline."""

    submission: Path

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Build part `rank` of `world_size`. Exits with 2 for bad input, so that datatrove marks nothing as done."""
        without_torch()
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        try:
            if restarts > _MAX_RESTARTS:
                raise BadInput(
                    f"restarted {restarts} times: a shard takes longer than the time limit; give --time more"
                )
            build_part(self.submission, rank, world_size)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)


def build_part(submission: Path, part: int, num_parts: int) -> None:
    """Do what is not done yet of every `num_parts`-th task from `part` on, on as many cores as Slurm gave the task."""
    work = ArrayWork.load(submission)
    mine = [task for task in work.tasks[part::num_parts] if not work.is_done(task)]
    host = os.uname().nodename
    print(f"{host}: part {part} of {num_parts}: {len(mine)} to build", flush=True)
    workers = int(os.environ.get("SLURM_CPUS_PER_TASK", 1))
    try:
        for task, _ in local.run(_Recorded(work.job, submission), mine, workers, lambda count: None):
            print(f"{host}: {task} is there", flush=True)
    except local.WorkerDied as error:
        raise BadInput(f"{error}; submit again: complete shards are kept") from error


def finish(submission: Path) -> None:
    """End the work. Raises `BadInput` when a part of it is missing."""
    missing = ArrayWork.load(submission).finish()
    if missing is not None:
        raise BadInput(missing)


def failures(submission: Path) -> dict[str, Failure]:
    """The tasks that failed, by name."""
    notes = sorted((submission / _FAILURES).glob("[!.]*.json"))
    found = [Failure(**json.loads(note.read_bytes())) for note in notes]
    return {failure.name: failure for failure in found}


def check_private(submissions: Path) -> None:
    """Raise `BadInput` unless a folder of submissions is this user's alone: what lies there is unpickled."""
    try:
        status = submissions.stat()
    except OSError as error:
        raise BadInput(f"{submissions}: {error.strerror}; submit the build again") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise BadInput(f"{submissions}: others may write there; delete it, or build as the user who began")


def newest_submission(folder: Path) -> Path | None:
    """The last submission of the build of a dataset folder."""
    return max((folder / SUBMISSIONS).glob("[0-9]*"), key=lambda path: int(path.name), default=None)


def main(command: str, place: str, *numbers: str) -> None:
    """The program of an array task, or of the job after the array."""
    folder = Path(place).resolve()
    submission = folder if (folder / WORK_FILE).is_file() else newest_submission(folder)
    if submission is None:
        raise BadInput(
            f"{folder}: no build for Slurm; plan one with `triptych data build ... --engine slurm --dry-run`"
        )
    if command == "build":
        part, num_parts = map(int, numbers)
        build_part(submission, part, num_parts)
        return
    try:
        finish(submission)
    except Exception:
        # The job after the array has no log of Slurm's: it would lie in the folder that a success removes.
        if submission.is_dir():
            (submission / "finish.log").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def without_torch() -> None:
    """Let nothing import torch: webdataset does where it can, 2.5 s a process, and writes tars just as well without."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


if __name__ == "__main__":
    without_torch()
    # The module by its own name, as the pickle and datatrove know it.
    from data_pipelines.engines.array import main as run

    try:
        run(*sys.argv[1:])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""A build on Slurm: submit what is left of it, follow the array, end the build, say what failed.

The dataset's folder alone holds the state. What is complete is known from the indexes, so jobs that die, commands that
are interrupted and second calls all meet there; the folder's lock is held while submitting and while ending a build,
not in between.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.build_folder import BuildFolder
from data_pipelines.engines import array, slurm
from data_pipelines.errors import BadInput
from data_pipelines.plan import Plan
from data_pipelines.progress import Progress

# Slurm is asked more and more rarely: clusters do not like to be asked often, and long builds need not.
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS, _POLL_GROWTH = 1.0, 15.0, 1.1
_SECONDS_BETWEEN_SUMMARIES = 30.0
# A network file system may show another node's files this much later.
_SECONDS_FOR_FILES_TO_SHOW = 60.0
_AGAIN = "run it again: complete shards are kept"


@dataclass(frozen=True)
class ShardIsDone:
    """Whether a task's shard is complete: what an array task asks before it builds one."""

    folder: Path

    def __call__(self, task: Any) -> bool:
        """`task` is a `ShardTask`."""
        return BuildFolder(self.folder).complete_shard(task.path) is not None


def active_jobs(folder: BuildFolder) -> list[str]:
    """Slurm's jobs that build in a folder now, as far as Slurm can be asked from here."""
    submission = slurm.last_submission(folder.path.resolve())
    if submission is None:
        return []
    watch = slurm.Watch(submission)
    return submission.jobs if watch.poll() and not watch.is_lost else []


def submit(
    folder: BuildFolder,
    job: Callable[[Any, Any], Any],
    tasks: Sequence[Any],
    finish: Callable[[], str | None],
    options: slurm.SlurmOptions,
    name: str,
    progress: Progress,
) -> None:
    """Submit `tasks` and say so. Call with the folder's lock held."""
    folder.remove_temporary()
    parts = slurm.num_parts(len(tasks), options)
    work = array.ArrayWork(job, list(tasks), parts, ShardIsDone(folder.path.resolve()), finish)
    submission = slurm.submit(folder.path.resolve(), work, options, f"triptych-data-{name}")
    if options.plan_only:
        progress.say(f"{folder.path}: {len(tasks)} shards to build in {parts} array tasks")
        return
    if options.dry_run:
        script = submission.folder / slurm.SCRIPT_FILE
        progress.say(script.read_text(encoding="utf-8").rstrip())
        progress.say(
            f"{folder.path}: {len(tasks)} shards to build in {parts} array tasks; nothing is submitted; "
            f"by hand: sbatch --array=0-{parts - 1} slurm/build_shards.sbatch {shlex.quote(str(folder.path))}"
        )
        return
    then = f", then job {submission.finish[0]} writes dataset.json" if submission.finish else ""
    jobs = " ".join(submission.array)
    progress.say(f"submitted: array job {jobs}: {len(tasks)} shards in {parts} tasks{then}")
    if submission.num_taken < parts:
        progress.say(f"Slurm took {submission.num_taken} of these tasks and no more; when they have ended, {_AGAIN}")


def follow(
    folder: BuildFolder, plan: Plan, finish: Callable[[Progress], list[str]], wait: bool, progress: Progress
) -> None:
    """Wait for the jobs that build in a folder, and end the build; without `wait`, say how to look at them.

    `finish` ends the build, or returns the paths of the shards that are missing. Raises `BadInput` for shards that were
    not built and what a user can do about it.
    """
    submission = slurm.last_submission(folder.path.resolve())
    assert submission is not None
    watch = slurm.Watch(submission)
    if not wait:
        _say_how_to_go_on(submission, progress)
        return
    try:
        _wait(folder, plan, watch, progress)
    except KeyboardInterrupt:
        progress.say("the jobs go on without this command")
        _say_how_to_go_on(submission, progress)
        raise
    missing = finish(progress)
    deadline = time.monotonic() + _SECONDS_FOR_FILES_TO_SHOW
    while missing and set(watch.array_states()) == {"COMPLETED"} and time.monotonic() < deadline:
        time.sleep(_FIRST_POLL_SECONDS)
        missing = finish(progress)
    if missing:
        raise _error(folder, plan, watch, missing, progress)


def _say_how_to_go_on(submission: slurm.Submission, progress: Progress) -> None:
    jobs = submission.jobs
    progress.say(f"look at them: squeue --jobs {','.join(jobs)}; their logs: {submission.folder / slurm.LOGS}")
    progress.say(f"go on waiting: the same command again; stop them: scancel {' '.join(jobs)}")


def _wait(folder: BuildFolder, plan: Plan, watch: slurm.Watch, progress: Progress) -> None:
    missing = dict(zip(plan.shard_paths, plan.shard_sizes, strict=True))
    is_started, said, last = False, "", -_SECONDS_BETWEEN_SUMMARIES
    num_idle, pause = 0, _FIRST_POLL_SECONDS
    # Twice, since a job whose node died looks ended for a moment before Slurm puts it back into the queue.
    while num_idle < 2:
        num_idle = 0 if watch.poll() else num_idle + 1
        if watch.array_has_ended():
            # This command is here to do it, at once.
            watch.cancel_finishing()
        done = [path for path in missing if folder.has_index(path)]
        count = sum(missing.pop(path) for path in done)
        if not is_started:
            progress.start(plan.num_rows, count)
            is_started = True
        elif count:
            progress.advance(count)
        summary = "Slurm does not answer; waiting" if watch.is_lost else watch.summary()
        if summary and summary != said and time.monotonic() - last >= _SECONDS_BETWEEN_SUMMARIES:
            progress.say(f"array tasks: {summary}" if not watch.is_lost else summary)
            said, last = summary, time.monotonic()
        time.sleep(pause)
        pause = min(_LAST_POLL_SECONDS, pause * _POLL_GROWTH)


def _error(folder: BuildFolder, plan: Plan, watch: slurm.Watch, missing: list[str], progress: Progress) -> Exception:
    """What to raise: the failure of the first missing shard that has one; the others' are said."""
    submission = watch.submission
    work = array.ArrayWork.load(submission.folder)
    failures = array.failures(submission.folder)
    parts = {str(task): work.part_of(number) for number, task in enumerate(work.tasks)}
    failed = [path for path in missing if path in failures]
    for path in failed[1:6]:
        progress.say(f"also failed: {path}: {failures[path].message}; log: {submission.task_of(parts[path])[1]}")
    left = f"{len(missing)} of {len(plan.shard_sizes)} shards are not built"
    if failed:
        failure = failures[failed[0]]
        task, log = submission.task_of(parts[failed[0]])
        where = f"shard {failed[0]}, array task {task}, log {log}"
        if failure.is_bad_input:
            return BadInput(f"{failure.message} ({where}; {left})")
        return RuntimeError(f"{folder.path}: {failure.message} ({where}; {left})")
    unbuilt = [path for path in missing if path in parts]
    if not unbuilt or parts[unbuilt[0]] >= submission.num_taken:
        return BadInput(f"{folder.path}: {left}; {_AGAIN}")
    task, log = submission.task_of(parts[unbuilt[0]])
    end = f"array task {task} ended as {watch.states.get(task, 'gone')} before {unbuilt[0]}"
    return BadInput(f"{folder.path}: {left}: {end}; log: {log}; {_AGAIN}")

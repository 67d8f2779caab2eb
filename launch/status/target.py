"""From what a person types to a run: its directory, its config, or the number of one of its Slurm jobs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.errors import BadInput
from launch.status import slurm
from launch.status.run_files import JOBS_FILE, looks_like_a_run, runs_below
from pretrain.config import load_config
from pretrain.owner import read_owner

_CONFIGS = (".yaml", ".yml")


def run_directory(target: str) -> Path:
    """The run directory that is meant.

    Args:
        target: a run directory, the YAML file of a run, or the number of a Slurm job.

    Raises:
        BadInput: it is none of them, or the job's run directory cannot be found from here.
    """
    path = Path(target)
    if path.is_dir():
        _check(path)
        return path
    if path.suffix in _CONFIGS and path.is_file():
        folder = Path(load_config(path).run.dir)
        if not folder.is_dir():
            raise BadInput(f"{target}: its run directory {folder} is not there: the run has not begun")
        return folder
    if slurm.is_job_id(target):
        return _of_job(target.partition("_")[0])
    raise BadInput(f"{target}: no such run directory; give one, the YAML file of a run, or the number of a Slurm job")


def _check(folder: Path) -> None:
    """Raise `BadInput` with the runs below a folder that is none itself."""
    try:
        below = [] if looks_like_a_run(folder) else [str(path) for path in runs_below(folder)]
    except OSError:
        return
    if below:
        more = f" and {len(below) - 3} more" if len(below) > 3 else ""
        raise BadInput(f"{folder}: not a run directory; below it are {', '.join(below[:3])}{more}")


def _of_job(job: str) -> Path:
    for folder in _candidates(job):
        if job in _jobs_of(folder):
            return folder
    found = slurm.command_of(job)
    if found is not None:
        started = run_of_command(*found)
        if started is not None and started.is_dir():
            return started
        raise BadInput(f"job {job} runs `{found[0]}`, which is no run that can be found; give the run directory")
    known = "" if slurm.is_there() else " and there is no squeue to ask"
    raise BadInput(f"job {job}: no run below {Path.cwd()} is of it{known}; give the run directory")


def _candidates(job: str) -> Iterator[Path]:
    found = slurm.command_of(job)
    if found is not None:
        # `triptych submit` leaves the script that it submits in the run directory.
        script = Path(_words(found[0])[0]) if _words(found[0]) else Path()
        yield from (parent for parent in list(script.parents)[:3] if looks_like_a_run(parent))
        if Path(found[1]) != Path.cwd():
            yield from runs_below(Path(found[1]))
    yield from runs_below(Path.cwd())


def run_of_command(command: str, folder: str) -> Path | None:
    """The run directory of `script CONFIG [--set KEY=VALUE]...`, started in `folder`; None where there is no config."""
    words = _words(command)
    config = next((word for word in words[1:] if Path(word).suffix in _CONFIGS), None)
    if config is None:
        return None
    settings = [after for word, after in zip(words, words[1:], strict=False) if word == "--set"]
    settings += [word.partition("=")[2] for word in words if word.startswith("--set=")]
    try:
        return Path(folder) / load_config(Path(folder) / config, settings).run.dir
    except BadInput:
        return None


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()


def _jobs_of(folder: Path) -> set[str]:
    found: set[str] = set()
    try:
        jobs = json.loads((folder / JOBS_FILE).read_text(encoding="utf-8"))["jobs"]
        found |= {str(job["id"]) for job in jobs}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        with (folder / "logs" / "supervisor.jsonl").open(encoding="utf-8", errors="replace") as lines:
            found |= {str(json.loads(line).get("job_id")) for line in lines if line.endswith("}\n")}
    except (OSError, ValueError, AttributeError):
        pass
    owner = read_owner(folder)
    if owner is not None and owner.job_id:
        found.add(owner.job_id)
    return found

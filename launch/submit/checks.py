"""What keeps a job from working, said before it waits in a queue: the config against the nodes, the run directory, the
data, and what `triptych plan` computes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_pipelines.errors import BadInput
from launch.doctor import of_run
from launch.doctor.finding import Finding
from launch.plan import reject
from launch.submit import queue
from launch.submit.request import Request
from launch.submit.site import SECRET
from pretrain.config import Config

_SHORTEST_SECRET = 6


def problems(config: Config, request: Request, accelerator: str | None, evaluates: bool) -> tuple[list[str], list[str]]:
    """(what would stop the job, what deserves a word), each in one line."""
    errors: list[str] = []
    warnings: list[str] = []
    nodes = _fitting_nodes(config, request)
    if nodes is None:
        errors.append(_uneven(config, request))
    if evaluates and not config.data.eval_sources:
        errors.append("--eval needs data.eval: the config names no data to evaluate on")
    findings: list[Finding] = [of_run.run_directory(config)]
    if findings[0].level != "error":
        findings += [of_run.owner(config), of_run.room(config)]
    findings += of_run.data(config)
    for finding in findings:
        if finding.level != "ok":
            line = f"{finding.name}: {finding.found}; {finding.advice}"
            (errors if finding.level == "error" else warnings).append(line)
    if nodes is not None and not errors:
        errors += _rejected(config, request, nodes, accelerator)
    return errors, warnings


def refuse_second_job(run_dir: Path, dependency: str | None) -> None:
    """Raise `BadInput` when a job of this run waits or runs, and the new one would not wait for it."""
    if dependency is not None:
        return
    trainings = [job["id"] for job in queue.read_jobs(run_dir) if job.get("kind") == "pretrain"]
    for number, state in queue.alive(trainings):
        raise BadInput(
            f"{run_dir}: job {number} of this run is {state.lower()}; stop it first (scancel {number}), use another "
            f"run.dir, or let the new one wait for it: --dependency afterany:{number}"
        )


def refuse_secrets(texts: Iterable[str], environment: Mapping[str, str] | None = None) -> None:
    """Raise `BadInput` when the value of a variable that looks like a secret is in one of the texts."""
    for name, value in (os.environ if environment is None else environment).items():
        if SECRET.search(name) and len(value) >= _SHORTEST_SECRET and not name.endswith(("_PATH", "_FILE")):
            for text in texts:
                if value in text:
                    raise BadInput(f"the value of {name} would stand in the job's files: take it out of the config")


def _fitting_nodes(config: Config, request: Request) -> int | None:
    """The most nodes that the job may run on of which the batch divides by the ranks."""
    batch, micro = config.data.global_batch, config.data.micro_batch
    for nodes in range(request.nodes, (request.min_nodes or request.nodes) - 1, -1):
        world = nodes * request.processes_per_node
        if batch % world == 0 and (batch // world) % (micro or 1) == 0:
            return nodes
    return None


def _uneven(config: Config, request: Request) -> str:
    batch, micro = config.data.global_batch, config.data.micro_batch
    lowest = request.min_nodes or request.nodes
    if lowest != request.nodes:
        ranks = f"{lowest} to {request.nodes} nodes with {request.processes_per_node} ranks each"
    else:
        ranks = f"{request.world} ranks ({request.nodes} nodes x {request.processes_per_node})"
    return f"data.global_batch {batch}" + (f" and data.micro_batch {micro}" if micro else "") + f" do not fit {ranks}"


def _rejected(config: Config, request: Request, nodes: int, accelerator: str | None) -> list[str]:
    """What `triptych plan` has against it."""
    slurm = config.slurm.model_copy(
        update={"signal_seconds": request.signal_seconds, "max_requeues": request.max_requeues}
    )
    asked = config.model_copy(update={"slurm": slurm})
    return reject(asked, nodes * request.processes_per_node, accelerator, request.seconds, nodes)


def check_output_path(run_dir: str) -> None:
    """Raise `BadInput` for a run directory that cannot stand in sbatch's --output."""
    if re.search(r'["\\]', run_dir) or not run_dir.isprintable():
        raise BadInput(f"run.dir {run_dir[:80]!r}: sbatch cannot take quotes, backslashes and control characters there")

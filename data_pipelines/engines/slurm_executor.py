"""datatrove's Slurm executor, as builds use it. Runs in a process of its own, which `engines.slurm` starts.

datatrove gives arrays, throttle, splitting at the cluster's largest array, requeue on a signal, and completion markers.
What is its own and is changed here, read from datatrove 0.10.1:

- It submits with `--export=ALL`: hence the process of its own, whose environment is a short list of names.
- Paths stand unquoted in its job script, which also needs its commands in PATH: `get_launch_file_contents` is ours.
- It always sets --mem-per-cpu, --qos and a partition: `get_sbatch_args` leaves out what nobody asked for.
- It adds a job that merges statistics, which waits for ever where a task fails: here that job ends the build.
"""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor, launch_slurm_job

from data_pipelines.engines.array import BuildPart
from data_pipelines.engines.slurm import LOGS, SCRIPT_FILE, Request, Submission


def note_job(folder: Path, kind: str, output: str) -> str:
    """The number in what sbatch said, which is noted in the submission at once: no job may be forgotten."""
    found = re.search(r"Submitted batch job (\d+)", output)
    if found is None:
        raise RuntimeError(f"sbatch said nothing of a job: {output!r}")
    submission = Submission.of(folder)
    replace(submission, **{kind: [*getattr(submission, kind), found[1]]}).note()  # type: ignore[arg-type]
    return found[1]


def largest_array() -> int:
    """The most tasks that the cluster takes in one array (Slurm's own default: 1001)."""
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return max(1, int(found[1])) if found else 1001


class ShardExecutor(SlurmPipelineExecutor):  # type: ignore[misc]
    """One rank a part of the work. `launch_job` submits; within a task of the array, `run` does the part."""

    def __init__(self, request: Request, max_array_size: int) -> None:
        options = request.options
        self.submission = request.submission
        super().__init__(
            pipeline=[BuildPart(request.submission)],
            tasks=request.num_parts,
            time=options.time,
            partition=options.partition,
            cpus_per_task=options.cpus,
            workers=options.throttle or -1,
            job_name=request.job_name,
            max_array_size=max_array_size,
            # One after the other where the throttle is to hold over all of them.
            max_array_launch_parallel=options.throttle is None,
            logging_dir=str(request.submission / "datatrove"),
            slurm_logs_folder=str(request.submission / LOGS),
            job_id_retriever=functools.partial(note_job, request.submission, "array"),
        )
        self.account = options.account
        self.memory = options.mem
        self.python = request.python
        self.further = dict(options.sbatch)
        self.exported = request.exported

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Directives of the array, in the order of the script; None is left out, True stands alone."""
        throttle = f"%{self.workers}" if self.workers > 0 else ""
        return {
            "job-name": self.job_name,
            "array": f"0-{max_array - 1}{throttle}",
            "nodes": 1,
            "ntasks": 1,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.memory,
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "output": f"{self.slurm_logs_folder}/%A_%a.log",
            "open-mode": "append",
            "requeue": None if "no-requeue" in self.further else True,
            # Before the time limit datatrove puts the task back into the queue, and it goes on with what is left.
            "signal": "USR1@30",
            "export": ",".join(self.exported),
            **self.further,
        }

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """The job script. `run_script` is datatrove's command without quotes, and is not used."""
        pickled = f"{self.logging_dir.resolve_paths('executor.pik')}"
        program = ["-P", "-m", "datatrove.tools.launch_pickled_pipeline", pickled]
        return self._script(sbatch_args, "This task builds its part of the shards: datatrove runs BuildPart.", program)

    def launch_merge_stats(self) -> None:
        """Submit the job that writes dataset.json, to start when the whole array has ended, well or not."""
        try:
            launch_slurm_job(self._finishing_script(), functools.partial(note_job, self.submission, "finish"))
        except subprocess.CalledProcessError:
            # The array is on its way, and whoever waits for it, or calls again, ends the build as well.
            pass

    def _finishing_script(self) -> str:
        arrays = Submission.of(self.submission).array
        unwanted = {"array": None, "open-mode": None, "signal": None}
        directives = {
            **self.get_sbatch_args(),
            **unwanted,
            "cpus-per-task": 1,
            "output": "/dev/null",
            "dependency": "afterany:" + ":".join(arrays),
        }
        program = ["-P", "-m", "data_pipelines.engines.array", "finish", str(self.submission)]
        return self._script(directives, "This job writes dataset.json; its log is finish.log.", program)

    def _script(self, directives: dict[str, Any], what: str, program: list[str]) -> str:
        lines = ["#!/bin/bash", f"# Made by `triptych data build --engine slurm`. {what}"]
        for name, value in directives.items():
            if value is not None:
                stands_alone = value is True or value == ""
                lines.append(f"#SBATCH --{name}" if stands_alone else f"#SBATCH --{name}={_quote(str(value))}")
        # srun does not take over sbatch's --cpus-per-task by itself. A step, since Slurm's warning goes to steps.
        step = ["srun", "--ntasks=1", f"--cpus-per-task={directives['cpus-per-task']}", self.python, *program]
        return "\n".join([*lines, "export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1", shlex.join(step), ""])


def _quote(value: str) -> str:
    # sbatch takes quotes off, as a shell would, but knows no other escapes.
    return f'"{value}"' if re.search(r"\s", value) else value


def main() -> None:
    """Read a `Request` from standard input and submit it, or only write its script. What sbatch says is on stderr."""
    request = Request.from_json(sys.stdin.read())
    if request.options.dry_run:
        executor = ShardExecutor(request, request.num_parts)
        script = executor.get_launch_file_contents(executor.get_sbatch_args(request.num_parts), "")
        (request.submission / SCRIPT_FILE).write_text(script, encoding="utf-8")
        return
    max_array_size = largest_array()
    Submission(request.submission, [], [], min(max_array_size, request.num_parts)).note()
    try:
        ShardExecutor(request, max_array_size).launch_job()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode or 1)

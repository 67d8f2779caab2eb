"""Would a run work here? Checks of the machine and of what one config needs from it.

Each check is a function that returns a `Finding`: what it saw and, where that is not well, what to do. `triptych
doctor` runs all of them; `triptych train` those that cost next to nothing.
"""

from __future__ import annotations

from data_pipelines.errors import BadInput
from launch.doctor import machine, of_run
from launch.doctor.finding import Finding
from launch.incident import say
from pretrain.config import Config

__all__ = ["Finding", "check_before_start", "examine"]


def examine(config: Config | None, num_processes: int) -> list[Finding]:
    """Every check there is; without a config, those of the machine."""
    found = [
        machine.versions(),
        machine.jit_locks(),
        machine.port(),
        machine.open_files(),
        machine.time_limits(config),
        machine.threads(num_processes),
        machine.gpus(),
        machine.token(config),
    ]
    if config is not None:
        found += [
            machine.shared_memory(config, num_processes),
            machine.memory(config, num_processes),
            of_run.run_directory(config),
            of_run.owner(config),
            of_run.room(config),
            *of_run.data(config),
        ]
    return found


def check_before_start(config: Config, num_processes: int) -> None:
    """What is worth a look before every start: milliseconds, and nothing that the ranks say as well themselves.

    Warnings go to standard error, one line each.

    Raises:
        BadInput: something would stop the run.
    """
    for finding in (
        machine.jit_locks(),
        machine.open_files(),
        machine.shared_memory(config, num_processes),
        of_run.run_directory(config),
        of_run.owner(config),
        of_run.room(config),
    ):
        if finding.level == "error":
            raise BadInput(f"{finding.name}: {finding.found}; {finding.advice}")
        if finding.level == "warning":
            say(f"{finding.name}: {finding.found}; {finding.advice}")

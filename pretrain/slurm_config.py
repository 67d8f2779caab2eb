"""What a job may ask a Slurm cluster for, and the patterns that keep it from saying anything else.

`slurm` in a run's YAML, the site profile and the options of `triptych submit` share these types. What passes them holds
no line end, no quote and no blank, so that it means one thing to sbatch and nothing to a shell; it is quoted all the
same where it reaches one.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from data_pipelines.config import PositiveInt, Settings

_TIME = re.compile(r"(?:\d+-)?\d+(?::\d+){0,2}")
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_SIGNAL_SECONDS = 180


def _matching(pattern: str, what: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        # Not `$`, which lets a line end pass.
        if not compiled.fullmatch(value):
            raise ValueError(f"{value[:60]!r} is no {what}")
        return value

    return AfterValidator(check)


Name = Annotated[str, _matching(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}", "name: letters, digits and _ . + - only")]
"""An account, QoS, reservation or kind of GPU."""
Names = Annotated[
    str,
    _matching(r"[A-Za-z0-9_][A-Za-z0-9_.+,-]{0,199}", "name, or several with commas: letters, digits and _ . + - only"),
]
"""A partition, or several."""
JobName = Annotated[
    str, _matching(r"[A-Za-z0-9_][A-Za-z0-9_.+@:-]{0,63}", "job name: letters, digits and _ . + @ : - only")
]
Constraint = Annotated[
    str, _matching(r"[A-Za-z0-9_.+:&|,!*()\[\]-]{1,200}", "constraint of Slurm, such as a100&ib or [rack1|rack2]")
]
Hosts = Annotated[str, _matching(r"[A-Za-z0-9_.,\[\]-]{1,500}", "list of nodes, such as node[1-4,7]")]
TimeLimit = Annotated[str, _matching(_TIME.pattern, "time limit: give MINUTES, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")]
Memory = Annotated[str, _matching(r"[0-9]{1,9}[KMGT]?", "amount of memory as Slurm has it, such as 64G")]


def signal_seconds(limit_seconds: float) -> int:
    """How long before its limit a job is told to save, where nobody says."""
    return max(10, min(_SIGNAL_SECONDS, int(limit_seconds / 4)))


def seconds_of(limit: str) -> float:
    """Seconds of a `TimeLimit`: minutes, `M:S`, `H:M:S`, or after days and a dash `H`, `H:M`, `H:M:S`."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return int(days) * _DAY + hours * _HOUR + minutes * _MINUTE + seconds
    if len(parts) == 3:
        return parts[0] * _HOUR + parts[1] * _MINUTE + parts[2]
    return parts[0] * _MINUTE + (parts[1] if len(parts) == 2 else 0)


class SlurmConfig(Settings):
    """What `triptych submit` asks for. Null takes the site profile's value; options of the command win over both."""

    partition: Names | None = Field(None, description="Partition.")
    account: Name | None = Field(None, description="Account.")
    qos: Name | None = Field(None, description="Quality of service.")
    constraint: Constraint | None = Field(None, description="Features that the nodes must have, as sbatch takes them.")
    job_name: JobName = Field("triptych", description="Name of the job.")
    time: TimeLimit = Field(
        "24:00:00", description="Time limit of one start, as sbatch takes it; where it is not given, the site's."
    )
    nodes: PositiveInt | None = Field(None, description="Nodes; null: the site's, else 1.")
    min_nodes: PositiveInt | None = Field(
        None,
        description="After a node has failed, go on with what is left, as long as it is this many; null waits for the "
        "same number.",
    )
    gpus_per_node: int | None = Field(None, ge=0, description="GPUs a node, each with a process; null: the site's.")
    cpus_per_task: PositiveInt | None = Field(
        None, description="Cores a node: for its processes, their loader workers and decoding; null: the site's."
    )
    mem: Memory | None = Field(None, description="Memory a node, such as 480G; null: the site's.")
    max_requeues: int | None = Field(None, ge=0, description="How often a job may go back into the queue; null: 100.")
    signal_seconds: PositiveInt | None = Field(
        None,
        description="A job is told to save this long before its limit; null: 180, or a quarter of a short limit.",
    )

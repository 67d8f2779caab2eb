"""What one job asks for: the options of the command, over the run's `slurm` section, over the site profile."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from data_pipelines.config import PositiveInt, Settings
from data_pipelines.errors import BadInput, printable
from launch.submit.site import Site
from pretrain.slurm_config import (
    Constraint,
    JobName,
    Memory,
    Name,
    Names,
    SlurmConfig,
    TimeLimit,
    seconds_of,
    signal_seconds,
)

MAX_REQUEUES = 100
_DEPENDENCY = re.compile(r"(?:after|afterany|afterok|afternotok|aftercorr)(?::\d+(?:\+\d+)?)+|singleton")


def _dependency(value: str) -> str:
    if not all(_DEPENDENCY.fullmatch(part) for part in re.split(r"[,?]", value)):
        raise ValueError(f"{value[:60]!r} is no dependency of Slurm, such as afterok:123")
    return value


class Asked(Settings):
    """Options of the command, checked before they go anywhere; None leaves a thing to the config or the site."""

    nodes: PositiveInt | None = None
    min_nodes: PositiveInt | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    nproc: PositiveInt | None = None
    cpus_per_task: PositiveInt | None = None
    mem: Memory | None = None
    partition: Names | None = None
    account: Name | None = None
    qos: Name | None = None
    constraint: Constraint | None = None
    time: TimeLimit | None = None
    job_name: JobName | None = None
    dependency: Annotated[str, AfterValidator(_dependency)] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Asked:
        """The options of these names; raises `BadInput` that names the wrong one as it was typed."""
        try:
            return cls(**options)
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            option = "--" + str(wrong["loc"][0]).replace("_", "-")
            raise BadInput(f"{option}: {printable(wrong['msg'].removeprefix('Value error, '))}") from None


@dataclass(frozen=True)
class Request:
    """What the training job asks for. None leaves it to the cluster."""

    job_name: str
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    time: str
    nodes: int
    min_nodes: int | None
    gpus_per_node: int
    processes_per_node: int
    cpus_per_task: int | None
    mem: str | None
    signal_seconds: int
    max_requeues: int
    dependency: str | None = None

    @property
    def world(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.processes_per_node

    @property
    def seconds(self) -> float:
        """The time limit."""
        return seconds_of(self.time)

    def as_config(self) -> SlurmConfig:
        """The same as a run's `slurm` section."""
        return SlurmConfig(**{name: getattr(self, name) for name in SlurmConfig.model_fields})


def merge(asked: Asked, config: SlurmConfig, site: Site) -> Request:
    """What is asked for in the end.

    Raises:
        BadInput: the parts do not fit each other.
    """

    def first(name: str) -> Any:
        for place in (asked, config, site):
            value = getattr(place, name, None)
            if value is not None and (place is not config or name in config.model_fields_set):
                return value
        return None

    time = first("time") or config.time
    nodes = first("nodes") or 1
    min_nodes = first("min_nodes")
    if min_nodes is not None and min_nodes > nodes:
        raise BadInput(f"min-nodes {min_nodes} is more than nodes {nodes}")
    gpus = first("gpus_per_node") or 0
    if asked.nproc is not None and gpus:
        raise BadInput(f"--nproc {asked.nproc}: with GPUs there is one process for each of the {gpus} of a node")
    notice = first("signal_seconds")
    if notice is None:
        notice = signal_seconds(seconds_of(time))
    elif notice >= seconds_of(time):
        raise BadInput(
            f"a job of {time} (slurm.time) would be told to save {notice} s before its end "
            "(slurm.signal_seconds), which is before it starts: give it more time"
        )
    requeues = first("max_requeues")
    return Request(
        job_name=first("job_name") or config.job_name,
        partition=first("partition"),
        account=first("account"),
        qos=first("qos"),
        constraint=first("constraint"),
        time=time,
        nodes=nodes,
        min_nodes=min_nodes,
        gpus_per_node=gpus,
        processes_per_node=asked.nproc or gpus or site.processes_per_node or 1,
        cpus_per_task=first("cpus_per_task"),
        mem=first("mem"),
        signal_seconds=notice,
        max_requeues=MAX_REQUEUES if requeues is None else requeues,
        dependency=asked.dependency,
    )

"""The site profile: what a cluster is like, said once in `~/.config/triptych/site.yaml` and used by every submission.

Names and values from it stand in job scripts, so each has a pattern, and all are quoted; tokens have no place in it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from data_pipelines.config import PositiveInt, Settings
from data_pipelines.errors import BadInput
from pretrain.config_file import load_settings
from pretrain.slurm_config import Constraint, Hosts, Memory, Name, Names, TimeLimit

SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL|PRIVATE_?KEY", re.IGNORECASE)
"""Names of environment variables whose values belong to nobody else."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/:-]{0,199}")
_OPTION = re.compile(r"[a-z][a-z0-9-]{1,40}")
_VALUE = re.compile(r"[A-Za-z0-9_.+,:=/@%&|!*()\[\]-]{0,500}")
# Set by the submission itself.
_OURS = {
    *("array", "chdir", "dependency", "error", "export", "export-file", "job-name", "kill-on-invalid-dep", "nodes"),
    *(
        "ntasks",
        "ntasks-per-node",
        "open-mode",
        "output",
        "parsable",
        "requeue",
        "no-requeue",
        "signal",
        "wait",
        "wrap",
    ),
}


def _one_line(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError(f"{value[:60]!r} is empty, or holds a line end or another control character")
    return value


def _variables(values: dict[str, str]) -> dict[str, str]:
    for name, value in values.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name[:60]!r} is no name of a variable")
        if SECRET.search(name):
            raise ValueError(f"{name} looks like a secret, which has no place in a job script: keep it in its own file")
        if not value.isprintable():
            raise ValueError(f"{name} holds a line end or another control character")
    return values


def _options(values: dict[str, str | None]) -> dict[str, str | None]:
    for name, value in values.items():
        if not _OPTION.fullmatch(name):
            raise ValueError(f"{name[:60]!r}: give the long name of an option of sbatch, without the dashes")
        if name in _OURS:
            raise ValueError(f"{name} is set by the submission itself")
        if value is not None and not _VALUE.fullmatch(value):
            raise ValueError(f"{name}: {value[:60]!r} holds a character that no option of sbatch needs")
    return values


def _modules(names: list[str]) -> list[str]:
    for name in names:
        if not _MODULE.fullmatch(name):
            raise ValueError(f"{name[:60]!r} is no name of a module")
    return names


def _variable_names(names: list[str]) -> list[str]:
    for name in names:
        if not _VARIABLE.fullmatch(name) or name in ("ALL", "NONE", "NIL"):
            raise ValueError(f"{name[:60]!r} is no name of a variable; give each name that jobs are to get")
        if SECRET.search(name):
            raise ValueError(f"{name} looks like a secret, which no job gets: keep it in its own file")
    return names


Line = Annotated[str, AfterValidator(_one_line)]
Variables = Annotated[dict[str, str], AfterValidator(_variables)]
Options = Annotated[dict[str, str | None], AfterValidator(_options)]
Modules = Annotated[list[str], AfterValidator(_modules)]
Exported = Annotated[list[str], AfterValidator(_variable_names)]


class Container(Settings):
    """Programs of a job run in this image."""

    runtime: Literal["apptainer", "singularity", "pyxis"] = Field(
        description="apptainer or singularity as a command on the nodes, or pyxis, a plugin of srun."
    )
    image: Line = Field(description="Image: a file, or for pyxis also a registry's name.")
    mounts: list[Line] = Field(
        default_factory=list, description="Folders that the container sees too, as PATH or FROM:TO."
    )
    options: list[Line] = Field(default_factory=list, description="Further options, one an entry, such as --rocm.")

    @model_validator(mode="after")
    def _pyxis_mounts_have_no_comma(self) -> Container:
        if self.runtime == "pyxis" and any("," in mount for mount in self.mounts):
            raise ValueError("mounts: pyxis takes a list with commas, so that no path may hold one")
        return self


class BuildSite(Settings):
    """What tasks of a build ask for, which need no GPUs; null takes the site's own value."""

    partition: Names | None = Field(None, description="Partition.")
    qos: Name | None = Field(None, description="Quality of service.")
    time: TimeLimit | None = Field(None, description="Time limit of a task, which goes on after it.")
    cpus: PositiveInt = Field(1, description="Cores, and so processes, of a task.")
    mem: Memory | None = Field(None, description="Memory of a task.")
    tasks: PositiveInt = Field(100, description="Tasks of an array at most.")
    throttle: PositiveInt | None = Field(None, description="Tasks at a time at most.")


class Site(Settings):
    """A cluster. What a run's YAML (`slurm`) or an option of the command says as well, wins over it."""

    partition: Names | None = Field(None, description="Partition.")
    account: Name | None = Field(None, description="Account.")
    qos: Name | None = Field(None, description="Quality of service.")
    constraint: Constraint | None = Field(None, description="Features that nodes must have.")
    reservation: Name | None = Field(None, description="Reservation.")
    exclude: Hosts | None = Field(None, description="Nodes to stay away from.")
    time: TimeLimit | None = Field(None, description="Time limit of one start.")
    nodes: PositiveInt | None = Field(None, description="Nodes.")
    gpus_per_node: int | None = Field(None, ge=0, description="GPUs a node, each with a process.")
    gpu_type: Name | None = Field(None, description="Kind of GPU, as the cluster calls it.")
    accelerator: Line | None = Field(None, description="The same, as `triptych plan` calls it.")
    processes_per_node: PositiveInt | None = Field(None, description="Processes a node without GPUs; null is 1.")
    cpus_per_task: PositiveInt | None = Field(None, description="Cores a node for one job.")
    mem: Memory | None = Field(None, description="Memory a node for one job.")
    signal_seconds: PositiveInt | None = Field(None, description="As slurm.signal_seconds of a run.")
    max_requeues: int | None = Field(None, ge=0, description="As slurm.max_requeues of a run.")
    sbatch: Options = Field(
        default_factory=dict, description="Any other option of sbatch, such as {exclusive: null, switches: 1}."
    )
    modules: Modules = Field(default_factory=list, description="Modules to load.")
    source: list[Line] = Field(default_factory=list, description="Files of shell commands to source before the job.")
    venv: Line | None = Field(None, description="Virtual environment with triptych in it.")
    python: Line | None = Field(
        None, description="Python with triptych in it; null: the venv's, $TRIPTYCH_PYTHON, or the one that submits."
    )
    container: Container | None = Field(None, description="Image that programs of the job run in.")
    variables: Variables = Field(
        default_factory=dict, description="Environment of the job, such as {NCCL_SOCKET_IFNAME: ib0}."
    )
    export: Exported = Field(default_factory=list, description="Variables of the submitting shell that jobs get too.")
    scratch: Line | None = Field(
        None,
        description="Folder on a disk of each node for the cache of remote shards; $USER, $TMPDIR and $SLURM_JOB_ID "
        "in it are put in on the node.",
    )
    build: BuildSite = Field(default_factory=BuildSite, description="Building datasets.")

    @model_validator(mode="after")
    def _one_python(self) -> Site:
        if self.venv is not None and self.python is not None:
            raise ValueError("venv and python say two things; give one")
        return self


def default_path() -> Path:
    """`site.yaml` in the user's folder of settings."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "triptych" / "site.yaml"


def load_site(path: Path | None) -> tuple[Site, Path | None]:
    """The profile in a file, and that file; without `path` the user's own, or an empty one where there is none.

    Raises:
        BadInput: what is wrong, with file and line.
    """
    if path is None:
        path = default_path()
        if not path.is_file():
            return Site(), None
    elif not path.is_file():
        raise BadInput(f"--site {path}: no such file; slurm/sites has examples")
    return load_settings(Site, path), path

"""One submission: the job scripts of a run and of what comes before and after it, and their way into the queue.

build -> pretrain -> eval -> export. A dataset's array is followed by a job that builds what its tasks left over and
writes dataset.json; the training waits for that one to succeed, evaluation for the training, export for evaluation. A
job whose turn can no longer come is cancelled (--kill-on-invalid-dep), and so is all that waits for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipelines.atomic import atomic_file
from data_pipelines.build import build_configured
from data_pipelines.config import BuildConfig
from data_pipelines.engines.array import ArrayWork, newest_submission
from data_pipelines.engines.slurm import SlurmOptions
from launch.submit import checks, queue
from launch.submit.request import Request
from launch.submit.script import Directives, exported_names, fill, output_name, site_lines, template
from launch.submit.site import Site
from pretrain.config import Config, dump_config

FOLDER = "jobs"
_GIVEN = ("partition", "account", "qos", "constraint", "reservation", "exclude")


@dataclass(frozen=True)
class Wanted:
    """What is to be submitted."""

    config: Config
    request: Request
    site: Site
    site_file: Path | None
    pretrain_arguments: Sequence[str] = ()
    """What follows CONFIG."""
    build: bool = False
    evaluate: bool = False
    export: Path | None = None


@dataclass(frozen=True)
class Script:
    """One job: what it is, its script, and how it hangs on others."""

    kind: str
    name: str
    text: str
    directives: Directives
    exported: Sequence[str]
    options: tuple[str, ...] = ()
    """Options for sbatch's command line."""
    after: str = "afterok"
    """How it waits for the job before."""


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    number: int
    kind: str
    script: Path


class Chain:
    """The scripts of a submission, made once, shown or submitted."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.run_dir = Path(wanted.config.run.dir)
        checks.pick(str(self.run_dir))
        self.folder = self.run_dir / FOLDER / f"{_next_number(self.run_dir):03d}"
        self.config_file = self.folder / "config.yaml"
        config = wanted.config.model_copy(update={"slurm": wanted.request.as_config()})
        self.config_text = dump_config(config)

    def pretrain(self) -> Script:
        """The training."""
        wanted, request = self.wanted, self.wanted.request
        directives: dict[str, str | int | None] = {
            "job-name": request.job_name,
            "nodes": f"{request.min_nodes}-{request.nodes}" if request.min_nodes else request.nodes,
            "time": request.time,
            "output": f"{output_name(self.run_dir)}/logs/slurm-%j.log",
            "signal": f"B:USR1@{request.signal_seconds}",
            **self._common(),
        }
        if request.gpus_per_node:
            directives["gpus-per-node"] = _gpus(wanted.site, request.gpus_per_node)
        if request.cpus_per_task is not None:
            directives["cpus-per-task"] = request.cpus_per_task
        if request.mem is not None:
            directives["mem"] = request.mem
        variables = [f"export TRIPTYCH_MAX_REQUEUES={request.max_requeues}"]
        if not request.gpus_per_node:
            variables.append(f"export TRIPTYCH_PROCESSES_PER_NODE={request.processes_per_node}")
        if request.min_nodes is not None:
            variables.append(f"export TRIPTYCH_MIN_NODES={request.min_nodes}")
        arguments = [str(self.config_file), *wanted.pretrain_arguments]
        return self._script("pretrain", "pretrain", request.job_name, directives, arguments, variables)

    def after_training(self) -> list[Script]:
        """Evaluation and export, as far as they are wanted."""
        wanted, request, run = self.wanted, self.wanted.request, str(self.run_dir)
        directives: dict[str, str | int | None] = dict(self._common())
        cpus = request.cpus_per_task
        if request.gpus_per_node:
            directives["gpus-per-node"] = _gpus(wanted.site, 1)
            cpus = None if cpus is None else max(1, cpus // request.gpus_per_node)
        if cpus is not None:
            directives["cpus-per-task"] = cpus
        if request.mem is not None and not request.gpus_per_node:
            directives["mem"] = request.mem
        arguments = {"eval": [run, "--out", str(self.run_dir / "results.json")]}
        if wanted.export is not None:
            arguments["export"] = [run, "--out", str(wanted.export)]
        found = []
        for kind, words in arguments.items():
            if kind == "eval" and not wanted.evaluate:
                continue
            name = f"{request.job_name}-{kind}"
            mine = {
                "job-name": name,
                "output": f"{output_name(self.run_dir)}/logs/{kind}-%j.log",
                # Not longer than the training may take: partitions have limits.
                **({"time": request.time} if request.seconds < 4 * 3600 else {}),
                **directives,
            }
            found.append(self._script(kind, kind, name, mine, words))
        return found

    def build(self, wanted: BuildConfig, num_tasks: int) -> list[Script]:
        """The array of one dataset's build, and the job that ends it; they are the same script."""
        site, request = self.wanted.site, self.wanted.request
        name = f"{request.job_name}-build"
        directives: dict[str, str | int | None] = {
            "job-name": name,
            "cpus-per-task": site.build.cpus,
            "output": f"{output_name(self.run_dir)}/logs/build-%j.log",
            **self._common(),
            **{key: value for key in ("partition", "qos", "time", "mem") if (value := getattr(site.build, key))},
        }
        if site.build.partition is not None:
            # What training nodes have need not be there.
            directives.pop("constraint", None)
            directives.pop("exclude", None)
        script = self._script("build_shards", "build", name, directives, [str(Path(wanted.out).resolve())])
        throttle = f"%{site.build.throttle}" if site.build.throttle else ""
        logs = f"{output_name(self.run_dir)}/logs/build-%A_%a.log"
        array = replace(script, options=(f"--array=0-{num_tasks - 1}{throttle}", f"--output={logs}"))
        return [array, replace(script, after="afterany")]

    def scripts(self) -> list[Script]:
        """Every script, for a look at them; how many tasks a build has is not known before it is planned."""
        found = []
        if self.wanted.build:
            for wanted in self.wanted.config.data.build:
                found.append(self.build(wanted, self.wanted.site.build.tasks)[1])
        return [*found, self.pretrain(), *self.after_training()]

    def submit(self) -> list[Submitted]:
        """Write everything, plan the builds, and submit all of it; nothing stays in the queue if a part is refused.

        Raises:
            BadInput: a source cannot be built, or Slurm refuses a job.
        """
        builds = [found for wanted in self._builds() if (found := self._planned(wanted))]
        later = [self.pretrain(), *self.after_training()]
        scripts = [script for build in builds for script in build] + later
        checks.refuse_secrets([self.config_text, *(script.text for script in scripts)])
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True)
        with atomic_file(self.config_file) as file:
            file.write(self.config_text.encode())
        submitted: list[Submitted] = []
        with queue.without_interrupts():
            try:
                ends = []
                for number, (array, finish) in enumerate(builds):
                    first = self._put(array, f"build-{number}.sbatch", [], submitted)
                    ends.append(self._put(finish, f"build-{number}.sbatch", [first], submitted))
                before = ends
                for script in later:
                    before = [self._put(script, f"{script.kind}.sbatch", before, submitted)]
            except BaseException:
                queue.cancel([job.number for job in submitted])
                raise
        return submitted

    def _put(self, script: Script, file_name: str, before: Sequence[int], submitted: list[Submitted]) -> int:
        path = self.folder / file_name
        if not path.exists():
            with atomic_file(path) as file:
                file.write(script.text.encode())
            path.chmod(0o755)
        waits = [f"{script.after}:{':'.join(map(str, before))}"] if before else []
        if self.wanted.request.dependency is not None and script.kind == "pretrain":
            waits.append(self.wanted.request.dependency)
        options = list(script.options)
        if waits:
            options += [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"]
        environment = queue.client_environment(script.exported, list(script.directives))
        number = queue.submit(path, options, environment)
        submitted.append(Submitted(number, script.kind, path))
        asked = {"nodes": self.wanted.request.nodes if script.kind == "pretrain" else 1, "after": list(before)}
        queue.note_job(self.run_dir, number, script.kind, script.name, path, asked)
        return number

    def _builds(self) -> list[BuildConfig]:
        return list(self.wanted.config.data.build) if self.wanted.build else []

    def _planned(self, wanted: BuildConfig) -> list[Script]:
        """The jobs of one dataset, which is planned here; none where it is complete."""
        options = SlurmOptions(tasks=self.wanted.site.build.tasks, dry_run=True, plan_only=True)
        build_configured(wanted, options)
        place = newest_submission(Path(wanted.out))
        if place is None:
            return []
        return self.build(wanted, ArrayWork.load(place).num_parts)

    def _common(self) -> dict[str, str | int | None]:
        found: dict[str, str | int | None] = {}
        for name in _GIVEN:
            value = getattr(self.wanted.request, name, None) or getattr(self.wanted.site, name)
            if value is not None:
                found[name] = value
        return found | dict(self.wanted.site.sbatch)

    def _script(
        self,
        file: str,
        kind: str,
        name: str,
        directives: Directives,
        arguments: Sequence[str],
        variables: Sequence[str] = (),
    ) -> Script:
        site, text = self.wanted.site, template(file)
        exported = exported_names(text, site)
        made_by = f"Filled in by `triptych submit` with {self.wanted.site_file or 'no site profile'}."
        lines = [*variables, *site_lines(site, self.wanted.request, _python(site), Path.cwd(), _python_path(site))]
        whole = {**directives, "export": ",".join(exported)}
        return Script(kind, name, fill(text, whole, lines, arguments, made_by), directives, exported)


def _python(site: Site) -> str:
    if site.venv is not None:
        return f"{site.venv}/bin/python"
    return site.python or os.environ.get("TRIPTYCH_PYTHON") or sys.executable


def _python_path(site: Site) -> str | None:
    """PYTHONPATH of the jobs: this checkout, which need not be installed, where they run this Python."""
    if site.python is not None or site.venv is not None or site.container is not None:
        return None
    root = [] if os.environ.get("TRIPTYCH_PYTHON") else [str(Path(__file__).resolve().parents[2])]
    paths = [*root, *(str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)]
    return os.pathsep.join(dict.fromkeys(paths)) or None


def _gpus(site: Site, number: int) -> str:
    return f"{site.gpu_type}:{number}" if site.gpu_type else str(number)


def _next_number(run_dir: Path) -> int:
    return 1 + max((int(path.name) for path in (run_dir / FOLDER).glob("[0-9][0-9][0-9]")), default=0)

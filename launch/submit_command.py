"""`triptych submit`: a run as a job of a Slurm cluster, checked before it waits in a queue."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from data_pipelines.errors import BadInput
from launch.json_output import messages_to_stderr, print_json, say


class SubmitCommand(TyperCommand):
    """`--allow-change` may stand without a value, which Typer has no word for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse with the value that a bare `--allow-change` means."""
        from pretrain.changes import spell_out

        return super().parse_args(ctx, spell_out(args))


EXAMPLES = """Examples:

\b
  triptych submit configs/digits.yaml --nodes 2
  triptych submit configs/base.yaml --gpus-per-node 8 --cpus-per-task 64 --time 12:00:00 --dry-run
  triptych submit configs/large.yaml --site slurm/sites/cluster-64.yaml --nodes 64 --min-nodes 60
  triptych submit configs/digits.yaml --nodes 2 --build --eval --export runs/demo/export
"""


def submit_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; may be given several times."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes.")] = None,
    min_nodes: Annotated[
        int | None,
        typer.Option(help="When a node fails, go on with as few as this; default: wait for the same number."),
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs a node, each with a process.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes a node without GPUs; default 1.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="Cores a node, for ranks and decoding.")] = None,
    mem: Annotated[str | None, typer.Option(help="Memory a node, such as 480G.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Features that the nodes must have.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit of one start, such as 12:00:00.")] = None,
    job_name: Annotated[str | None, typer.Option(help="Name of the job.")] = None,
    dependency: Annotated[str | None, typer.Option(help="Wait for other jobs, such as afterok:123.")] = None,
    site: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Site profile; default: ~/.config/triptych/site.yaml, where there is one."),
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Go on from the newest valid checkpoint, none, or this one.")
    ] = "auto",
    allow_change: Annotated[
        list[str] | None,
        typer.Option("--allow-change", metavar="[FIELD]", help="As `triptych train` has it."),
    ] = None,
    build: Annotated[
        bool, typer.Option("--build", help="Build the datasets of data.build first, as arrays of jobs.")
    ] = False,
    evaluate: Annotated[
        bool, typer.Option("--eval", help="Evaluate after the training, into RUN/results.json.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Export after that, as a folder for transformers.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts; write and submit nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")] = False,
) -> None:
    """Train on a Slurm cluster.

    Fills in slurm/pretrain.sbatch, checks whether the job could work, writes script and config below RUN/jobs, submits
    it, and prints the number of the job. What the options do not say, the config's `slurm` section says, then the site
    profile. JSON is {run, jobs: [{id, kind, script}]}.
    """
    with messages_to_stderr():
        from launch.submit import checks, queue
        from launch.submit.chain import Chain, Wanted
        from launch.submit.request import Asked, merge
        from launch.submit.site import load_site
        from pretrain.changes import check_fields
        from pretrain.config import load_config

        asked = Asked.of(
            {
                "nodes": nodes,
                "min_nodes": min_nodes,
                "gpus_per_node": gpus_per_node,
                "nproc": nproc,
                "cpus_per_task": cpus_per_task,
                "mem": mem,
                "partition": partition,
                "account": account,
                "qos": qos,
                "constraint": constraint,
                "time": time,
                "job_name": job_name,
                "dependency": dependency,
            }
        )
        settings = load_config(config, set or ())
        profile, site_file = load_site(site)
        request = merge(asked, settings.slurm, profile)
        check_fields(allow_change or ())
        if resume not in ("auto", "never") and not Path(resume).is_dir():
            raise BadInput(f"--resume {resume}: no such checkpoint folder; give auto, never, or .../checkpoints/step-N")
        arguments = ["--resume", resume]
        for field in allow_change or ():
            arguments += ["--allow-change", field]
        chain = Chain(Wanted(settings, request, profile, site_file, arguments, build, evaluate, export))
        scripts = chain.scripts()
        checks.refuse_secrets([chain.config_text, *(script.text for script in scripts)])
        if not dry_run:
            queue.check_client()
            checks.refuse_second_job(chain.run_dir, request.dependency)
        errors, warnings = checks.problems(settings, request, profile.accelerator, evaluate)
        for line in warnings:
            say(line)
        if dry_run:
            jobs = []
        elif errors:
            raise BadInput("; ".join(errors))
        else:
            jobs = chain.submit()
    if dry_run:
        for script in scripts:
            sys.stdout.write(script.text)
        sys.stdout.flush()
        for line in errors:
            say(f"would be refused: {line}")
        if errors:
            raise typer.Exit(2)
        say("nothing is submitted")
        return
    for job in jobs:
        say(f"submitted: {job.kind} job {job.number}, {job.script}")
    say(f"look at it: triptych status {shlex.quote(str(chain.run_dir))} --watch; logs below {chain.run_dir / 'logs'}")
    if as_json:
        print_json(
            {
                "run": str(chain.run_dir),
                "jobs": [{"id": job.number, "kind": job.kind, "script": str(job.script)} for job in jobs],
            }
        )
    elif len(jobs) == 1:
        print(jobs[0].number)
    else:
        for job in jobs:
            print(job.number, job.kind)

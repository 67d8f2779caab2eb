"""The `triptych` command: says which commands there are and hands over to them.

Every command imports what it needs when it is called, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from launch import data_commands, watch_commands
from launch.demo import demo_command
from launch.errors import BAD_INPUT, exits_cleanly
from launch.eval_commands import eval_command
from launch.export_commands import export_command, verify_command
from launch.submit_command import EXAMPLES, SubmitCommand, submit_command

app = typer.Typer(
    name="triptych",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Pretrain one transformer on image-text-audio tuples: raw files in, a plain transformers checkpoint out.",
)


app.add_typer(data_commands.app, name="data")
app.command("demo")(exits_cleanly(demo_command))

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; may be given several times."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]


@app.command(epilog="example: triptych config configs/digits.yaml --set train.max_steps=20")
@exits_cleanly
def config(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of a run; without it, every setting there is.")
    ] = None,
    set: Overrides = None,
    json: Json = False,
) -> None:
    """Check a config and show what it comes to."""
    from launch.config_command import config_command

    config_command(config, set or (), json)


class TrainCommand(TyperCommand):
    """`--allow-change` may stand without a value, which Typer has no word for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse with the value that a bare `--allow-change` means."""
        from pretrain.changes import spell_out

        return super().parse_args(ctx, spell_out(args))


@app.command(cls=TrainCommand, epilog="example: triptych train configs/digits.yaml --nproc 2 --set train.max_steps=20")
@exits_cleanly
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    set: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a GPU, or two on a CPU.")] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|PATH", help="Go on from the newest valid checkpoint, none, or this one.")
    ] = "auto",
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change",
            metavar="[FIELD]",
            help="Let a setting or section differ from the checkpoint's; without FIELD the mixture, data.train.",
        ),
    ] = None,
) -> None:
    """Train on this machine.

    Exit status: 0 done; 1 a fault of Triptych's; 2 bad input; 75 stopped on purpose with a checkpoint, run it again; 76
    a rank hung or died, and the others were ended.
    """
    from launch.train_command import train_command

    raise typer.Exit(train_command(config, set or (), nproc, resume, allow_change or ()))


app.command("submit", cls=SubmitCommand, epilog=EXAMPLES)(exits_cleanly(submit_command))


@app.command(epilog="example: triptych doctor configs/digits.yaml --json")
@exits_cleanly
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML file of a run; without it, the machine alone.")] = None,
    set: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a GPU, or two on a CPU.")] = None,
    json: Json = False,
) -> None:
    """Check whether a run would work here, and say what to do.

    Exit status: 0 it would, 2 something would stop it.
    """
    from launch.doctor_command import doctor_command

    if not doctor_command(config, set or (), nproc, json):
        raise typer.Exit(BAD_INPUT)


@app.command(epilog="example: triptych plan configs/base.yaml --nodes 4 --nproc 8 --accelerator h100-80g")
@exits_cleanly
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    set: Overrides = None,
    accelerator: Annotated[
        str | None,
        typer.Option(
            "--accelerator",
            "--gpu",
            help="a100-40g, a100-80g, h100-80g, h200-141g, mi300x-192g or cpu; default: what this machine has.",
        ),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; default: slurm.nodes of the config, else 1.")] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            "--gpus-per-node",
            min=1,
            help="Processes a node; default: slurm.gpus_per_node, else this machine's, or 8 of a named accelerator.",
        ),
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0.001, max=1.0, help="Share of the peak speed that training reaches [0.3].")
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="Of a job, as sbatch takes it; default: slurm.time of the config.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a run will take, before it is queued: memory, time, decoding, network, checkpoints.

    Exit status: 0 it can work, 2 it cannot; what would is said.
    """
    from launch.plan_command import plan_command

    if not plan_command(config, set or (), accelerator, nodes, nproc, mfu, time_limit, json):
        raise typer.Exit(BAD_INPUT)


@app.command(epilog="example: triptych checkpoints runs/demo/run --json")
@exits_cleanly
def checkpoints(run: Annotated[Path, typer.Argument(help="Run directory.")], json: Json = False) -> None:
    """List a run's checkpoints and verify every byte of them."""
    from launch.checkpoints_command import checkpoints_command

    checkpoints_command(run, json)


@app.command(epilog="example: triptych ledger runs/demo/run --step 100")
@exits_cleanly
def ledger(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    step: Annotated[int | None, typer.Option(min=1, help="List the samples of this step, and where they lie.")] = None,
    repeated: Annotated[bool, typer.Option("--repeated", help="List samples consumed twice within an epoch.")] = False,
    unseen: Annotated[bool, typer.Option("--unseen", help="List samples that were due and never consumed.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare what the ranks consumed in every step with the plan.")
    ] = False,
    data: Annotated[
        list[str] | None, typer.Option(metavar="DATASET", help="Where a dataset lies now. May be repeated.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a run consumed, over all its restarts; without options, sum it up.

    Exit status: 0, or 1 when it was not what the plan says, each sample once an epoch.
    """
    from launch.ledger_command import ledger_command

    raise typer.Exit(ledger_command(run, step, repeated, unseen, verify, data or (), json))


for _name in ("status", "stop", "logs", "report"):
    app.command(_name)(exits_cleanly(getattr(watch_commands, _name)))
app.command("eval")(exits_cleanly(eval_command))
app.command("export")(exits_cleanly(export_command))
app.command("verify")(exits_cleanly(verify_command))


@app.command(epilog="example: triptych push runs/demo/export --repo my-lab/digits --dry-run")
@exits_cleanly
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `triptych export` wrote.")],
    repo: Annotated[str, typer.Option(metavar="ORG/NAME", help="Model repository; made where there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; private otherwise.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be sent.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made where there is none.")] = None,
    json: Json = False,
) -> None:
    """Upload an export folder to the Hugging Face Hub."""
    from launch.push_command import push_command

    push_command(folder, repo, public, revision, dry_run, json)


def main() -> None:
    """Entry point of the `triptych` command."""
    app()

"""`triptych export` and `triptych verify`: a run's model as a transformers folder, and the check of such a folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.json_output import messages_to_stderr, print_json, say

if TYPE_CHECKING:
    from pretrain.verify import Verification


class Dtype(StrEnum):
    """Types that weights can be exported as."""

    fp32 = "fp32"
    bf16 = "bf16"


Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]


def export_command(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; new or empty.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint to export; default: the newest valid one.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.")] = Dtype.fp32,
    license: Annotated[str, typer.Option(help="Licence of the weights, as the Hub names it, for the card.")] = "other",
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Load it in a fresh process and compare.")] = True,
    as_json: Json = False,
) -> None:
    """Write a run's model as a folder that plain transformers loads, and verify it.

    JSON is {path, step, dtype, verified, num_parameters}.

    Example: triptych export runs/demo/run --out runs/demo/export --dtype bf16
    """
    with messages_to_stderr():
        from pretrain.folders import check_free, check_run, exported_step

        check_run(run)
        check_free(out)
        from pretrain.export import export

        outcome = export(run, out, step, dtype.value, license, check, say)
        found_step = exported_step(out)
    if outcome is not None:
        say(describe(outcome))
    if as_json:
        verified = None if outcome is None else outcome.verified
        parameters = None if outcome is None else outcome.num_parameters
        found = {"path": str(out), "step": found_step, "dtype": dtype.value}
        print_json(found | {"verified": verified, "num_parameters": parameters})
    else:
        print(out)


def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `triptych export` wrote.")],
    data: Annotated[
        Path | None, typer.Option(metavar="DATASET", help="The evaluation data of the run: compare samples of it too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check an export's files, load it without triptych in a fresh process, and compare what it says with the run.

    Exit status: 0 verified, 1 not.

    Example: triptych verify runs/demo/export
    """
    with messages_to_stderr():
        from data_pipelines import open_dataset
        from pretrain.verify import verify_export

        outcome = verify_export(folder, None if data is None else open_dataset(data))
    if as_json:
        print_json(outcome.as_json())
    else:
        print(describe(outcome))
    if not outcome.verified:
        raise typer.Exit(1)


def describe(outcome: Verification) -> str:
    """The outcome in words: one line, or one for each problem."""
    if not outcome.verified:
        return "\n".join(f"not verified: {problem}" for problem in outcome.problems)
    captions = "the same captions" if outcome.same_captions else "other captions in places"
    return (
        f"verified: {outcome.num_files} files, {outcome.num_parameters:,} parameters, {outcome.num_probes} probes; "
        f"largest difference of a logit {outcome.largest_logit_difference:.1g} (relative), "
        f"of a loss {outcome.largest_loss_difference:.1g} nats; {captions}"
    )

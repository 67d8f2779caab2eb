"""`triptych ledger`: what a run consumed, step by step, and the proof that it was each sample once an epoch."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import BadInput, printable
from data_pipelines.mixture import Mixture, MixtureHistory
from data_pipelines.progress import Progress, counted
from launch.json_output import print_json, say
from pretrain.config import load_config
from pretrain.consumption import PASSED_OVER, DataPlans, Finding, Proof, check_batches, prove
from pretrain.ledger import Ledger, Outcome

DONE, NOT_EXACT = 0, 1
_SHOWN = 20
_PIPE_WIDTH = 200


def ledger_command(
    run: Path,
    step: int | None = None,
    repeated: bool = False,
    unseen: bool = False,
    verify: bool = False,
    data: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Answer one question, or without one sum the ledger up; returns the exit status.

    Args:
        run: run directory.
        step: list this step's samples.
        repeated: list samples that were consumed more than once within an epoch.
        unseen: list samples, of those that were due so far, that no step consumed.
        verify: compare every step's checksum with the plan.
        data: where datasets lie now, if not where the run read them.
        as_json: JSON alone on standard output. `repeated` and `unseen` alone print a list.

    Returns:
        0, or 1 when the run did not consume what its plan says, each sample once an epoch.

    Raises:
        BadInput: there is no ledger or no such step, the datasets are gone, or two questions do not go together.
    """
    if step is not None and (repeated or unseen or verify):
        raise BadInput("--step lists one step; ask for --repeated, --unseen and --verify without it")
    ledger = Ledger.read(run)
    if ledger.damaged:
        say(f"triptych: {counted(ledger.damaged, 'record')} of {run}/ledger/steps cannot be read; see --unseen")
    places, remote = _places(run)
    plans = DataPlans(ledger, [*data, *places], remote)
    if step is not None:
        return _step(run, ledger, plans, step, as_json)
    if repeated or unseen or verify:
        with Progress("ledger", "batches") as progress:
            proof = prove(ledger, plans, progress)
        asked = {"repeated": repeated, "unseen": unseen, "verify": verify}
        return _proof(proof, {name for name, wanted in asked.items() if wanted}, as_json)
    found = summary(ledger)
    if as_json:
        print_json({"run": str(run), **found})
    else:
        _show(*_summary_tables(run, found))
    return DONE


def summary(ledger: Ledger) -> dict[str, Any]:
    """What a ledger holds, for JSON; the data are not looked at."""
    records, undone = ledger.effective, ledger.undone
    outcomes = Counter(records["outcome"].tolist())
    trained, passed = outcomes[Outcome.TRAINED], outcomes[Outcome.PASSED_OVER]
    consumed = len(records) - passed
    found: dict[str, Any] = {
        "steps": int(records["step"].max(initial=0)),
        "trained": trained,
        "skipped": consumed - trained,
        "passed_over": passed,
        "undone": int((undone["outcome"] != Outcome.PASSED_OVER).sum()),
        "damaged": ledger.damaged,
        "samples": 0,
        "sources": [],
        "starts": [],
        "decisions": ledger.decisions,
    }
    for stretch in ledger.stretches:
        steps, held = (part["step"][part["stretch"] == stretch.number] for part in (ledger.records, records))
        found["starts"].append(
            {
                "kind": stretch.kind,
                "time": stretch.time,
                "step": stretch.step,
                "batch": stretch.batch,
                "world_size": ledger.start_of(stretch.number).facts["world_size"],
                "last_step": int(steps.max(initial=stretch.step)),
                "last_step_kept": int(held.max(initial=stretch.step)),
            }
        )
    if len(records):
        facts = ledger.start_of(int(records["stretch"][-1])).facts["data"]
        state = facts["state"]
        found["samples"] = consumed * state["global_batch"]
        history = MixtureHistory(Mixture.of_counts(state["mixture"]), state.get("changes", []))
        cursors = history.consumed((int(records["batch"].max()) + 1) * state["global_batch"]).tolist()
        for source, cursor in zip(facts["sources"], cursors, strict=True):
            whole = source["samples"] - (source["samples"] % state["global_batch"] if state["tail"] == "drop" else 0)
            found["sources"].append({**source, "position": cursor, "epochs": cursor / whole})
    return found


def _places(run: Path) -> tuple[list[str], RemoteConfig | None]:
    """Where the run's config says that the data lie, and how to read them from there."""
    try:
        data = load_config(run / "config.yaml").data
    except BadInput:
        return [], None
    return [source.path for source in data.train_sources], data.remote


def _step(run: Path, ledger: Ledger, plans: DataPlans, step: int, as_json: bool) -> int:
    held, undone = ledger.of_step(step)
    consumed = held[held["outcome"] != Outcome.PASSED_OVER]
    if not len(consumed):
        there = int(ledger.effective["step"].max(initial=0))
        why = "it was undone and not done again" if len(undone) else f"the last one is {there}"
        raise BadInput(f"--step {step}: no such step in the ledger of {run}; {why}")
    tries = [
        {"stretch": int(one["stretch"]), "batch": int(one["batch"]), "outcome": Outcome(int(one["outcome"])).words}
        for one in undone
    ]
    (checked,) = check_batches(plans, consumed[:1])
    record, agrees = checked.records[0], bool(checked.agrees[0])
    batch, outcome = int(record["batch"]), Outcome(int(record["outcome"])).words
    stretch = int(record["stretch"])
    samples = plans.locate(stretch, checked.picked)
    passed = sorted(held["batch"][held["outcome"] == Outcome.PASSED_OVER].tolist())
    if as_json:
        print_json(
            {
                "step": step,
                "batch": batch,
                "outcome": outcome,
                "checksum": f"{int(record['checksum']):08x}",
                "agrees": agrees,
                "start": ledger.start_of(stretch).number,
                "passed_over": passed,
                "undone": tries,
                "samples": [sample._asdict() for sample in samples],
            }
        )
    else:
        lines = [f"step {step}: batch {batch}, {outcome}"]
        if passed:
            lines.append(f"passed over for it: batches {', '.join(map(str, passed))}")
        lines += [f"undone: batch {one['batch']}, {one['outcome']} (stretch {one['stretch']})" for one in tries]
        rows = [(one.key, one.dataset, one.shard, f"{one.offset:,}", str(one.epoch)) for one in samples]
        _show("\n".join(lines), _table(("key", "dataset", "shard", "offset", "epoch"), rows, right=("offset", "epoch")))
        if agrees:
            say(f"the checksum of what the ranks consumed agrees ({int(record['checksum']):08x})")
    if not agrees:
        say(
            f"triptych: the ranks consumed other samples in step {step}: their checksum is "
            f"{int(record['checksum']):08x}, and not that of batch {batch}"
        )
    return DONE if agrees else NOT_EXACT


def _proof(proof: Proof, asked: set[str], as_json: bool) -> int:
    answers: dict[str, Any] = {
        "repeated": [each.as_json() for each in proof.repeated],
        "unseen": [each.as_json() for each in proof.unseen],
        "verify": {
            "steps": proof.num_batches,
            "samples": proof.num_samples,
            "mismatched": [{"step": step, "batch": batch} for step, batch in proof.mismatched],
        },
    }
    if as_json:
        print_json(answers[min(asked)] if len(asked) == 1 else {name: answers[name] for name in sorted(asked)})
    looked = f"{counted(proof.num_samples, 'sample')} in {counted(proof.num_batches, 'step')}"
    parts: list[RenderableType] = []
    if "repeated" in asked:
        none = f"no sample was consumed twice within an epoch ({looked})"
        parts += _findings(proof.repeated, "consumed again", none)
    if "unseen" in asked:
        none = f"every sample that was due so far was consumed ({looked})"
        parts += _findings(proof.unseen, "never consumed", none)
    if "verify" in asked:
        parts.append(f"the ranks consumed what the plan says: {looked}")
    if proof.first_batch:
        parts.append(f"the ledger begins at batch {proof.first_batch}; of earlier ones it knows nothing")
    if not as_json:
        _show(*parts)
    if proof.mismatched:
        step, batch = proof.mismatched[0]
        say(
            f"triptych: in {counted(len(proof.mismatched), 'step')} the ranks consumed other samples than their "
            f"batch's, first in step {step} (batch {batch})"
        )
    lost = any(each.why != PASSED_OVER for each in proof.unseen)
    bad = {"repeated": bool(proof.repeated), "unseen": lost, "verify": False}
    return NOT_EXACT if proof.mismatched or any(bad[name] for name in asked) else DONE


def _findings(found: list[Finding], what: str, none: str) -> list[RenderableType]:
    if not found:
        return [none]
    rows = [
        (each.sample.key, each.sample.dataset, each.sample.shard, f"{each.sample.offset:,}", str(each.sample.epoch))
        + ("" if each.step is None else str(each.step), str(each.batch), each.why)
        for each in found[:_SHOWN]
    ]
    names = ("key", "dataset", "shard", "offset", "epoch", "step", "batch", "why")
    parts: list[RenderableType] = [_table(names, rows, right=("offset", "epoch", "step", "batch"))]
    if len(found) > _SHOWN:
        parts.append(f"and {len(found) - _SHOWN:,} more; --json lists them")
    why = Counter(each.why for each in found)
    told = ", ".join(f"{count:,} {reason}" for reason, count in why.items())
    return [*parts, f"{counted(len(found), 'sample')} {what}: {told}"]


def _summary_tables(run: Path, found: dict[str, Any]) -> list[RenderableType]:
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    steps = f"{found['steps']:,}: {found['trained']:,} trained, {found['skipped']:,} skipped"
    rows = [
        ("run", str(run)),
        ("steps", f"{steps}; tries undone: {found['undone']:,}"),
        ("samples", f"{found['samples']:,}; batches passed over: {found['passed_over']:,}"),
    ]
    rows += [
        ("", f"{source['path']}: {source['epochs']:.2f} epochs of {source['samples']:,}") for source in found["sources"]
    ]
    for name, value in rows:
        facts.add_row(name, Text(printable(value)))
    starts = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["time"])),
            start["kind"].replace("_", " "),
            f"{start['step']:,}",
            f"{start['batch']:,}",
            str(start["world_size"]),
            f"{start['last_step']:,}",
            f"{start['last_step_kept']:,}",
        )
        for start in found["starts"]
    ]
    names = ("when", "what", "from step", "from batch", "ranks", "to step", "of which kept to")
    parts: list[RenderableType] = [facts, "", _table(names, starts, right=names[2:])]
    wrong = [each for each in found["decisions"] if each["kind"] != "roll_back"]
    if wrong:
        rows_ = [(str(each["step"]), str(each["batch"]), each["action"], each["reason"]) for each in wrong[-_SHOWN:]]
        parts += ["", _table(("step", "batch", "done", "why"), rows_, right=("step", "batch"))]
        if len(wrong) > _SHOWN:
            parts.append(f"and {len(wrong) - _SHOWN:,} earlier ones; --json lists them")
    return parts


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold", justify="right" if name in right else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _show(*parts: RenderableType) -> None:
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    for part in parts:
        console.print(Text("\n".join(map(printable, part.split("\n")))) if isinstance(part, str) else part)

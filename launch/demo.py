"""`triptych demo`: the whole way on the embedded digits, on this machine: data, ZeRO run, evaluation, export, report.

Every stage leaves its result under one folder and is not done again when the command is given again, so an interrupted
demo goes on where it was. `demo.json` remembers the settings; with other settings the demo starts over.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipelines.errors import BadInput
from launch.eval_commands import evaluate_target, write_json
from launch.json_output import messages_to_stderr, print_json, say
from launch.train_command import train_command
from pretrain.config import Config, load_config

RECIPE = Path(__file__).with_name("digits.yaml")
NUM_PROCESSES = 2
_MADE = ("dataset", "run", "export", "report.html", "results.json")
_STATE = "demo.json"


def demo_command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything that the demo makes.")] = Path(
        "runs/demo"
    ),
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the recipe; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json on standard output.")] = False,
) -> None:
    """Build the embedded digits, pretrain on two processes, evaluate, export, verify and report; minutes on a CPU.

    Given again, it goes on where it was stopped, and does nothing twice.

    Exit status: 0 done; 1 a fault, or an export that does not verify; 2 bad input; 75 stopped with a checkpoint saved.

    Example: triptych demo --out runs/demo
    """
    with messages_to_stderr():
        results = run_demo(out, set or ())
    if as_json:
        print_json(results)
        return
    from rich.console import Console

    from pretrain.results import table

    Console().print(table(results))
    verified = "verified" if results["export"]["verified"] else "NOT verified"
    print(f"export: {out / 'export'} ({verified})\nreport: {out / 'report.html'}\nresults: {out / 'results.json'}")


def run_demo(out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Do what is not done yet, and return the content of `results.json`.

    Raises:
        BadInput: `out` holds something else, or an override is wrong.
        typer.Exit: training ended early, with its exit status.
    """
    settings = [
        f"run.dir={json.dumps(str(out / 'run'))}",
        f"data.train={json.dumps(str(out / 'dataset' / 'train'))}",
        f"data.eval={json.dumps(str(out / 'dataset' / 'test'))}",
        "data.build=[]",
        *overrides,
    ]
    config = load_config(RECIPE, settings)
    state = _State.open(out, config)
    if state.is_done:
        say(f"{out}: done already, with these settings; remove the folder to do it again")
        return dict(json.loads((out / "results.json").read_text()))
    with state.stage("data", 1):
        _build(out / "dataset")
    with state.stage(f"training on {NUM_PROCESSES} processes, ZeRO {config.engine.zero_stage}", 2, "train"):
        _train(settings, config)
    with state.stage("evaluation", 3):
        results = _evaluate(out, config)
    with state.stage("export, and its verification in a fresh process", 4, "export"):
        exported = _export(out, config)
    with state.stage("captions and report", 5, "report"):
        _report(out, config, results, exported)
    results |= {
        "export": {"path": str(out / "export"), **exported},
        "seconds": round(sum(state.seconds.values()), 1),
        "stage_seconds": state.seconds,
        "num_processes": NUM_PROCESSES,
        "zero_stage": config.engine.zero_stage,
    }
    write_json(out / "results.json", results)
    return results


class _State:
    """What a demo folder is of, and how long its stages took: `demo.json`."""

    def __init__(self, out: Path, settings: dict[str, Any], seconds: dict[str, float]) -> None:
        self.out = out
        self.settings = settings
        self.seconds = seconds

    @classmethod
    def open(cls, out: Path, config: Config) -> _State:
        """The state of a folder; where it is of other settings, everything that the demo made there goes."""
        settings = config.model_dump(mode="json")
        file = out / _STATE
        try:
            old = json.loads(file.read_text())
            old_settings, seconds = old["settings"], dict(old["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            # Of `triptych train` with the same recipe, dataset and run are what the demo would make.
            if out.is_file() or (out.is_dir() and any(path.name not in _MADE for path in out.iterdir())):
                raise BadInput(f"--out {out}: holds something that is not a demo; choose a new folder") from None
            old_settings, seconds = settings, {}
        if old_settings != settings:
            say(f"{out}: was made with other settings; starting over")
            for name in _MADE:
                path = out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            seconds = {}
        state = cls(out, settings, seconds)
        state._write()
        return state

    @property
    def is_done(self) -> bool:
        """Whether every result is there."""
        return all((self.out / name).exists() for name in _MADE)

    @contextmanager
    def stage(self, title: str, number: int, name: str | None = None) -> Iterator[None]:
        """Say what happens, and add the time that it takes, also when it is cut short."""
        say(f"[{number}/5] {title}")
        start = time.monotonic()
        try:
            yield
        finally:
            key = name or title
            self.seconds[key] = round(self.seconds.get(key, 0.0) + time.monotonic() - start, 3)
            self._write()

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / _STATE, {"settings": self.settings, "seconds": self.seconds})


def _build(folder: Path) -> None:
    from data_pipelines.build import build_dataset

    for split in ("train", "test"):
        build_dataset("digits", folder / split, split=split)


def _train(settings: Sequence[str], config: Config) -> None:
    from pretrain.checkpoint import find_latest

    newest, _ = find_latest(Path(config.run.dir))
    if newest is not None and newest.step == config.train.max_steps:
        say("trained already")
        return
    status = train_command(RECIPE, settings, NUM_PROCESSES, "auto")
    if status:
        raise typer.Exit(status)


def _evaluate(out: Path, config: Config) -> dict[str, Any]:
    """The run's own evaluation after its last step; measured here only where there is none."""
    try:
        results = json.loads((out / "run" / "eval" / "results.json").read_text())
        if results["step"] == config.train.max_steps:
            return dict(results)
    except (OSError, ValueError, KeyError, TypeError):
        say("the run left no evaluation of its last step")
    return evaluate_target(out / "run", out / "dataset" / "test")


def _export(out: Path, config: Config) -> dict[str, Any]:
    """Export and verify, or verify the export that is there; `{verified, num_parameters, ...}`."""
    from data_pipelines import open_dataset
    from launch.export_commands import describe
    from pretrain.export import export
    from pretrain.folders import exported_step
    from pretrain.verify import verify_export

    folder = out / "export"
    outcome = None
    if folder.is_dir() and exported_step(folder) == config.train.max_steps:
        outcome = verify_export(folder, open_dataset(out / "dataset" / "test"))
        if not outcome.verified:
            say(f"the export there is not sound ({outcome.problems[0]}); exporting again")
    if outcome is None or not outcome.verified:
        shutil.rmtree(folder, ignore_errors=True)
        outcome = export(out / "run", folder, say=say)
        assert outcome is not None
    say(describe(outcome))
    return outcome.as_json()


def _report(out: Path, config: Config, results: dict[str, Any], exported: dict[str, Any]) -> None:
    from launch.demo_report import write_demo_report

    write_demo_report(out, config, results, exported)

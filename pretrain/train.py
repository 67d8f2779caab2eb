"""The program that `accelerate launch -m pretrain.train CONFIG` starts, once a rank.

Exit status: 0 done; 1 a fault of ours; 2 bad input, said in one line by rank 0; 75 stopped, with a checkpoint saved.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipelines.atomic import atomic_file
from data_pipelines.errors import BadInput, printable
from pretrain import checkpoint
from pretrain.accelerate_settings import check_launcher, launcher_words
from pretrain.changes import MIXTURE, Difference, check_fields, covers, spell_out
from pretrain.config import Config, dump_config, load_config
from pretrain.engine import Engine, accumulation_steps, global_rank, global_world_size, prepare_environment
from pretrain.heartbeat import AFTER_VARIABLE, Pulse, answer_with_stacks
from pretrain.orphan import end_with_launcher
from pretrain.owner import Owner
from pretrain.rank_log import keep_rank_log
from pretrain.resume import TrainerState, candidate, check, check_tokenizer, reader_versions, tokenizers_of
from pretrain.watch import LimitPassed

DONE, FAULT, BAD_INPUT, STOPPED = 0, 1, 2, 75
LET_RANK_0_SPEAK_SECONDS = 20.0


class SeenByOneRank(BadInput):
    """Bad input that this rank met in its own share of the data, so that no other rank will say it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="pretrain.train",
        description="Pretrain from one YAML config, as one rank of an accelerate launch.",
        epilog="example: accelerate launch --use_deepspeed --num_processes 2 -m pretrain.train configs/digits.yaml",
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="where to go on from (auto)")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="let this setting or section change on resume; without FIELD the mixture, data.train",
    )
    options = parser.parse_args(spell_out(sys.argv[1:] if arguments is None else arguments))
    prepare_environment()
    end_with_launcher()
    answer_with_stacks(global_rank())
    pulse = Pulse(global_rank())
    try:
        done = train(options.config, options.set, options.resume, options.allow_change, pulse)
        return DONE if done else STOPPED
    except BadInput as error:
        if global_rank() and not isinstance(error, SeenByOneRank):
            let_rank_0_speak()
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (checkpoint.SaveFailed, LimitPassed) as error:
        # All ranks came to it in the same step.
        if global_rank():
            let_rank_0_speak()
        else:
            pulse.fail(error)
            print(f"stopped: {printable(str(error))}", file=sys.stderr)
        return FAULT
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        pulse.fail(error)
        print(f"rank {global_rank()}:\n{traceback.format_exc()}", file=sys.stderr)
        return FAULT


def let_rank_0_speak() -> None:
    """Wait while rank 0 says it for all: the launcher ends it as soon as another rank is gone, and us when it is."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(LET_RANK_0_SPEAK_SECONDS)


def train(
    config_path: str,
    overrides: Sequence[str],
    resume: str,
    allow_change: Sequence[str] = (),
    pulse: Pulse | None = None,
) -> bool:
    """Train as `config_path` says, as the one owner of the run directory.

    Going on from a checkpoint, the settings in `allow_change` may differ from its.

    Returns:
        True when the last step is done, false when stopped on purpose with a checkpoint saved.
    """
    config = load_config(config_path, overrides)
    check_launcher(config, accumulation_steps(config, global_world_size()), os.environ, launcher_words())
    if global_rank():
        return _train(config, resume, allow_change, pulse, None)
    say = functools.partial(print, file=sys.stderr, flush=True)
    owner = Owner.take(Path(config.run.dir), config.supervisor.owner_seconds, say)
    try:
        return _train(config, resume, allow_change, pulse, owner)
    finally:
        owner.give_back()


def _train(config: Config, resume: str, allow_change: Sequence[str], pulse: Pulse | None, owner: Owner | None) -> bool:
    run_dir = Path(config.run.dir)
    if resume == "never" and any((run_dir / "checkpoints").glob("step-*")):
        raise BadInput(f"{run_dir} holds checkpoints and --resume is never: use another run.dir, or --resume auto")
    check_fields(allow_change)
    likely = candidate(run_dir, resume)
    changed = changed_settings(likely, config, allow_change)
    pulse = pulse or Pulse(global_rank())
    with pulse.ticking() if config.data.build and owner else nullcontext():
        build_datasets(config)

    from data_pipelines import open_dataset
    from data_pipelines.loader import build_loader
    from pretrain.callbacks.evaluation import Evaluation
    from pretrain.callbacks.ledger import LedgerKeeper
    from pretrain.callbacks.logs import Console, MetricsFile, TensorBoard
    from pretrain.checkpoint.generators import derive_generators
    from pretrain.consumption import data_facts
    from pretrain.environment import check_same_environment
    from pretrain.model.omni import OmniPretrainer
    from pretrain.trainer import Trainer

    engine = Engine(config)
    # Also a barrier: rank 0 owns the run directory by now.
    keep_rank_log(run_dir, engine.rank, engine.gather_objects(starts_so_far(run_dir) + 1)[0])
    try:
        check_same_environment(engine, versions())
        start, passed = find_start(run_dir, resume, engine)
        for bad in passed:
            if engine.is_main:
                print(f"passed over {bad.path}: {bad.reason}", file=sys.stderr)
        old = TrainerState.read(start) if start is not None else None
        if start != likely:
            changed = changed_settings(start, config, allow_change)
        step, batch = (old.step, old.cursor["batch"]) if old is not None else (0, 0)
        mixture = covers(allow_change, MIXTURE)
        loader = build_loader(config, engine.rank, engine.world_size, batch, old.data if old else None, mixture)
        engine.prepare(OmniPretrainer.build(config, loader.tokenizer))
        tokenizers = tokenizers_of(config)
        if start is None or old is None:
            derive_generators(config.run.seed, 0, engine.rank, engine.device)
        else:
            check_tokenizer(start, old, tokenizers)
            checkpoint.load(engine, start, run_dir, pulse.tick)
        run_id = write_run_files(run_dir, dump_config(config), engine, step, changed) if engine.is_main else ""
        run_id = engine.gather_objects(run_id)[0]

        consumption = data_facts(loader.datasets, loader.state(batch), config.data.num_streams)
        callbacks: list[Any] = [LedgerKeeper(run_dir, consumption), MetricsFile(run_dir / "metrics.jsonl")]
        callbacks.append(Console(config.logging.every_steps))
        if config.logging.tensorboard:
            callbacks.append(TensorBoard(run_dir / "tensorboard"))
        if config.data.eval is not None:
            evaluated = [open_dataset(source.path, config.data.remote) for source in config.data.eval_sources]
            callbacks.append(Evaluation(evaluated, loader.tokenizer))
        trainer = Trainer(
            config,
            engine,
            run_dir,
            run_id,
            loader.samples_an_epoch,
            callbacks,
            loader.state,
            lambda: loader.remote_wait_seconds,
            pulse,
        )
        trainer.step = step
        trainer.made_with = {"tokenizer": tokenizers, "versions": reader_versions()}
        if owner is not None:
            trainer.check_owner = owner.check
        if start is not None and old is not None:
            trainer.watch.resume(old.watch)
            trainer.cursor.resume(old.cursor)
            trainer.committed.append(start)
        if engine.is_main and start is not None:
            print(f"resuming from {start} at step {step}", file=sys.stderr)
        try:
            return trainer.run(loader.batches)
        except BadInput as error:
            raise SeenByOneRank(f"rank {engine.rank}: {error}") from None
    finally:
        engine.close()


def starts_so_far(run_dir: Path) -> int:
    """How often this run has started."""
    try:
        return int(json.loads((run_dir / "run.json").read_text())["restarts"]) + 1
    except (OSError, ValueError, KeyError):
        return 0


def changed_settings(start: Path | None, config: Any, allow_change: Sequence[str]) -> list[Difference]:
    """What differs from a checkpoint's config, said by rank 0 before anything starts.

    Raises:
        BadInput: not all of it may.
    """
    changed = check(start, config, allow_change) if start is not None else []
    for difference in changed if start is not None and global_rank() == 0 else ():
        print(f"changed since {start.name}: {difference} ({difference.kind})", file=sys.stderr)
    return changed


def build_datasets(config: Any) -> None:
    """Build the datasets of `data.build` that are not there yet, on rank 0; the others wait, however long it takes."""
    from data_pipelines.build import build_configured

    for wanted in config.data.build:
        out = Path(wanted.out)
        if global_rank() == 0:
            build_configured(wanted)
        while not (out / "dataset.json").exists():
            # Outside any collective, whose timeout a build may outlast; the launcher ends us if rank 0 fails.
            time.sleep(0.2)


def find_start(run_dir: Path, resume: str, engine: Engine) -> tuple[Path | None, list[Any]]:
    """The checkpoint to start from, agreed on by all ranks, and the invalid ones passed over."""
    from pretrain.checkpoint.verification import find_latest_together, verify_together

    if resume == "never":
        return None, []
    if resume == "auto":
        found, passed = find_latest_together(engine, run_dir)
        return (found.path if found else None), passed
    path = Path(resume)
    there = engine.gather_objects(path.is_dir())[0]
    reason = verify_together(engine, path) if there else "there is no such directory"
    if reason:
        raise BadInput(f"--resume {resume}: {reason}")
    return path, []


def write_run_files(
    run_dir: Path, config_text: str, engine: Engine, step: int, changed: Sequence[Difference] = ()
) -> str:
    """Write config.yaml and run.json, with what changed on this resume; returns the run's id, kept over restarts."""
    path = run_dir / "run.json"
    run = json.loads(path.read_text()) if path.exists() else {}
    if not run:
        run = {"run_id": secrets.token_hex(8), "created": time.time(), "restarts": 0, "world_sizes": [], "starts": []}
    else:
        run["restarts"] += 1
    run["world_sizes"].append(engine.world_size)
    start: dict[str, Any] = {"time": time.time(), "step": step, "host": platform.node(), "device": str(engine.device)}
    start |= {"job_id": os.environ.get("SLURM_JOB_ID"), "requeues": int(os.environ.get("SLURM_RESTART_COUNT") or 0)}
    run["starts"].append(start | {"after": os.environ.get(AFTER_VARIABLE) or None})
    run["versions"] = versions()
    kept = run.setdefault("changes", [])
    kept += [entry for entry in (difference.record(step) for difference in changed) if entry not in kept]
    for name, text in (("config.yaml", config_text), ("run.json", json.dumps(run, indent=1))):
        with atomic_file(run_dir / name) as file:
            file.write(text.encode())
    return str(run["run_id"])


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    found = {"python": platform.python_version()}
    for name in ("triptych", "torch", "deepspeed", "accelerate", "transformers", "webdataset", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter shutdown may hang on DeepSpeed's and gloo's threads; everything is on disk by now.
    os._exit(status)

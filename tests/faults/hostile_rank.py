"""Started by test_hostile_checkpoint.py: tries to load checkpoints in every way there is and prints what came of it.

    hostile_rank RUN_DIR     the answers are JSON lines on standard output

RUN_DIR gets checkpoints of steps 2 and 4; then `cases` beside it is waited for, and every checkpoint in it tried.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.engine import prepare_environment

prepare_environment()

from deepspeed.checkpoint import ds_to_universal  # noqa: E402

from data_pipelines.errors import BadInput  # noqa: E402
from pretrain import checkpoint  # noqa: E402
from pretrain.consolidate import open_weights, safe_unpickling  # noqa: E402
from pretrain.engine import Engine  # noqa: E402
from pretrain.model.omni import OmniPretrainer  # noqa: E402
from pretrain.trainer import Trainer  # noqa: E402
from tests.faults.saving_rank import batches  # noqa: E402
from tests.pretrain.tiny import tiny_config, word_tokenizer  # noqa: E402


def to_universal(path: Path) -> None:
    """DeepSpeed's own converter, as it is used in a run: inside the guard."""
    options = argparse.Namespace(
        input_folder=str(path / "deepspeed" / "state"),
        output_folder=str(path.parent / f"universal-{path.name}"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with safe_unpickling():
        ds_to_universal.main(options)


def outcome(what: Callable[[], object]) -> str:
    """`loaded`, or the kind and text of the refusal."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            what()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def main(run_dir: Path) -> None:
    config = tiny_config(str(run_dir), train={"max_steps": 4, "warmup_steps": 2}, checkpoint={"every_steps": 2})
    engine = Engine(config)
    engine.prepare(OmniPretrainer.build(config, word_tokenizer()))
    Trainer(config, engine, run_dir, "hostile", 1000, [], lambda step: {}).run(functools.partial(batches, 0, 1))
    cases = run_dir.parent / "cases"
    while not cases.is_dir():
        time.sleep(0.01)
    for path in sorted(cases.iterdir()):
        ways = {
            "verify": lambda path=path: _verified(path),
            "resume": lambda path=path: checkpoint.load(engine, path, path.parent.parent),
            "state": lambda path=path: checkpoint.read_state(path),
            "weights": lambda path=path: list(open_weights(path).values()),
            "universal": lambda path=path: to_universal(path),
        }
        print(json.dumps({"case": path.name} | {name: outcome(what) for name, what in ways.items()}), flush=True)


def _verified(path: Path) -> None:
    reason = checkpoint.verify(path)
    if reason is not None:
        raise BadInput(reason)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)

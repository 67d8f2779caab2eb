"""Started by test_checkpoint.py on two ranks: each verifies its share of a run's checkpoints and prints what both say.

verifying_rank RUN_DIR       JSON on standard output: step taken, reasons of those passed over, files that it read
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pretrain.engine import prepare_environment

prepare_environment()

from pretrain.checkpoint import verification  # noqa: E402
from pretrain.engine import Engine  # noqa: E402
from tests.pretrain.tiny import tiny_config  # noqa: E402

if __name__ == "__main__":
    run_dir = Path(sys.argv[1])
    engine = Engine(tiny_config(str(run_dir)))
    read: list[str] = []
    hash_of = verification.sha256_of

    def noted(path: Path, *arguments: object) -> str:
        read.append(str(path.relative_to(run_dir / "checkpoints")))
        return hash_of(path, *arguments)

    verification.sha256_of = noted
    found, passed = verification.find_latest_together(engine, run_dir)
    print(json.dumps({"step": found and found.step, "passed": [bad.reason for bad in passed], "read": read}))
    sys.stdout.flush()
    os._exit(0)

"""What every test gets: a quiet environment without network, the `fast` marker by default, and the real sample data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before torch, transformers or huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WDS_SECURE", "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A loaded machine takes its time, and a failure must come back in the next run.
settings.register_profile("triptych", deadline=None, derandomize=True)
settings.load_profile("triptych")

# A shell that starts the suite in the background has it ignore Ctrl-C, and so would every program under test.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

KINDS = ("distributed", "slurm", "soak")
ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A cluster of its own, as root, is nothing to start unasked.
    unasked = config.getoption("markexpr").strip() in ("", "not soak")
    for item in items:
        if unasked and item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skip(reason="starts a Slurm cluster on this machine: make test-slurm"))
        if not any(item.get_closest_marker(kind) for kind in KINDS):
            item.add_marker(pytest.mark.fast)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real sample data sets; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("TRIPTYCH_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder}; set TRIPTYCH_DATA")
    return folder

"""The order in which a save reaches the disk, read from the system calls of the threads that write it.

A checkpoint may have its name only when everything in it would survive a power cut: each file is flushed after its last
write, each folder after its last entry, then comes the rename, then the flush of the folder that holds the name; the
hint and the removal of older ones come after that.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain import checkpoint
from tests.faults.test_save_killed import clean_save
from tests.faults.tracing import Call

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

FLUSHES = ("fsync", "fdatasync")
NAMES = ("rename", "renameat", "renameat2")
WRITES = ("write", "pwrite64")


def assert_order(calls: list[Call], run_dir: Path, step: int) -> None:
    """Check the calls of all ranks' threads, in the order of time, for one save."""
    parent, final = run_dir / "checkpoints", checkpoint.folder_of(run_dir, step)
    calls = [call for call in calls if call.result >= 0]
    (named,) = [i for i, call in enumerate(calls) if call.name in NAMES and call.paths[-1] == str(final)]
    work = Path(calls[named].paths[0])

    def last(names: tuple[str, ...], path: Path) -> int:
        return max(
            (i for i, call in enumerate(calls[:named]) if call.name in names and call.paths == (str(path),)), default=-1
        )

    files = [checkpoint.MANIFEST, *checkpoint.read_manifest(final)["files"]]
    for name in files:
        written, flushed = last(WRITES, work / name), last(FLUSHES, work / name)
        assert written >= 0, f"{name} was not seen being written"
        assert flushed > written, f"{name} is not flushed before the checkpoint has its name"
    folders = {work} | {(work / name).parent for name in files} | {(work / name).parent.parent for name in files}
    for folder in folders:
        if folder != work and work not in folder.parents:
            continue
        entries = [
            i
            for i, call in enumerate(calls[:named])
            if (call.creates or call.name.startswith("mkdir")) and Path(call.paths[0]).parent == folder
        ]
        assert entries and last(FLUSHES, folder) > max(entries), f"{folder} is not flushed after its last entry"
    manifest_opened = min(i for i, call in enumerate(calls) if call.paths == (str(work / checkpoint.MANIFEST),))
    for name in files[1:]:
        assert last(FLUSHES, work / name) < manifest_opened, f"the manifest is there before {name}"

    after = calls[named + 1 :]
    assert after[1].name in FLUSHES and after[1].paths == (str(parent),), (
        f"the name is not flushed at once: {after[:2]}"
    )
    gone = [i for i, call in enumerate(calls) if call.name in NAMES and ".old-" in call.paths[-1]]
    removed = [i for i, call in enumerate(calls) if call.name in ("unlink", "unlinkat", "rmdir") and call.result == 0]
    hint = [i for i, call in enumerate(calls) if call.name in NAMES and call.paths[-1] == str(parent / "latest")]
    assert gone and removed and hint
    assert named < min(hint) and named < min(gone) < min(removed), "something older goes before the new one is there"


@pytest.mark.parametrize("world_size", [1, 2])
def test_everything_is_on_the_disk_before_a_checkpoint_has_its_name(tmp_path: Path, world_size: int) -> None:
    logs = clean_save(tmp_path, world_size)
    assert_order(sorted((call for log in logs for call in log), key=lambda call: call.time), tmp_path / "run", 4)


def test_a_save_without_fsync_would_be_seen(tmp_path: Path) -> None:
    (calls,) = clean_save(tmp_path, mutation="no fsync")
    with pytest.raises(AssertionError, match="not flushed"):
        assert_order(calls, tmp_path / "run", 4)

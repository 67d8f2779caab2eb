"""The folder that a build writes: whose it is, who may write now, and what of it is complete.

build.json        first: what the dataset is made from, and the plan's hash
shards/ index/    a shard is complete when its index is there and the tar has the size that the index says
.build/           lock, plan, faults of finished shards; gone when the build succeeds
quarantine.jsonl  rows that were left out, if any
dataset.json      last
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.atomic import atomic_file
from data_pipelines.dataset import ShardEntry, index_path
from data_pipelines.errors import BadInput
from data_pipelines.index import MODALITIES, Quarantined, ShardIndex
from data_pipelines.plan import Fault

RECORD_VERSION = 1
_WORK = ".build"
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class BuildFolder:
    """One dataset folder while it is built. Nothing is created before `locked` is entered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan_file = path / _WORK / "plan.parquet"
        self.new_plan_file = path / _WORK / "plan-new.parquet"
        self._created = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._work_was_there = (path / _WORK).exists()
        self._is_claimed = False

    def is_finished(self) -> bool:
        """Whether dataset.json is there."""
        return (self.path / "dataset.json").exists()

    def begun_with(self) -> dict[tuple[str, str | None], str]:
        """(name, revision) on the Hugging Face Hub -> the commit that it stood for when the build here was begun."""
        try:
            source = json.loads((self.path / "build.json").read_bytes())["source"]
            sources = [source, *source.get("joined", [])]
            return {(each["dataset"], each["revision"]): each["commit"] for each in sources if "commit" in each}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # None is there, or it is damaged, which `refuse_other_plan` tells.
            return {}

    def refuse_other_content(self) -> None:
        """Raise `BadInput` when the path holds anything but a build of ours or nothing."""
        if not os.path.lexists(self.path):
            return
        if not self.path.is_dir():
            raise BadInput(f"{self.path}: not a folder; give another --out")
        found = sorted(entry.name for entry in self.path.iterdir() if entry.name != _WORK)
        if found and "build.json" not in found:
            what = "a dataset that was not built here" if "dataset.json" in found else f"other files ({found[0]}, ...)"
            raise BadInput(f"{self.path}: the folder holds {what}; give another --out")

    def refuse_other_plan(self, plan_sha256: str) -> None:
        """Raise `BadInput` unless build.json has this hash."""
        file = self.path / "build.json"
        try:
            recorded = json.loads(file.read_bytes())["plan_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{file}: damaged ({error}); delete the folder, or give another --out") from error
        if recorded != plan_sha256:
            what = "a dataset" if self.is_finished() else "an unfinished build"
            raise BadInput(
                f"{self.path}: holds {what} made of other rows, or with another name, split, seed, shard size or "
                "preparation; delete the folder, or give another --out"
            )

    @contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Create the folder and hold its lock; waits, saying so, while another process builds here."""
        work = self.path / _WORK
        while True:
            work.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                # Another build has just finished and removed its work folder.
                continue
            try:
                self._wait_for(lock, say)
                try:
                    is_current = os.path.samestat(os.fstat(lock), os.stat(work / "lock"))
                except FileNotFoundError:
                    is_current = False
                if is_current:
                    yield
                    return
            finally:
                os.close(lock)

    def _wait_for(self, lock: int, say: Callable[[str], None]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{self.path}: another process builds here; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks. Shards still appear whole, and with the same bytes from anyone.
            if error.errno not in _NO_LOCKS_HERE:
                raise

    def claim(self, plan_sha256: str, record: dict[str, Any]) -> None:
        """Write build.json, or raise `BadInput` when the one there is of another plan or of other libraries."""
        if (self.path / "build.json").exists():
            self.refuse_other_plan(plan_sha256)
            begun = json.loads((self.path / "build.json").read_bytes()).get("written_with", {})
            for library, version in record.get("written_with", {}).items():
                if begun.get(library) != version:
                    raise BadInput(
                        f"{self.path}: begun with {library} {begun.get(library)}, and here is {version}, which may "
                        "write other bytes; install that one, or delete the folder"
                    )
        else:
            content = {"format_version": RECORD_VERSION, "plan_sha256": plan_sha256, **record}
            with atomic_file(self.path / "build.json") as file:
                file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
        self._is_claimed = True

    def keep_plan(self) -> None:
        """Put the new plan, once it is known to be this build's, in the place of the one that jobs may be reading."""
        os.replace(self.new_plan_file, self.plan_file)

    def has_index(self, path: str) -> bool:
        """Whether a shard looks complete, by one look at a name."""
        return (self.path / index_path(path)).exists()

    def complete_shard(self, path: str) -> ShardEntry | None:
        """The entry for dataset.json of a shard that is whole, else None."""
        file = index_path(path)
        try:
            index = ShardIndex.load(self.path / file)
            size = (self.path / path).stat().st_size
        except (BadInput, OSError):
            return None
        if size != index.num_bytes:
            return None
        modalities = {name: index.count(name) for name in MODALITIES}
        return ShardEntry(
            path=path, num_samples=len(index), bytes=size, sha256=index.sha256, index=file, modalities=modalities
        )

    def remove_shard(self, shard: ShardEntry) -> None:
        """Take a shard away, its index first."""
        (self.path / shard.index).unlink(missing_ok=True)
        (self.path / shard.path).unlink(missing_ok=True)

    def faults_file(self, path: str) -> Path:
        """Where a shard's faults wait for the end of the build."""
        return self.path / _WORK / "faults" / f"{PurePosixPath(path).stem}.json"

    def read_faults(self) -> list[Fault]:
        """The faults of all finished shards."""
        files = sorted((self.path / _WORK / "faults").glob("*.json"))
        return [Fault(row, Quarantined(**line)) for file in files for row, line in json.loads(file.read_bytes())]

    def keep_faults(self, paths: Sequence[str], known: Sequence[Fault]) -> None:
        """Take back, from quarantine.jsonl, the faults of finished shards that are not made again, but for `known`."""
        try:
            lines = (self.path / "quarantine.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return
        planned = {fault.line for fault in known}
        by_shard: dict[str, list[Fault]] = {path: [] for path in paths}
        for line in (Quarantined(**json.loads(line)) for line in lines):
            if line.shard in by_shard and line not in planned:
                by_shard[line.shard].append(Fault.again(line))
        for path, faults in by_shard.items():
            if faults and not self.faults_file(path).exists():
                self.write_faults(self.faults_file(path), faults)

    @staticmethod
    def write_faults(file: Path, faults: Sequence[Fault]) -> None:
        """Write a shard's faults where `read_faults` finds them."""
        with atomic_file(file) as out:
            out.write(json.dumps([[fault.row, vars(fault.line)] for fault in faults]).encode())

    def write_quarantine(self, lines: Sequence[Quarantined]) -> None:
        """Write quarantine.jsonl, or none when there is nothing to say."""
        file = self.path / "quarantine.jsonl"
        if not lines:
            file.unlink(missing_ok=True)
            return
        with atomic_file(file) as out:
            for line in lines:
                out.write((json.dumps(vars(line), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))

    def remove_work(self) -> None:
        """Remove everything hidden, after a success. Call with the lock held."""
        self.remove_temporary()
        shutil.rmtree(self.path / _WORK, ignore_errors=True)

    def remove_half_written(self) -> None:
        """After a failure, keep complete shards and what goes with them; without any, leave nothing."""
        self.plan_file.unlink(missing_ok=True)
        self.new_plan_file.unlink(missing_ok=True)
        if self._is_claimed:
            self.remove_temporary()
            if any((self.path / "index").glob("*.arrow")) or self.is_finished():
                return
            for name in ("shards", "index"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / "build.json").unlink(missing_ok=True)
        if self._is_claimed or not self._work_was_there:
            shutil.rmtree(self.path / _WORK, ignore_errors=True)
        try:
            for folder in self._created:
                folder.rmdir()
        except OSError:
            # One that is not empty, and so all above it, stays.
            return

    def remove_temporary(self) -> None:
        """Remove half-written files. Call when nothing writes here."""
        for folder in (self.path, self.path / "shards", self.path / "index"):
            for file in folder.glob(".tmp-*"):
                file.unlink(missing_ok=True)

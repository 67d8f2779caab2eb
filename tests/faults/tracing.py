"""`strace` on a rank's checkpoint thread: what it did, in order, and faults at a chosen call. Skips where it may not.

Only that thread is attached, so that the k-th call of a kind is the same call in every run.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ranks import Rank

CALLS = (
    "openat write pwrite64 fsync fdatasync close mkdir mkdirat rename renameat renameat2 unlink unlinkat rmdir"
).split()
_LINE = re.compile(r"^(?:\d+ +)?(?P<time>\d+\.\d+) (?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_PATH = re.compile(r'"([^"]*)"')
_DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")


@dataclass(frozen=True)
class Call:
    """One finished system call."""

    time: float
    name: str
    paths: tuple[str, ...]
    """The paths of its arguments; that of its descriptor where it takes one."""
    creates: bool
    result: int


def ready(folder: Path, ranks: list[Rank], timeout: float = 120) -> list[int]:
    """Wait until every rank has its first checkpoint; the numbers of their checkpoint threads."""
    end = time.monotonic() + timeout
    files = [folder / f"ready-{rank}.json" for rank in range(len(ranks))]
    while not all(file.exists() for file in files):
        for one in ranks:
            assert one.process.exitcode is None, one.err.read_text()[-3000:]
        assert time.monotonic() < end, "the ranks did not come to their first checkpoint"
        time.sleep(0.01)
    return [json.loads(file.read_text())["thread"] for file in files]


@contextmanager
def attached(thread: int, *options: str, log: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """`strace` on one thread."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("strace is not installed")
    command = [program, "-ttt", "-y", "-s", "0", "-e", f"trace={','.join(CALLS)}", *options]
    command += ["-o", str(log or "/dev/null"), "-p", str(thread)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        if "attached" not in said:
            pytest.skip(f"strace cannot attach here: {said.strip()}")
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def calls_of(log: Path) -> list[Call]:
    """The calls in a log of `attached`, oldest first."""
    found = []
    for line in log.read_text().splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        arguments = match["arguments"]
        descriptor = _DESCRIPTOR.match(arguments)
        # A write shows its content in quotes, cut to nothing by `-s 0`.
        named = tuple(path for path in _PATH.findall(arguments) if path)
        paths = named or ((descriptor[1],) if descriptor else ())
        found.append(Call(float(match["time"]), match["call"], paths, "O_CREAT" in arguments, int(match["result"])))
    return found

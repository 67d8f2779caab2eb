"""The cache folder: never above its cap, nothing evicted that is read or needed sooner, one fetch for all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipelines.errors import BadInput
from data_pipelines.remote.cache import FileCache

pytestmark = pytest.mark.timeout(120)
NAMES = r"[a-i](\.arrow)?"


def content(name: str, size: int = 1000) -> bytes:
    return hashlib.sha256(name.encode()).digest() * (size // 32) + bytes(size % 32)


def fetcher(name: str, size: int = 1000, fetched: list[str] | None = None) -> Callable[[int], None]:
    def fetch(descriptor: int) -> None:
        if fetched is not None:
            fetched.append(name)
        os.pwrite(descriptor, content(name, size), 0)

    return fetch


def get(cache: FileCache, name: str, uses: dict[str, int] | None = None, size: int = 1000) -> None:
    with cache.obtain(name, size, fetcher(name, size), None if uses is None else lambda: uses) as file:
        assert os.pread(file.descriptor, size + 1, 0) == content(name, size)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


@contextmanager
def watched(folder: Path) -> Iterator[Callable[[], int]]:
    """Look at the folder all the time, as the cache itself does, and give the most bytes that were in it."""
    most, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.is_set():
            with (folder / ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                most = max(most, sum(path.stat().st_size for path in folder.iterdir()))
                # Closing alone would leave the lock to whatever was forked meanwhile.
                fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(0.002)

    folder.mkdir(parents=True, exist_ok=True)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> FileCache:
    """Room for three files of 1,000 bytes."""
    return FileCache(tmp_path / "cache", 3500, NAMES, keep=".arrow")


def test_without_a_known_order_the_least_recently_used_goes(cache: FileCache) -> None:
    for age, name in enumerate("abc"):
        get(cache, name)
        os.utime(cache.folder / name, (age, age))
    get(cache, "a")
    get(cache, "d")
    assert names(cache.folder) == {"a", "c", "d"}


def test_the_latest_next_use_goes_first_and_what_is_never_used_before_it(cache: FileCache) -> None:
    uses = {"a": 9, "b": 4, "c": 7, "d": 5, "e": 6}
    for name in "abc":
        get(cache, name)
    get(cache, "d", uses)
    assert names(cache.folder) == {"b", "c", "d"}
    get(cache, "e", {name: step for name, step in uses.items() if name != "b"})
    assert names(cache.folder) == {"c", "d", "e"}


def test_a_prefetch_evicts_nothing_that_is_needed_as_soon(cache: FileCache) -> None:
    uses = {"a": 1, "b": 2, "c": 3, "d": 3, "e": 2}
    for name in "abc":
        get(cache, name)
    assert not cache.prefetch("d", 1000, fetcher("d"), lambda: uses, 3)
    assert names(cache.folder) == {"a", "b", "c"}
    assert cache.prefetch("e", 1000, fetcher("e"), lambda: uses, 2)
    assert names(cache.folder) == {"a", "b", "e"}
    assert cache.prefetch("e", 1000, fetcher("e"), lambda: uses, 2)


def test_what_is_being_read_stays(cache: FileCache) -> None:
    with cache.obtain("a", 1000, fetcher("a")), cache.obtain("b", 1000, fetcher("b")):
        for name in "cdef":
            get(cache, name, {"a": 90, "b": 80})
        assert names(cache.folder) == {"a", "b", "f"}
        assert not cache.prefetch("g", 3000, fetcher("g", 3000), dict, 1)
        assert names(cache.folder) == {"a", "b", "f"}
    assert cache.prefetch("g", 3000, fetcher("g", 3000), dict, 1)
    assert names(cache.folder) == {"g"}


def test_what_is_kept_goes_last_and_a_file_that_cannot_fit_is_named(cache: FileCache) -> None:
    cache.obtain_small("i.arrow", lambda: content("i.arrow", 600)).close()
    get(cache, "a")
    get(cache, "b", size=2800)
    assert names(cache.folder) == {"i.arrow", "b"}
    get(cache, "c", size=3000)
    assert names(cache.folder) == {"c"}
    with pytest.raises(BadInput, match=r"data\.remote\.max_cache_gb: the cap of 3\.5e-06 GB"):
        get(cache, "d", size=3501)


def test_a_failure_leaves_its_part_to_be_gone_on_with_and_counted(cache: FileCache) -> None:
    def half(descriptor: int) -> None:
        os.pwrite(descriptor, content("a")[:500], 0)
        raise BadInput("cut")

    def rest(descriptor: int) -> None:
        assert os.fstat(descriptor).st_size == 500
        os.pwrite(descriptor, content("a")[500:], 500)

    with pytest.raises(BadInput, match="cut"):
        cache.obtain("a", 1000, half)
    assert names(cache.folder) == {".part-a-1000"}
    get(cache, "b", size=2600)
    assert names(cache.folder) == {"b"}, "a part counts with its whole size, and goes when room is needed"
    with pytest.raises(BadInput, match="cut"):
        cache.obtain("a", 1000, half)
    with cache.obtain("a", 1000, rest) as file:
        assert os.pread(file.descriptor, 1001, 0) == content("a")
    assert names(cache.folder) == {"a"}


@pytest.mark.timeout(30)
def test_a_refused_prefetch_does_not_keep_a_part_to_itself(cache: FileCache) -> None:
    """A part of an earlier run with a larger cap: it is said so, and no reader waits for ever."""
    (cache.folder / ".part-a-9000").write_bytes(bytes(10))
    for _ in range(2):
        with pytest.raises(BadInput, match="has no room for a file of 9e-06 GB"):
            cache.prefetch("a", 9000, fetcher("a"), dict, 1)
    with pytest.raises(BadInput, match="has no room for a file of 9e-06 GB"):
        get(cache, "a", size=9000)


def test_files_of_others_are_neither_counted_nor_removed(cache: FileCache) -> None:
    """A folder that is given as the cache may be somebody's home."""
    others = {"thesis.tex", "a.tar", ".part-thesis.tex-10"}
    for name in others:
        (cache.folder / name).write_bytes(bytes(3000))
    for name in "abcd":
        get(cache, name)
    assert names(cache.folder) == {"b", "c", "d"} | others


def test_a_disk_that_is_full_or_a_folder_that_is_not_ours_is_said_in_one_line(
    cache: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        os.pwrite(descriptor, content("a")[:500], 0)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BadInput, match=r"^data\.remote\.cache_dir: .*: No space left on device$"):
        cache.obtain("a", 1000, full)
    get(cache, "a")
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: write(descriptor, bytes(data)[:100], place))
    with cache.obtain_small("i.arrow", lambda: content("i.arrow", 600)) as file:
        assert os.pread(file.descriptor, 1000, 0) == content("i.arrow", 600), "a nearly full disk takes a part"
    (cache.folder / ".lock").unlink()
    (cache.folder / ".lock").mkdir()
    with pytest.raises(BadInput, match=r"^data\.remote\.cache_dir: .*: Is a directory$"):
        get(cache, "b")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"data\.remote\.cache_dir: .*Not a directory"):
        FileCache(tmp_path / "file" / "cache", 1000, NAMES, keep="")


def _churn(folder: Path, seed: int, log: Path) -> None:
    cache = FileCache(folder, 3500, NAMES, keep=".arrow")
    for turn in range(40):
        name = "abcdefgh"[(turn * (2 * seed + 1) + seed) % 8]

        def fetch(descriptor: int, name: str = name) -> None:
            with log.open("a") as file:
                file.write(name)
            os.pwrite(descriptor, content(name)[:700], 0)
            os.pwrite(descriptor, content(name)[700:], 700)

        with cache.obtain(name, 1000, fetch) as file:
            assert os.pread(file.descriptor, 1001, 0) == content(name)
            assert (folder / name).exists()


def test_processes_share_the_folder_and_its_cap(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_churn, args=(folder, seed, log)) for seed in range(3)]
    with watched(folder) as most:
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 2000 <= most() <= 3500
    assert not [name for name in names(folder) if name.startswith(".part-")]
    assert 8 <= len(log.read_text()) <= 120

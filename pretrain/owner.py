"""One writer: a run directory belongs to one run at a time.

`owner.json` names the process of rank 0 that holds it. It appears by a hard link, which one of several starters wins,
and whoever takes over from an owner that is gone first wins a link named after that owner, so that no two can succeed
it. On the same host an owner is gone when its process is; of one elsewhere only its heartbeat can be seen, which the
owner writes into the file and a newcomer watches by its own clock: clocks of two hosts are never compared.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipelines.atomic import fsync_folder
from data_pipelines.errors import BadInput, printable
from pretrain.heartbeat import FOLDER_VARIABLE

OWNER_FILE = "owner.json"
# The record keeps its length, so that a heartbeat is one write in place, into this owner's file and no other's.
_RECORD_BYTES = 1024
_SECONDS_TO_WRITE = 5.0
# Ranks without their launcher end within 5 seconds (pretrain.orphan), without a supervisor within 30 (launch.ranks).
_SECONDS_TO_END = 35.0


class OwnershipLost(BadInput):
    """Another run has taken the run directory over; this one must not write any more."""


@dataclass(frozen=True)
class Record:
    """What `owner.json` says."""

    host: str
    boot_id: str
    pid_namespace: int
    """With host and boot, whether another process can see the owner's at all."""
    pid: int
    started: int
    """Start of the process in clock ticks since the boot: process ids are used again, this is not."""
    ancestors: Sequence[int]
    """Its launcher and that one's supervisor, as far as there are; a rank without them saves and ends."""
    job_id: str | None
    job_start: int
    """Which start of its Slurm job it is; a requeued job has a higher one."""
    since: str
    token: str
    beat_seconds: float
    """How often the owner writes `heartbeat`."""
    heartbeat: float
    """The owner's clock, in seconds since 1970; others only see whether it moves."""

    def __str__(self) -> str:
        job = f", job {printable(self.job_id)}" if self.job_id else ""
        return f"host {printable(self.host)}, process {self.pid}{job}, since {printable(self.since)}"


class Owner:
    """The hold of this process on a run directory, from `take` to `give_back`."""

    def __init__(self, file: Path, record: Record, descriptor: int) -> None:
        self._file, self._record, self._descriptor = file, record, descriptor
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._beating.start()

    @classmethod
    def take(cls, run_dir: Path, stale_seconds: float, say: Callable[[str], None]) -> Owner:
        """Become the owner of a run directory, which is made where it is not there.

        Args:
            run_dir: the run directory.
            stale_seconds: an owner on another host is gone when its heartbeat stands still for this long.
            say: told in one line when the directory is taken over, and when that takes a wait.

        Raises:
            BadInput: another run owns it; the message says which and what to do.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        record = _this_process(max(0.1, stale_seconds / 6))
        candidate = run_dir / f".owner-{record.token}"
        descriptor = os.open(candidate, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _write(descriptor, record)
            _claim(run_dir, candidate, record, stale_seconds, say)
            fsync_folder(run_dir)
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            candidate.unlink(missing_ok=True)
        return cls(run_dir / OWNER_FILE, record, descriptor)

    def check(self) -> None:
        """Call before anything is committed to the run directory.

        Raises:
            OwnershipLost: another run has taken it over.
        """
        now = _read_patiently(self._file)
        if now is None or now.token != self._record.token:
            by = f"was taken over by another run ({now})" if now else f"lost its {OWNER_FILE}"
            raise OwnershipLost(f"{self._file.parent} {by}: this run stops without writing")

    def give_back(self) -> None:
        """Let the next run in at once. Harmless when the directory was lost."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._beating.join()
        os.close(self._descriptor)
        now = _read_patiently(self._file)
        if now is not None and now.token == self._record.token:
            self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(self._record.beat_seconds):
            try:
                _write(self._descriptor, replace(self._record, heartbeat=time.time()))
            except OSError:
                # The file, or the file system for a while, is gone: `check` tells which.
                continue


def read_owner(run_dir: Path) -> Record | None:
    """Who owns a run directory by its file, dead or alive; None where nobody does or the file is no record."""
    return _read_patiently(run_dir / OWNER_FILE)


def is_gone(owner: Record) -> bool | None:
    """Whether the owner's process has ended; None where that cannot be seen from here."""
    here = _this_process(1.0)
    if (owner.host, owner.boot_id, owner.pid_namespace) != (here.host, here.boot_id, here.pid_namespace):
        # The same name and another boot may be this host before, or another host that is called the same.
        return None
    return _started(owner.pid) != owner.started


def is_ending(owner: Record) -> bool:
    """Whether an owner on this host has lost what started it, so that it is about to save and end."""
    return _ancestors(owner.pid, len(owner.ancestors)) != list(owner.ancestors)


def _claim(run_dir: Path, candidate: Path, mine: Record, stale_seconds: float, say: Callable[[str], None]) -> None:
    """Make `candidate` the owner's file, or raise `BadInput`."""
    file = run_dir / OWNER_FILE
    while True:
        try:
            os.link(candidate, file)
            return
        except FileExistsError:
            pass
        before = _read_patiently(file)
        if before is None:
            if not file.exists():
                continue
            raise BadInput(f"{file} is no record of an owner; if no other run writes there, remove it")
        why = _why_gone(file, before, mine, stale_seconds, say)
        if why is None:
            if not file.exists():
                continue
            raise BadInput(
                f"{run_dir} belongs to a run that is going on ({before}): stop that one first, or use another run.dir"
            )
        heirs = _succeed(run_dir, candidate, before, mine, stale_seconds, say)
        now = _read(file)
        if now is None or now.token != before.token:
            # Somebody was faster, and has even ended its succession: look again.
            heirs[-1].unlink(missing_ok=True)
            continue
        os.replace(candidate, file)
        for heir in heirs:
            heir.unlink(missing_ok=True)
        say(f"took {run_dir} over from {before}: {why}")
        return


def _succeed(
    run_dir: Path, candidate: Path, before: Record, mine: Record, stale_seconds: float, say: Callable[[str], None]
) -> list[Path]:
    """Win the right to follow `before`, or to follow an heir that died before it took its place."""
    heirs: list[Path] = []
    gone = before
    while True:
        heir = run_dir / f".owner-after-{gone.token}"
        try:
            os.link(candidate, heir)
            return [*heirs, heir]
        except FileExistsError:
            pass
        other = _read_patiently(heir)
        if other is None:
            if not heir.exists():
                continue
            raise BadInput(f"{heir} is no record of an owner; if no other run writes there, remove it")
        if _why_gone(heir, other, mine, stale_seconds, say) is None:
            raise BadInput(
                f"{run_dir} is being taken over by another run ({other}): stop that one first, or use another run.dir"
            )
        heirs.append(heir)
        gone = other


def _why_gone(file: Path, owner: Record, mine: Record, stale_seconds: float, say: Callable[[str], None]) -> str | None:
    """Why the owner of a file counts as gone, or None where it does not."""
    gone = is_gone(owner)
    end = time.monotonic() + _SECONDS_TO_END
    while gone is False and is_ending(owner) and time.monotonic() < end:
        time.sleep(0.1)
        gone = is_gone(owner)
    if gone is not None:
        return "its process has ended" if gone else None
    if owner.job_id is not None and owner.job_id == mine.job_id and owner.job_start < mine.job_start:
        # Slurm starts a job again once it has given the old nodes up; what may still be alive there must not write,
        # and sees that before its next commit.
        return f"job {printable(owner.job_id)} was requeued"
    wait = max(stale_seconds, 3 * owner.beat_seconds)
    say(f"{file.parent} is owned by {owner}, which cannot be seen from here; watching its heartbeat for {wait:.0f} s")
    end = time.monotonic() + wait
    while time.monotonic() < end:
        time.sleep(min(1.0, owner.beat_seconds))
        now = _read_patiently(file)
        if now is None or now.token != owner.token or now.heartbeat != owner.heartbeat:
            return None
    return f"its heartbeat stood still for {wait:.0f} s"


def _this_process(beat_seconds: float) -> Record:
    pid = os.getpid()
    return Record(
        host=platform.node(),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid_namespace=os.stat("/proc/self/ns/pid").st_ino,
        pid=pid,
        started=_started(pid) or 0,
        ancestors=_ancestors(pid, 2 if FOLDER_VARIABLE in os.environ else 1),
        job_id=os.environ.get("SLURM_JOB_ID"),
        job_start=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        token=secrets.token_hex(8),
        beat_seconds=beat_seconds,
        heartbeat=time.time(),
    )


def _started(pid: int) -> int | None:
    """When a process of this host started, in ticks since the boot; None where it has ended."""
    fields = _stat(pid)
    return None if not fields or fields[0] in "ZX" else int(fields[19])


def _ancestors(pid: int, num: int) -> list[int]:
    """The parent of a process, that one's parent, and so on."""
    found: list[int] = []
    while len(found) < num and (fields := _stat(pid)):
        pid = int(fields[1])
        found.append(pid)
    return found


def _stat(pid: int) -> list[str]:
    """Of /proc/PID/stat what follows the name: state, parent and so on; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _write(descriptor: int, record: Record) -> None:
    data = json.dumps(asdict(record)).encode().ljust(_RECORD_BYTES - 1) + b"\n"
    if len(data) != _RECORD_BYTES:
        raise ValueError(f"an owner's record of {len(data)} bytes is too long")
    os.pwrite(descriptor, data, 0)
    os.fsync(descriptor)


def _read(file: Path) -> Record | None:
    try:
        record = Record(**json.loads(file.read_bytes()[: 2 * _RECORD_BYTES]))
    except (OSError, ValueError, TypeError):
        return None
    numbers = (
        record.pid,
        record.started,
        record.pid_namespace,
        record.job_start,
        record.heartbeat,
        record.beat_seconds,
    )
    numbers = (*numbers, *record.ancestors) if isinstance(record.ancestors, list) else (None,)
    return record if all(isinstance(number, (int, float)) for number in numbers) else None


def _read_patiently(file: Path) -> Record | None:
    """As `_read`, but gives a heartbeat that is just being written the time to arrive."""
    end = time.monotonic() + _SECONDS_TO_WRITE
    while True:
        record = _read(file)
        if record is not None or not file.exists() or time.monotonic() > end:
            return record
        time.sleep(0.05)

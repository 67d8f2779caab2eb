"""Everything that a run directory says about its run, read into one value.

A file that is not there yet, or does not parse, says nothing: status is asked for at any moment of a run's life, and of
runs whose disk is full or whose last line is torn.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput
from launch.processes import GONE, state
from pretrain.checkpoint.manifest import directories
from pretrain.config import Config, load_config
from pretrain.heartbeat import FOLDER_VARIABLE, Beat, read_beat
from pretrain.owner import OWNER_FILE, Record, is_gone, read_owner
from pretrain.stopping import STOP_FILE

JOBS_FILE = "job.json"
"""What `triptych submit` leaves: `{"jobs": [{"id", "name", "kind", "submitted", "script"}]}`."""
_MARKS = ("run.json", OWNER_FILE, JOBS_FILE, "checkpoints", "metrics.jsonl")
_FILES = ("config.yaml", *_MARKS, "checkpoints.jsonl", "logs", "eval")
_INCIDENT = re.compile(r"incident-\d{8}[T-]\d{6}-(?P<kind>[a-z_]+)-(?:step-)?\d+\.json")
ALIVE = "alive"
_NUMBERS = ("loss_not_finite", "gradient_not_finite", "loss_spike", "gradient_spike")


@dataclass(frozen=True)
class Incident:
    """One `incident-*.json`, as far as it is shown."""

    time: float
    kind: str
    step: int
    rank: int
    text: str
    """What happened, in one line."""
    done: str
    """What was done about it, in a word or two."""
    file: str

    @property
    def of_numbers(self) -> bool:
        """Whether a loss or gradient went wrong, and not a process."""
        return self.kind in _NUMBERS


@dataclass(frozen=True)
class RankBeat:
    """Where a rank of this host is, by its heartbeat."""

    rank: int
    phase: str
    step: int
    count: int
    """Beats so far: one that stands still does not count on."""
    process: str = ALIVE
    """What the system says of its process: alive, stopped, in an uninterruptible wait, gone."""


@dataclass(frozen=True)
class RunFiles:
    """A run directory at one moment."""

    path: Path
    config: Config | None
    run: dict[str, Any]
    owner: Record | None
    owner_gone: bool | None
    """Whether the owner's process has ended; None where that cannot be seen from here."""
    supervisor: list[dict[str, Any]]
    """Lines of logs/supervisor.jsonl, oldest first."""
    saves: list[dict[str, Any]]
    """Lines of checkpoints.jsonl, oldest first."""
    checkpoints: list[tuple[int, float]]
    """Step and time of each checkpoint that is there, oldest first."""
    jobs: list[dict[str, Any]]
    """What was submitted, as job.json says."""
    num_incidents: int
    incidents: list[Incident]
    """The newest ones, oldest first."""
    results: dict[str, Any] | None
    """The last evaluation."""
    stop_asked: bool
    """Whether a STOP file is there."""
    quarantined: int
    """Samples that could not be read."""
    unreadable: list[str] = field(default_factory=list)
    """Files that are there and may not be read."""
    beats: list[RankBeat] = field(default_factory=list)
    """Of the ranks of this host, where they can be seen."""

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.config.run.name if self.config is not None else self.path.name

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Every start of the ranks, oldest first: `time, step, host, device, after`."""
        return [start for start in self.run.get("starts", []) if isinstance(start, dict)]

    @property
    def job_ids(self) -> list[str]:
        """Slurm's numbers of the jobs of this run, oldest first."""
        found = [str(job.get("id", "")) for job in self.jobs]
        found += [str(line["job_id"]) for line in self.supervisor if line.get("job_id")]
        if self.owner is not None and self.owner.job_id:
            found.append(self.owner.job_id)
        return list(dict.fromkeys(each for each in found if each))

    @property
    def training_job_ids(self) -> list[str]:
        """The same, without the jobs that build, evaluate or export."""
        others = {str(job.get("id")) for job in self.jobs if job.get("kind") not in (None, "pretrain")}
        return [each for each in self.job_ids if each not in others]

    def supervisor_is_alive(self) -> bool | None:
        """Whether the supervisor of the last line is there; None where that cannot be seen from here."""
        if not self.supervisor or self.supervisor[-1].get("host") != os.uname().nodename:
            return None
        pid = self.supervisor[-1].get("pid")
        return isinstance(pid, int) and state(pid) != GONE

    def supervisor_sees_to_it(self) -> bool:
        """Whether the owner is gone from this host and its supervisor has not ended yet."""
        above = self.owner.ancestors if self.owner is not None and self.owner_gone else ()
        return len(above) > 1 and state(above[-1]) != GONE


def looks_like_a_run(folder: Path) -> bool:
    """Whether a folder is a run directory, of a run that has begun or of one that is to begin."""
    return (
        (folder / "config.yaml").is_file()
        and any((folder / name).exists() for name in _MARKS)
        or ((folder / JOBS_FILE).is_file() or (folder / OWNER_FILE).is_file())
    )


def read_run(path: Path, num_incidents: int = 12) -> RunFiles:
    """Read a run directory; of its incidents the newest `num_incidents`.

    Raises:
        BadInput: there is no such folder, or it is no run directory.
    """
    if not path.is_dir():
        raise BadInput(f"{path}: no such run directory")
    if not os.access(path, os.R_OK | os.X_OK):
        raise BadInput(f"{path}: may not be read by this user")
    if not looks_like_a_run(path):
        raise BadInput(f"{path}: not a run directory (no config.yaml with run.json or checkpoints/ beside it)")
    unreadable = [name for name in _FILES if (path / name).exists() and not os.access(path / name, os.R_OK)]
    owner = read_owner(path) if OWNER_FILE not in unreadable else None
    found = _incident_files(path)
    jobs = [job for job in _object(path / JOBS_FILE).get("jobs", []) if isinstance(job, dict)]
    return RunFiles(
        path=path,
        config=_config(path, jobs),
        run=_object(path / "run.json"),
        owner=owner,
        owner_gone=is_gone(owner) if owner is not None else None,
        supervisor=list(_lines(path / "logs" / "supervisor.jsonl")),
        saves=list(_lines(path / "checkpoints.jsonl")),
        checkpoints=[(step, _written(folder)) for step, folder in directories(path)],
        jobs=jobs,
        num_incidents=len(found),
        incidents=sorted(filter(None, map(_incident, found[-num_incidents:])), key=lambda each: each.time),
        results=_object(path / "eval" / "results.json") or None,
        stop_asked=(path / STOP_FILE).exists(),
        quarantined=_count_lines(path / "quarantine.jsonl"),
        unreadable=unreadable,
        beats=_beats(owner),
    )


def evaluations(path: Path) -> list[dict[str, Any]]:
    """The results of every evaluation of a run, by step."""
    found = [_object(file) for file in sorted((path / "eval").glob("step-*.json"))]
    return [each for each in found if isinstance(each.get("step"), int) and isinstance(each.get("zero_shot"), dict)]


def runs_below(folder: Path, depth: int = 3) -> list[Path]:
    """Run directories in a folder and below it, those that were written to last first."""
    found: list[tuple[float, Path]] = []
    level = [folder]
    for _ in range(depth + 1):
        below: list[Path] = []
        for each in level:
            try:
                if looks_like_a_run(each):
                    found.append((_last_written(each), each))
                else:
                    below += [entry for entry in sorted(each.iterdir()) if _may_hold_runs(entry)]
            except OSError:
                # Not ours to look into.
                continue
        level = below
    return [path for _, path in sorted(found, key=lambda each: -each[0])]


def _may_hold_runs(entry: Path) -> bool:
    return not entry.name.startswith(".") and not entry.is_symlink() and entry.is_dir()


def _last_written(path: Path) -> float:
    return max((_modified(path / name) for name in ("metrics.jsonl", "run.json", OWNER_FILE, JOBS_FILE)), default=0.0)


def _config(path: Path, jobs: Sequence[dict[str, Any]]) -> Config | None:
    """The run's own, or before it has begun the one that was submitted, which lies beside the job's script."""
    scripts = [Path(job["script"]) for job in reversed(jobs) if isinstance(job.get("script"), str)]
    for file in (path / "config.yaml", *(script.with_name("config.yaml") for script in scripts[:1])):
        if file.is_file():
            return _config_of(file, _modified(file))
    return None


@functools.lru_cache(maxsize=64)
def _config_of(file: Path, modified: float) -> Config | None:
    """Of another version's run the settings may be others, and status goes on without them."""
    try:
        return load_config(file)
    except BadInput:
        return None


def _incident_files(path: Path) -> list[Path]:
    """Newest last, by their own clock in the file system: the two kinds of names do not sort together."""
    try:
        with os.scandir(path) as entries:
            files = [(entry.stat().st_mtime, entry.path) for entry in entries if _INCIDENT.fullmatch(entry.name)]
    except OSError:
        return []
    return [Path(file) for _, file in sorted(files)]


def _incident(file: Path) -> Incident | None:
    return _incident_of(file, _modified(file))


@functools.lru_cache(maxsize=4096)
def _incident_of(file: Path, modified: float) -> Incident | None:
    raw = _object(file)
    try:
        text = str(raw.get("reason") or raw.get("what") or raw["kind"])
        status = raw.get("status")
        done = {"log": "trained", "skip": "skipped", "roll_back": "rolled back", "stop": "stopped"}.get(
            str(raw.get("action")), f"ended with {status}" if status is not None else ""
        )
        return Incident(float(raw["time"]), str(raw["kind"]), int(raw["step"]), int(raw["rank"]), text, done, file.name)
    except (KeyError, TypeError, ValueError):
        return None


def _beats(owner: Record | None) -> list[RankBeat]:
    """The heartbeats of the ranks beside the owner; the supervisor keeps them in a folder that only it names."""
    if owner is None or is_gone(owner) is not False:
        return []
    try:
        words = Path(f"/proc/{owner.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
    prefix = f"{FOLDER_VARIABLE}=".encode()
    folder = next((Path(os.fsdecode(word[len(prefix) :])) for word in words if word.startswith(prefix)), None)
    if folder is None:
        return []
    ranks = sorted(int(file.name[5:]) for file in folder.glob("rank-?????") if file.name[5:].isdigit())
    beats: list[tuple[int, Beat | None]] = [(rank, read_beat(folder, rank)) for rank in ranks]
    return [
        RankBeat(rank, beat.phase, beat.step, beat.count + beat.ticks, state(beat.pid))
        for rank, beat in beats
        if beat is not None
    ]


def _written(checkpoint: Path) -> float:
    return _modified(checkpoint / "MANIFEST.json") or _modified(checkpoint)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _count_lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return 0


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def ago(moment: float | None, now: float | None = None) -> str:
    """`3 min ago`; empty without a moment."""
    return "" if moment is None or moment <= 0 else f"{span((now or time.time()) - moment)} ago"


def span(seconds: float) -> str:
    """A time in the two largest units that say something: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"

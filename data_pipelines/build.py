"""Raw samples in, a dataset folder out: plan, shards, and dataset.json last.

A build may be stopped or killed at any moment; the same call goes on from the shards that are complete, and gives the
same bytes as one that was never stopped, for any number of workers. While it runs, and until it succeeds, the folder
holds a hidden `.build/` with the lock, the plan, and the faults of finished shards. `build.json` stays: it says what
the dataset was made from.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines import build_array
from data_pipelines.build_folder import BuildFolder
from data_pipelines.config import BuildConfig, PrepareConfig
from data_pipelines.dataset import ShardEntry, commit_shard, open_dataset, write_dataset
from data_pipelines.engines import local
from data_pipelines.engines.slurm import SlurmOptions
from data_pipelines.errors import BadInput, check_utf8
from data_pipelines.plan import Fault, Plan, describe_dropped, make_plan, read_rows
from data_pipelines.progress import Progress, counted
from data_pipelines.reencode import library_versions
from data_pipelines.shard import Sample
from data_pipelines.sources import RowFault, Source, open_source
from data_pipelines.sources.choose import open_joined
from data_pipelines.sources.prepared import PreparedSource

# A worker takes about a second to start.
_ROWS_WORTH_A_WORKER = 1000
_NAME = re.compile(r"[^\W_][\w.-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class ShardTask:
    """What `build_shard` needs: `path` within `folder`, and where the plan has the shard's rows."""

    folder: Path
    path: str
    number: int
    plan_file: Path
    faults_file: Path

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class ShardBuilder:
    """`build_shard` for one source: what the workers are sent."""

    source: Source
    skip_faults: bool

    def __call__(self, task: ShardTask, tick: local.Tick) -> ShardEntry:
        """Build one shard of the plan. Raises `BadInput` for a bad row."""
        try:
            return build_shard(self.source, task, self.skip_faults, tick)
        except RowFault as fault:
            raise fault.as_bad_input(self.source.label) from fault


def build_shard(source: Source, task: ShardTask, skip_faults: bool, tick: local.Tick) -> ShardEntry:
    """Write one shard and its index. The bytes depend on the plan's rows and the files they name, and on nothing else.

    Raises `RowFault` for the first row that gives no sample; with `skip_faults` it is left out and noted in the task's
    `faults_file`. `tick` is called with 1 for each row.
    """
    faults: list[Fault] = []

    def samples() -> Iterator[Sample]:
        for row in read_rows(task.plan_file, task.number):
            try:
                yield source.read(row)
            except RowFault as fault:
                if not skip_faults:
                    raise
                faults.append(Fault.of(fault, task.path))
            tick(1)
        # Before the index, which makes the shard count as done: a build that goes on later must find the faults too.
        if faults:
            BuildFolder.write_faults(task.faults_file, faults)

    return commit_shard(samples(), task.folder, task.path)


def build_dataset(
    source: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    columns: Mapping[str, str] | None = None,
    allow: Sequence[str | Path] = (),
    on_error: str = "fail",
    name: str | None = None,
    seed: int = 0,
    progress: bool = True,
    slurm: SlurmOptions | None = None,
    join: Sequence[str | Path] = (),
    join_columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    prefix_keys: bool = False,
    prepare: PrepareConfig | None = None,
) -> Path:
    """Build a dataset folder and return its path. Where the same build is done already, do nothing.

    Args:
        source: a manifest (.csv, .jsonl, .parquet), a folder of files that share stems, tars (a file, a brace list, a
            folder), `hf:` and a Hugging Face dataset, or the name of an embedded source (`digits`).
        out: the folder to write: new, empty, or holding the same build, finished or not.
        split: keep a manifest's rows with this in `split`, or this split of a Hugging Face dataset.
        shard_size: samples a shard.
        workers: processes; by default one a core, fewer for little work. The bytes do not depend on it.
        columns: our name -> the manifest's column, for `id`, `image`, `text`, `audio`, `split` and metadata.
        allow: folders, beside the manifest's own, that its files may lie in.
        on_error: `fail` ends at the first bad row, `skip` writes bad rows to `quarantine.jsonl`.
        name: the dataset's name, and the beginning of its shards' names.
        seed: of embedded sources, which draw at random.
        progress: tell on standard error how far the build is.
        slurm: build on a Slurm cluster, and not in processes of this machine. Any part of the build may have been done
            by the other engine. Without `slurm.wait` the dataset is not there yet when this returns.
        join: further sources, which add what they have for the keys of the first.
        join_columns: as `columns`, for joined sources.
        streaming: read a Hugging Face dataset as a stream.
        prefix_keys: put the tar's name before each key, for tars that repeat theirs.
        prepare: what is left out, cleaned and written anew.

    Raises:
        BadInput: source, options, a row (`on_error="fail"`) or the folder is wrong. Complete shards are kept.

    Two calls for one folder at the same time are safe: the second waits, and finds the first one's dataset.
    """
    if shard_size < 1:
        raise BadInput(f"shard size {shard_size}: give 1 or more")
    if workers is not None and workers < 1:
        raise BadInput(f"workers {workers}: give 1 or more")
    if on_error not in ("fail", "skip"):
        raise BadInput(f"on-error {on_error!r}: give fail or skip")
    if name is not None and not _NAME.fullmatch(name):
        raise BadInput(f"name {name!r}: give up to 64 letters, digits, '-', '_' and '.', a letter or digit first")
    allowed = tuple(_allowed_folder(folder) for folder in allow)
    if slurm is not None:
        slurm.check()
    out, prepare = Path(out), prepare or PrepareConfig()
    try:
        folder = BuildFolder(out)
        commits = folder.begun_with()
        opened = open_source(
            str(source),
            split=split,
            columns=dict(columns or {}),
            allowed=allowed,
            seed=seed,
            streaming=streaming,
            prefix_keys=prefix_keys,
            commits=commits,
            out=out,
        )
        others = [str(other) for other in join]
        opened = open_joined(
            opened, others, columns=dict(join_columns or {}), allowed=allowed, commits=commits, out=out
        )
        if prepare != PrepareConfig():
            opened = PreparedSource(opened, prepare)
        build = _Build(opened, name, shard_size, on_error == "skip", workers, prepare.reencoded, slurm)
        check_utf8(
            str(out.resolve()),
            opened.label,
            name or opened.default_name,
            json.dumps(opened.identity(), ensure_ascii=False),
        )
        with Progress(f"building {out}", "samples", quiet=not progress) as shown:
            build.into(folder, shown)
    except OSError as error:
        if error.errno is None:
            raise
        raise BadInput(f"{error.filename or out}: {error.strerror}; complete shards are kept") from error
    return out


def build_configured(wanted: BuildConfig, slurm: SlurmOptions | None = None) -> Path:
    """`build_dataset` for one entry of a config's `data.build`."""
    return build_dataset(**{name: getattr(wanted, name) for name in type(wanted).model_fields}, slurm=slurm)


def _allowed_folder(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise BadInput(f"--allow {folder}: not a folder")
    return Path(folder).resolve()


@dataclass(frozen=True)
class _Build:
    source: Source
    name: str | None
    shard_size: int
    skip_faults: bool
    workers: int | None
    reencoded: dict[str, Any]
    slurm: SlurmOptions | None = None

    def into(self, folder: BuildFolder, progress: Progress) -> None:
        folder.refuse_other_content()
        if folder.is_finished():
            # A look alone, which needs neither the lock nor the right to write.
            plan = self._plan(folder, None, progress.quiet)
            if self._is_done(folder, plan, progress):
                return
        with folder.locked(progress.say):
            folder.refuse_other_content()
            jobs = build_array.active_jobs(folder)
            if jobs and self.slurm is None:
                raise BadInput(
                    f"{folder.path}: Slurm's jobs {' '.join(jobs)} build here; wait for them with --engine slurm, "
                    "or cancel them"
                )
            try:
                plan = self._plan(folder, folder.new_plan_file, progress.quiet)
                if not jobs and folder.is_finished():
                    if self._is_done(folder, plan, progress):
                        folder.remove_work()
                        return
                    progress.say(f"{folder.path}: shards are missing or damaged; making them again")
                folder.claim(plan.sha256, self._record(plan))
                folder.keep_plan()
                _say_plan(folder.path, plan, progress)
                if self.slurm is None:
                    self._make_shards(folder, plan, progress)
                    return
                if jobs:
                    if self.slurm.plan_only:
                        raise BadInput(f"{folder.path}: Slurm's jobs {' '.join(jobs)} build here; wait for them")
                    progress.say(f"{folder.path}: Slurm's jobs {' '.join(jobs)} are at work here already")
                    if self.slurm.dry_run:
                        return
                elif not self._submit(folder, plan, self.slurm, progress):
                    return
            except BaseException:
                if not jobs:
                    folder.remove_half_written()
                raise
        build_array.follow(
            folder, plan, functools.partial(finish_build, self, plan, folder.path), self.slurm.wait, progress
        )

    def _plan(self, folder: BuildFolder, file: Path | None, quiet: bool) -> Plan:
        prefix = re.sub(r"[^\w-]+", "-", self.name or self.source.shard_prefix, flags=re.ASCII).strip("-")
        with Progress(f"planning {folder.path}", "rows", quiet=quiet) as shown:
            shown.start(0)
            return make_plan(
                self.source,
                name=self._dataset_name,
                prefix=prefix or "shard",
                shard_size=self.shard_size,
                skip_faults=self.skip_faults,
                file=file,
                settings=self._settings,
                tick=shown.advance,
            )

    @property
    def _settings(self) -> dict[str, Any]:
        identity = self.source.identity()
        parts = [identity, *identity.get("joined", [])]
        # Their rows are references by number, which say nothing of where an image comes from.
        names = ("dataset", "config", "revision", "split", "columns")
        numbered = [{name: part[name] for name in names} for part in parts if part["kind"] == "huggingface"]
        return {**self.reencoded, **({"numbered": numbered} if numbered else {})}

    @property
    def _dataset_name(self) -> str:
        return self.name or self.source.default_name

    def _record(self, plan: Plan) -> dict[str, Any]:
        sizes = {"num_rows": plan.num_rows, "num_shards": len(plan.shard_sizes), "shard_size": self.shard_size}
        record = {"name": self._dataset_name, "source": self.source.identity(), **sizes}
        if plan.dropped or plan.changed:
            record |= {"dropped": plan.dropped, "changed": plan.changed}
        if self.reencoded:
            record |= {"reencoded": self.reencoded, "written_with": library_versions()}
        return record

    def _is_done(self, folder: BuildFolder, plan: Plan, progress: Progress) -> bool:
        """Whether the finished build there is this one, and whole. Raises `BadInput` when it is another one."""
        folder.refuse_other_plan(plan.sha256)
        dataset = open_dataset(folder.path)
        if any(folder.complete_shard(shard.path) != shard for shard in dataset.shards):
            return False
        progress.say(f"{folder.path}: already built ({len(dataset)} samples, {len(dataset.shards)} shards)")
        return True

    def _left(
        self, folder: BuildFolder, plan: Plan, progress: Progress
    ) -> tuple[dict[str, ShardEntry], list[ShardTask]]:
        """The shards that are complete, by path, and the tasks that are left."""
        entries: dict[str, ShardEntry] = {}
        tasks: list[ShardTask] = []
        for number, path in enumerate(plan.shard_paths):
            entry = folder.complete_shard(path)
            if entry is not None:
                entries[path] = entry
            else:
                faults_file = folder.faults_file(path)
                faults_file.unlink(missing_ok=True)
                tasks.append(ShardTask(folder.path, path, number, folder.plan_file, faults_file))
        folder.keep_faults(list(entries), plan.faults)
        if entries:
            progress.say(f"{folder.path}: {len(entries)} of {len(plan.shard_sizes)} shards are there already")
        return entries, tasks

    def _submit(self, folder: BuildFolder, plan: Plan, options: SlurmOptions, progress: Progress) -> bool:
        """Submit what is left. False when there is nothing to follow: all is done, or it was a dry run."""
        entries, tasks = self._left(BuildFolder(folder.path.resolve()), plan, progress)
        if not tasks:
            self._finish(folder, plan, entries, progress)
            return False
        builder = ShardBuilder(self.source, self.skip_faults)
        finish = functools.partial(_finish_after_array, self, plan, folder.path.resolve())
        build_array.submit(folder, builder, tasks, finish, options, self._dataset_name, progress)
        return not options.dry_run

    def _make_shards(self, folder: BuildFolder, plan: Plan, progress: Progress) -> None:
        entries, tasks = self._left(folder, plan, progress)
        num_left = sum(plan.shard_sizes[task.number] for task in tasks)
        progress.start(plan.num_rows, plan.num_rows - num_left)
        builder = ShardBuilder(self.source, self.skip_faults)
        workers = self.workers or min(local.num_cores(), 1 + num_left // _ROWS_WORTH_A_WORKER)
        try:
            for task, entry in local.run(builder, tasks, workers, progress.advance):
                entries[task.path] = entry
        except local.WorkerDied as error:
            raise BadInput(f"{folder.path}: {error}; run it again: complete shards are kept") from error
        self._finish(folder, plan, entries, progress)

    def _finish(self, folder: BuildFolder, plan: Plan, entries: dict[str, ShardEntry], progress: Progress) -> None:
        shards = [entries[path] for path in plan.shard_paths]
        faults = sorted([*plan.faults, *folder.read_faults()], key=lambda fault: fault.row)
        kept = [shard for shard in shards if shard.num_samples]
        for shard in shards:
            if not shard.num_samples:
                folder.remove_shard(shard)
        if not kept:
            raise BadInput(f"{self.source.label}: no row gives a sample; the first: {faults[0].line.detail}")
        folder.write_quarantine([fault.line for fault in faults])
        present = {name for shard in kept for name, count in shard.modalities.items() if count}
        write_dataset(folder.path, self._dataset_name, kept, [name for name in self.reencoded if name in present])
        folder.remove_work()
        _say_result(folder.path, progress)


def finish_build(build: _Build, plan: Plan, path: Path, progress: Progress) -> list[str]:
    """End a build that others did the work of, unless it is ended; returns the paths of shards that are missing."""
    folder = BuildFolder(path)
    with folder.locked(progress.say):
        if not folder.plan_file.exists():
            folder.remove_work()
            _say_result(folder.path, progress)
            return []
        found = {path: folder.complete_shard(path) for path in plan.shard_paths}
        entries = {path: entry for path, entry in found.items() if entry is not None}
        if len(entries) == len(found):
            build._finish(folder, plan, entries, progress)
    return [path for path in found if path not in entries]


def _finish_after_array(build: _Build, plan: Plan, path: Path) -> str | None:
    with Progress("", "", quiet=True) as quiet:
        missing = finish_build(build, plan, path, quiet)
    return f"{path}: {len(missing)} shards are not built ({missing[0]}, ...)" if missing else None


def _say_plan(path: Path, plan: Plan, progress: Progress) -> None:
    for note in plan.notes:
        progress.say(f"note: {note}")
    if plan.dropped:
        progress.say(f"{path}: {describe_dropped(plan.dropped)}")
    if plan.changed:
        progress.say(f"{path}: {plan.changed['text']} texts cleaned")


def _say_result(path: Path, progress: Progress) -> None:
    dataset = open_dataset(path)
    quarantine = path / "quarantine.jsonl"
    num_bad = len(quarantine.read_bytes().splitlines()) if quarantine.is_file() else 0
    bad_rows = "1 bad row is" if num_bad == 1 else f"{num_bad} bad rows are"
    left_out = f"; {bad_rows} in {quarantine}" if num_bad else ""
    progress.say(f"{path}: {counted(len(dataset), 'sample')} in {counted(len(dataset.shards), 'shard')}{left_out}")

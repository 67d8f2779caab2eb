"""The ledger says what a run consumed over any number of restarts, and finds what was consumed twice or never."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.dataset import open_dataset
from data_pipelines.errors import BadInput
from data_pipelines.progress import Progress
from pretrain import consumption
from pretrain.consumption import MISSING, OTHERS, PASSED_OVER, DataPlans, Proof, check_batches, prove
from pretrain.cursor import Cursor
from pretrain.ledger import (
    CHECKSUM_MODULUS,
    EVENTS,
    FOLDER,
    RECORD,
    STEPS,
    Ledger,
    LedgerWriter,
    Outcome,
    id_checksums,
)
from tests.pretrain.ledger_runs import BATCH, Run, text_datasets


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of texts, `a` of 37 samples in three shards and `b` of 21 in one."""
    folder = tmp_path_factory.mktemp("data")
    text_datasets(folder)
    return folder


def proof_of(run_dir: Path) -> Proof:
    ledger = Ledger.read(run_dir)
    with Progress("ledger", "batches", quiet=True) as progress:
        return prove(ledger, DataPlans(ledger), progress)


def effective(run_dir: Path) -> list[tuple[int, int, Outcome]]:
    found = Ledger.read(run_dir).effective
    return [(int(one["step"]), int(one["batch"]), Outcome(int(one["outcome"]))) for one in found]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["steps", "save", "kill", "roll back"]), st.integers(1, 9)), max_size=14))
def test_any_number_of_restarts_and_roll_backs_is_exactly_once(
    home: Path, tmp_path_factory: pytest.TempPathFactory, story: list[tuple[str, int]]
) -> None:
    run = Run(tmp_path_factory.mktemp("run"), [open_dataset(home / "a")])
    run.start()
    saved = [run.checkpoint()]
    for what, count in [*story, ("steps", 1)]:
        if what == "steps":
            run.steps(count)
        elif what == "save":
            saved.append(run.checkpoint())
        elif what == "kill":
            # Sometimes the newest checkpoint is damaged, and an older one is gone on from.
            saved = saved[: max(1, len(saved) - (count % 3 == 0))]
            run.start(saved[-1])
        elif run.step > saved[-1]["step"]:
            guilty = range(max(saved[-1]["batch"], run.cursor.batch - 1 - count % 2), run.cursor.batch + count % 2)
            run.roll_back(saved[-1], guilty)
    assert effective(run.run_dir) == run.done
    proof = proof_of(run.run_dir)
    assert proof.exact and not proof.repeated and not proof.mismatched
    assert len(proof.unseen) == BATCH * sum(outcome == Outcome.PASSED_OVER for _, _, outcome in run.done)
    assert proof.num_samples == BATCH * sum(outcome != Outcome.PASSED_OVER for _, _, outcome in run.done)


def test_a_step_lists_its_samples_where_they_lie(home: Path, tmp_path: Path) -> None:
    dataset = open_dataset(home / "a")
    run = Run(tmp_path, [dataset])
    run.start()
    run.steps(7)
    ledger = Ledger.read(tmp_path)
    plans = DataPlans(ledger)
    (checked,) = check_batches(plans, ledger.of_step(5)[0])
    assert checked.agrees.tolist() == [True]
    samples = plans.locate(1, checked.picked)
    expected = run.sequence.batch(4)
    assert [(each.id, each.epoch) for each in samples] == list(
        zip(expected.sample.tolist(), expected.epoch.tolist(), strict=True)
    )
    assert {each.epoch for each in samples} == {0, 1}
    for each in samples:
        assert each.key == f"a-{each.id:02d}" and each.dataset == str(home / "a")
        with (home / "a" / each.shard).open("rb") as file:
            file.seek(each.offset)
            assert file.read(len(f"a {each.id}")) == f"a {each.id}".encode()


@pytest.mark.parametrize("tail", ["wrap", "drop"])
def test_epochs_and_their_tails(home: Path, tmp_path: Path, tail: str) -> None:
    run = Run(tmp_path, [open_dataset(home / "a")], tail=tail)
    run.start()
    run.steps(30)
    proof = proof_of(tmp_path)
    assert proof.exact and not proof.unseen and proof.num_samples == 30 * BATCH


def test_a_mixture_that_changes_and_grows_stays_exact(home: Path, tmp_path: Path) -> None:
    a, b = open_dataset(home / "a"), open_dataset(home / "b")
    run = Run(tmp_path, [a])
    run.start()
    run.steps(9)
    saved = run.checkpoint()
    run.steps(4)
    run.sources, run.weights = [a, b], [2.0, 1.0]
    run.start(saved, change=True)
    run.steps(20)
    later = run.checkpoint()
    run.weights = [1.0, 3.0]
    run.start(later, change=True)
    # On into the second change, which comes with the end of a block of 4,096 samples.
    run.steps(550)
    proof = proof_of(tmp_path)
    assert proof.exact and not proof.unseen and proof.num_batches == 579
    plans = DataPlans(Ledger.read(tmp_path))
    (last,) = check_batches(plans, Ledger.read(tmp_path).of_step(579)[0])
    assert set(last.picked.source.tolist()) == {0, 1}
    keys = [each.key for each in plans.locate(3, last.picked)]
    assert {key[0] for key in keys} == {"a", "b"}


@pytest.mark.parametrize("steps", [3, 12], ids=["in the epoch under way", "in an epoch that is whole"])
@pytest.mark.parametrize("at_once", [BATCH, 1 << 18])
def test_what_was_consumed_twice_is_found(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, at_once: int
) -> None:
    monkeypatch.setattr(consumption, "_CHUNK_SAMPLES", at_once)
    run = Run(tmp_path, [open_dataset(home / "a")])
    run.start()
    run.steps(steps)
    run.cursor.batch = 1
    run.steps(1)
    proof = proof_of(tmp_path)
    assert not proof.exact and len(proof.repeated) == BATCH
    assert {(each.step, each.batch) for each in proof.repeated} == {(steps + 1, 1)}
    expected = {f"a-{number:02d}" for number in run.sequence.batch(1).sample.tolist()}
    assert {each.sample.key for each in proof.repeated} == expected


def test_what_was_never_consumed_is_found(home: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, [open_dataset(home / "a")])
    run.start()
    run.steps(3)
    run.cursor.batch = 4
    run.steps(2)
    proof = proof_of(tmp_path)
    assert not proof.exact and not proof.repeated
    expected = {f"a-{number:02d}" for number in run.sequence.batch(3).sample.tolist()}
    assert {(each.sample.key, each.batch, each.why) for each in proof.unseen} == {(key, 3, MISSING) for key in expected}


def test_what_differs_from_the_plan_is_found(home: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, [open_dataset(home / "a")])
    run.start()
    run.steps(2)
    # The ranks dealt wrongly: one has another's share.
    wrong = run.sequence.batch(2).index.copy()
    wrong[:4] = wrong[4:]
    run.writer.add(3, 2, int(id_checksums(wrong)), Outcome.TRAINED)
    proof = proof_of(tmp_path)
    assert proof.mismatched == [(3, 2)] and not proof.exact
    assert {each.why for each in proof.unseen} == {OTHERS} and len(proof.unseen) == BATCH


def test_batches_passed_over_are_told_apart_from_lost_ones(home: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, [open_dataset(home / "a")])
    run.start()
    run.steps(2)
    saved = run.checkpoint()
    run.steps(2)
    run.steps(1, Outcome.LOSS_SPIKE)
    run.roll_back(saved, [4, 5])
    run.steps(6)
    proof = proof_of(tmp_path)
    assert proof.exact and {(each.why, each.batch) for each in proof.unseen} == {(PASSED_OVER, 4), (PASSED_OVER, 5)}
    held, undone = Ledger.read(tmp_path).of_step(5)
    assert held["batch"].tolist() == [4, 5, 6] and undone["batch"].tolist() == [4]
    assert [Outcome(int(one)).words for one in undone["outcome"]] == ["skipped: loss spike"]


@given(st.integers(1, 6), st.binary(min_size=1, max_size=40))
@settings(max_examples=30)
def test_a_torn_end_costs_what_is_torn(tmp_path_factory: pytest.TempPathFactory, whole: int, rubbish: bytes) -> None:
    run_dir = tmp_path_factory.mktemp("torn")
    writer = LedgerWriter(run_dir)
    writer.begin("start", 0, 0, world_size=1, data={})
    for step in range(1, whole + 1):
        writer.add(step, step - 1, 7, Outcome.TRAINED)
    writer.close()
    for name, end in ((STEPS, rubbish), (EVENTS, rubbish.replace(b"\n", b"x"))):
        with (run_dir / FOLDER / name).open("ab") as file:
            file.write(end)
    assert len(effective(run_dir)) == whole and Ledger.read(run_dir).damaged == 0
    writer = LedgerWriter(run_dir)
    writer.begin("start", whole, whole, world_size=1, data={})
    writer.add(whole + 1, whole, 7, Outcome.TRAINED)
    assert [step for step, *_ in effective(run_dir)] == list(range(1, whole + 2))
    assert Ledger.read(run_dir).damaged == 0 and writer.stretch == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_loses_nothing_once_there_is_room_again(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True, timeout=20)
    try:
        writer = LedgerWriter(tmp_path)
        writer.begin("start", 0, 0, world_size=1, data={})
        for step in range(1, 11):
            writer.add(step, step - 1, 7, Outcome.TRAINED)
        filling = tmp_path / "filling"
        with contextlib.suppress(OSError):
            filling.write_bytes(bytes(1 << 17))
        # The last page takes some more, the last of them in part.
        for step in range(11, 401):
            writer.add(step, step - 1, 7, Outcome.TRAINED)
        assert not writer.flush() and 10 < len(effective(tmp_path)) < 400
        filling.unlink()
        assert writer.flush()
        writer.close()
        assert [step for step, *_ in effective(tmp_path)] == list(range(1, 401))
        assert Ledger.read(tmp_path).damaged == 0
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True, timeout=20)


def test_records_whose_opening_line_is_lost_do_not_pass_for_the_next_start_s(home: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, [open_dataset(home / "a")])
    run.start()
    run.steps(2)
    saved = run.checkpoint()
    run.steps(3)
    # A start whose line a full disk did not take, killed after three steps; what it did is undone.
    lost = LedgerWriter(tmp_path)
    lost.stretch += 1
    for step in (3, 4, 5):
        lost.add(step, step - 1, int(id_checksums(run.sequence.batch(step - 1).index)), Outcome.TRAINED)
    lost.close()
    run.start(saved)
    run.steps(2)
    assert effective(tmp_path) == run.done and proof_of(tmp_path).exact
    assert len(Ledger.read(tmp_path).undone) == 6


def test_damage_in_the_middle_is_counted_and_shows(home: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, [open_dataset(home / "a")])
    run.start()
    run.steps(6)
    path = tmp_path / FOLDER / STEPS
    data = bytearray(path.read_bytes())
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        ledger = Ledger.read(tmp_path)
        # The last record is taken for a torn one.
        assert ledger.damaged == (place < 5 * RECORD.itemsize) and len(ledger.records) == 5
    path.write_bytes(bytes(data[: 2 * RECORD.itemsize] + bytes(RECORD.itemsize) + data[3 * RECORD.itemsize :]))
    proof = proof_of(tmp_path)
    assert {(each.batch, each.why) for each in proof.unseen} == {(2, MISSING)}
    events = tmp_path / FOLDER / EVENTS
    events.write_text("{\n" + events.read_text())
    with pytest.raises(BadInput, match="line 1 does not parse"):
        Ledger.read(tmp_path)


def test_datasets_that_moved_are_known_by_their_fingerprint(home: Path, tmp_path: Path) -> None:
    (tmp_path / "here").symlink_to(home / "a")
    run = Run(tmp_path / "run", [open_dataset(home / "a")])
    run.run_dir.mkdir()
    data = run.start()
    run.steps(2)
    assert len(json.dumps(data)) < 700
    path = tmp_path / "run" / FOLDER / EVENTS
    path.write_text(path.read_text().replace(str(home / "a"), str(tmp_path / "gone")))
    ledger = Ledger.read(tmp_path / "run")
    with pytest.raises(BadInput, match=r"no dataset with fingerprint .* \(37 samples\) .*--data"):
        DataPlans(ledger, [str(home / "b")]).sequence(1)
    assert DataPlans(ledger, [str(home / "b"), str(tmp_path / "here")]).sequence(1).samples_an_epoch == 37


def test_there_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no ledger"):
        Ledger.read(tmp_path)
    with pytest.raises(BadInput, match="no such run directory"):
        Ledger.read(tmp_path / "nowhere")


@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=64), st.integers(1, 63), st.randoms(use_true_random=False))
def test_checksums_of_the_parts_add_up_to_the_whole_in_any_order(ids: list[int], cut: int, random: Any) -> None:
    whole = int(id_checksums(ids))
    random.shuffle(ids)
    parts = [int(id_checksums(part)) for part in (ids[:cut], ids[cut:])]
    # As the ranks do it: a sum of float64.
    assert int(sum(map(float, parts))) % CHECKSUM_MODULUS == whole
    assert int(id_checksums([*ids[1:], ids[0] ^ 1])) != whole


def test_a_step_costs_little_and_is_small(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path)
    writer.begin("start", 0, 0, world_size=1, data={})
    index = np.arange(256)
    began = time.process_time()
    for step in range(1, 1001):
        writer.add(step, step - 1, int(id_checksums(index)), Outcome.TRAINED)
    # Measured: 0.04 ms. A tenth of a per cent of the demo's step is 1 ms.
    assert (time.process_time() - began) / 1000 < 1e-3
    assert (tmp_path / FOLDER / STEPS).stat().st_size == 24_000


@given(st.integers(0, 20), st.sets(st.integers(0, 40), max_size=12), st.integers(0, 15))
def test_the_cursor_takes_every_batch_but_those_passed_over(first: int, passed: set[int], count: int) -> None:
    cursor = Cursor()
    cursor.resume({"step": 0, "batch": first, "passed_over": sorted(passed)})
    taken = [number for numbers in cursor.ranges(count) for number in numbers]
    assert taken == [number for number in range(first, 100) if number not in passed][:count]
    left = [each for number in taken for each in cursor.consume(number)]
    assert sorted(taken + left) == list(range(first, cursor.batch))
    assert Cursor().state() == {"batch": 0, "passed_over": []}


def test_the_cursor_of_an_older_checkpoint_is_its_step() -> None:
    cursor = Cursor()
    cursor.resume({"step": 12})
    assert cursor.state() == {"batch": 12, "passed_over": []}

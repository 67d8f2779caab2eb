"""Slurm's answers, as a real one gave them, and what is made of them."""

from __future__ import annotations

import time

import pytest

from launch.status.slurm import Job, duration, is_job_id, moment, sacct_jobs, scontrol_jobs, squeue_jobs
from launch.status.words import in_words
from tests.launch.status import slurm_said


def by_id(jobs: list[Job]) -> dict[str, Job]:
    return {job.id: job for job in jobs}


def local(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


def test_the_queue_while_things_run() -> None:
    jobs = by_id(squeue_jobs(slurm_said.SQUEUE_EARLY))
    assert set(jobs) == {"1", "2", "3", "4", "5", "6"}
    one = jobs["1"]
    assert (one.name, one.state, one.reason) == ("a|b JobState=X", "RUNNING", "")
    assert (one.nodes, one.num_nodes, one.seconds_left, one.limit_seconds) == ("node[1-2]", 2, 597, 600)
    assert one.start == local("2026-11-22 20:26:50") and one.end == local("2026-11-22 20:36:50")
    assert jobs["6"].waits and jobs["6"].nodes == "" and jobs["4"].start is None
    assert jobs["2"].has_left and not one.has_left and not one.waits


def test_an_array_is_one_job_that_has_failed_when_a_task_has() -> None:
    early, late = (by_id(squeue_jobs(text))["5"] for text in (slurm_said.SQUEUE_EARLY, slurm_said.SQUEUE_LATE))
    assert (early.state, early.tasks, early.nodes) == ("RUNNING", {"PENDING": 1, "RUNNING": 2}, "node1")
    assert (late.state, late.tasks) == ("FAILED", {"COMPLETED": 3, "FAILED": 1})
    assert in_words(late) == "failed: 3 completed, 1 failed"


def test_a_failed_job_cancels_what_depends_on_it_and_that_is_said() -> None:
    jobs = by_id(squeue_jobs(slurm_said.SQUEUE_EARLY))
    assert in_words(jobs["3"]) == "cancelled: job 2 did not succeed"
    assert in_words(jobs["3"], list(jobs.values())) == "cancelled: job 2 failed"
    assert in_words(jobs["4"]) == "waits for job 1"
    assert in_words(jobs["6"]).startswith("waits for nodes, expected to start at ")
    assert in_words(by_id(squeue_jobs(slurm_said.SQUEUE_END))["4"]) == "cancelled: job 1 did not succeed"
    left = by_id(sacct_jobs(slurm_said.SACCT_END))
    submitted = [{"id": 2, "kind": "build"}, {"id": 3, "kind": "pretrain", "after": [2]}]
    assert in_words(left["3"], list(left.values()), submitted) == "cancelled: build job 2 failed with 3"


def test_jobs_that_have_left_the_queue() -> None:
    jobs = by_id(sacct_jobs(slurm_said.SACCT_END))
    assert set(jobs) == {"1", "2", "3", "4", "5", "6"}
    assert (jobs["1"].state, jobs["1"].reason, jobs["1"].name) == ("CANCELLED", "by 0", "a|b JobState=X")
    assert (jobs["2"].state, jobs["2"].exit_code) == ("FAILED", "3:0") and in_words(jobs["2"]) == "failed with 3"
    assert jobs["3"].nodes == "" and jobs["6"].nodes == "node[1-2]"
    assert jobs["5"].state == "FAILED" and jobs["5"].tasks == {"COMPLETED": 3, "FAILED": 1}


def test_a_job_in_full_with_a_name_that_looks_like_fields() -> None:
    (job,) = scontrol_jobs(slurm_said.SCONTROL_REQUEUED)
    assert (job.id, job.name, job.state, job.restarts) == ("1", "a|b JobState=X", "PENDING", 1)
    assert job.reason == "BeginTime" and in_words(job).startswith("waits for the time at which it may start")
    spoofed = slurm_said.SCONTROL_REQUEUED.replace("Command=", "Command=JobState=COMPLETED Restarts=9 ")
    assert scontrol_jobs(spoofed) == [job]


@pytest.mark.parametrize(
    "text", ["", "slurm_load_jobs error: Unable to contact slurm controller\n", "1|2|3\n", "\0|\n"]
)
def test_other_words_are_no_jobs(text: str) -> None:
    assert squeue_jobs(text) == sacct_jobs(text) == scontrol_jobs(text) == []


def test_durations_and_moments() -> None:
    assert duration("2-03:04:05") == ((2 * 24 + 3) * 60 + 4) * 60 + 5
    assert (duration("4:48"), duration("00:10:00")) == (288, 600)
    assert duration("UNLIMITED") is duration("INVALID") is duration("") is None
    assert moment("2026-11-22T20:26:50") == local("2026-11-22 20:26:50")
    assert moment("N/A") is moment("Unknown") is moment("None") is None


def test_what_is_a_job() -> None:
    assert is_job_id("12") and is_job_id("12_3")
    assert not any(map(is_job_id, ("", "-1", "12;ls", "12,13", "1 2", "a", "--json", "1\n2")))

"""The life of a job in the queue: each end, pause, cancel, faults, hand-over; real processes, on both databases."""

import csv
import io
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select, text

from loraport.clients.home import Home
from loraport.serve.jobs.outcome import Outcome
from loraport.serve.jobs.service import Queue
from loraport.serve.pool.policy import Policy
from loraport.serve.store.changes import move
from loraport.serve.store.tables import Checkpoint, Event, File, Job, Lease, Status
from tests.queue_kit import (
    Engine,
    get,
    journal,
    make_queue,
    messages,
    serving,
    submit,
    wait,
    wait_for,
    want,
)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    """Of the database: either kind."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgres").fresh()


@pytest.fixture
def queue(home: Home, url: str | None) -> Iterator[Queue]:
    """A queue of two GPUs."""
    with serving(home, url) as queue:
        yield queue


@pytest.fixture
def lite(home: Home) -> Iterator[Queue]:
    """The same, on SQLite only: for what is no matter of the database."""
    with serving(home) as queue:
        yield queue


def leases(queue: Queue) -> list[str]:
    """Who holds GPUs."""
    with queue.parts.store.read() as session:
        return list(session.scalars(select(Lease.holder)))


def is_training(home: Home, job_id: str, step: int = 1) -> bool:
    """Whether a trainer has made a step."""
    path = home.root / "jobs" / job_id / "journal.txt"
    return path.exists() and f"step {step}\n" in path.read_text()


def test_a_job_is_checked_trained_handed_over_and_told_of(queue: Queue, home: Home) -> None:
    job_id = submit(queue, steps=3, checkpoints=[2])
    job = wait(queue, job_id)
    assert (job.status, job.error) == (Status.SUCCEEDED, None)
    assert job.fine_tuned_model == f"ft:base:ann::{job_id.removeprefix('ftjob-')[:12]}"
    assert job.adapter == f"{job_id}@v1" and job.trained_tokens == 300 and job.gpu_s > 0
    assert job.started_at and job.finished_at and job.estimated_finish is None and job.attempt == 1
    assert messages(queue, job_id) == [
        "The job is queued.",
        "The job has started.",
        "Training",
        "Training starts: 3 steps on 10 examples.",
        "Training is done: the adapter is stored.",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed.",
    ]
    assert messages(queue, job_id, "metrics") == [
        "Step 1/3: training loss=1.00",
        "Step 2/3: training loss=0.50",
        "Step 3/3: training loss=0.33",
        "Step 3: validation loss=0.25",
    ]
    with queue.parts.store.read() as session:
        (checkpoint,) = session.scalars(select(Checkpoint))
        file = session.scalars(select(File).where(File.id == job.result_file)).one()
        data = session.scalars(select(Event.data).where(Event.type == "metrics").order_by(Event.seq)).first()
    assert data == {"step": 1, "total_steps": 3, "train_loss": 1.0, "train_mean_token_accuracy": 0.5} | {
        "tokens": 100,
        "left_s": 1.0,
    }
    assert (checkpoint.step, checkpoint.adapter) == (2, f"{job_id}.step-2@v1")
    assert checkpoint.model.endswith(":ckpt-step-2") and checkpoint.metrics["train_loss"] == 0.5
    assert (file.tenant, file.purpose, file.filename) == ("ann", "fine-tune-results", "step_metrics.csv")
    content = (home.root / "files" / file.id).read_bytes()
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    assert rows[2] == {
        "step": "3",
        "train_loss": "0.3333",
        "train_accuracy": "0.5",
        "valid_loss": "0.25",
        "valid_mean_token_accuracy": "0.75",
    }
    assert len(content) == file.bytes and journal(home, job_id)[-1] == "end" and leases(queue) == []


def test_a_job_whose_file_is_refused_fails_with_the_row(queue: Queue) -> None:
    job = wait(queue, submit(queue, unfit="Line 3: no assistant turn"))
    assert job.status == Status.FAILED and job.attempt == 0
    assert job.error == {
        "code": "invalid_training_file",
        "message": "Line 3: no assistant turn",
        "param": "training_file",
    }
    assert messages(queue, job.id) == ["The job has failed: Line 3: no assistant turn"]


def test_a_check_that_dies_is_done_again(lite: Queue) -> None:
    job = wait(lite, submit(lite, later=2, steps=1))
    assert job.status == Status.SUCCEEDED and job.faults == 0
    assert "The files cannot be checked now: the check died." in messages(lite, job.id)
    assert wait(lite, submit(lite, later=9)).error["code"] == "server_error"  # type: ignore[index]


REFUSED = {
    "kind": "DataError",
    "message": "no assistant turn.",
    "hint": "correct the rows",
    "row": 7,
}


@pytest.mark.parametrize(
    ("fail", "code", "param", "words"),
    [
        ({"step": 1, "code": 3, "times": -1, "error": REFUSED}, "invalid_training_file", "training_file", "row 7: no"),
        (
            {
                "step": 1,
                "code": 2,
                "times": -1,
                "error": {"kind": "ConfigError", "message": "rank 0.", "param": "rank"},
            },
            "invalid_hyperparameters",
            "rank",
            "rank 0.",
        ),
        (
            {"step": 4, "code": 4, "times": -1, "error": {"kind": "Shortfall", "message": "success is 0.2, not 0.9."}},
            "requirements_not_met",
            None,
            "success is 0.2, not 0.9.",
        ),
    ],
)
def test_what_the_trainer_refuses_is_not_tried_again(
    lite: Queue, home: Home, fail: dict[str, Any], code: str, param: str | None, words: str
) -> None:
    job_id = submit(lite, steps=3, fail=fail)
    (home.ensure(home.root / "jobs" / job_id) / "report.html").write_text("<p>report</p>")
    job = wait(lite, job_id)
    assert job.status == Status.FAILED and job.attempt == 1 and job.error
    assert (job.error["code"], job.error["param"]) == (code, param) and words in job.error["message"]
    assert (job.report_file is not None) == (code == "requirements_not_met") and leases(lite) == []
    if job.report_file:
        assert (home.root / "files" / job.report_file).read_text() == "<p>report</p>"


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        ({"step": 2, "code": -9}, "ended by SIGKILL"),
        ({"step": 2, "code": 1}, "exit code 1. Its last words: a line of the log"),
        ({"step": 2, "code": 3, "error": {"kind": "ResourceError", "message": "no disk space left."}}, "no disk space"),
    ],
)
def test_a_fault_of_the_machine_is_tried_again_from_the_checkpoint(
    lite: Queue, home: Home, fail: dict[str, Any], words: str
) -> None:
    job = wait(lite, submit(lite, steps=4, fail=fail))
    assert job.status == Status.SUCCEEDED and (job.attempt, job.faults) == (2, 1)
    assert [line for line in journal(home, job.id) if line.startswith("step")] == [f"step {n}" for n in (1, 2, 3, 4)]
    (told,) = [line for line in messages(lite, job.id) if line.startswith("Attempt 1 failed")]
    assert words in told and "Training goes on behind step 2 of 4." in messages(lite, job.id)


def test_after_three_faults_a_job_fails(queue: Queue, home: Home) -> None:
    job = wait(queue, submit(queue, steps=2, fail={"step": 1, "code": -9, "times": 1}, deaf=True))
    assert job.status == Status.SUCCEEDED
    job = wait(queue, submit(queue, steps=2, fail={"step": 2, "code": -11, "times": -1}))
    assert job.status == Status.FAILED and job.attempt == 3 and job.error
    assert job.error["code"] == "training_failed" and job.error["message"].endswith("It was tried 3 times.")
    assert "SIGSEGV" in job.error["message"]


def test_pause_keeps_the_checkpoint_and_the_gpu_goes_to_others(queue: Queue, home: Home) -> None:
    job_id = submit(queue, steps=2000, step_s=0.01)
    wait_for(lambda: is_training(home, job_id))
    want(queue, job_id, "pause")
    job = wait(queue, job_id, Status.PAUSED)
    assert job.wanted is None and leases(queue) == [] and job.gpu_s > 0
    done = int((home.root / "jobs" / job_id / "checkpoint").read_text())
    assert done < 2000
    with queue.parts.store.begin() as session:  # resume, as the API does
        assert move(session, job_id, {Status.PAUSED}, Status.QUEUED)
    queue.wake()
    wait_for(lambda: is_training(home, job_id, done + 1))
    want(queue, job_id, "cancel")
    job = wait(queue, job_id)
    assert (job.status, job.attempt, job.faults) == (Status.CANCELLED, 2, 0) and job.result_file
    steps = [line for line in journal(home, job_id) if line.startswith("step")]
    assert steps == [f"step {number}" for number in range(1, len(steps) + 1)]


def test_a_trainer_that_does_not_listen_is_killed(home: Home) -> None:
    with serving(home, grace_s=0.3) as queue:
        job_id = submit(queue, steps=10_000, step_s=0.01, deaf=True)
        wait_for(lambda: is_training(home, job_id))
        want(queue, job_id, "cancel")
        assert wait(queue, job_id).status == Status.CANCELLED
        assert not queue.parts.runner.is_running(job_id)


def test_a_job_that_waits_or_is_checked_can_be_ended_by_others(lite: Queue) -> None:
    checked = submit(lite, check_s=60.0)
    wait_for(lambda: lite.checking.under_way)
    with lite.parts.store.begin() as session:
        assert move(session, checked, {Status.VALIDATING}, Status.CANCELLED)
    wait_for(lambda: not any(thread.is_alive() for _, thread in lite.checking.under_way.values()))
    assert get(lite, checked).status == Status.CANCELLED


def test_a_job_that_was_paused_while_it_was_checked_is_checked_when_it_goes_on(lite: Queue) -> None:
    job_id = submit(lite, check_s=2.0, steps=1)
    wait_for(lambda: lite.checking.under_way)
    with lite.parts.store.begin() as session:
        assert move(session, job_id, {Status.VALIDATING}, Status.PAUSED)
    wait_for(lambda: not any(thread.is_alive() for _, thread in lite.checking.under_way.values()))
    assert get(lite, job_id).status == Status.PAUSED
    with lite.parts.store.begin() as session:
        assert move(session, job_id, {Status.PAUSED}, Status.QUEUED)
    lite.wake()
    assert wait(lite, job_id).status == Status.SUCCEEDED


def test_a_job_may_not_train_for_ever(home: Home) -> None:
    with serving(home, time_limit_s=0.3) as queue:
        job = wait(queue, submit(queue, steps=10_000, step_s=0.01))
    assert job.status == Status.FAILED and job.error and job.error["code"] == "time_limit_exceeded"


def test_a_result_waits_for_its_engine_without_being_trained_again(lite: Queue, home: Home) -> None:
    job = wait(lite, submit(lite, steps=1, engine=1))
    assert job.status == Status.SUCCEEDED and job.attempt == 1
    assert "The model is trained; the engine cannot take it yet: the engine starts." in messages(lite, job.id)
    assert journal(home, job.id).count("end") == 1


def test_a_result_that_fails_its_verification_is_a_failed_job(lite: Queue) -> None:
    job = wait(lite, submit(lite, steps=1, refuse=True))
    assert job.status == Status.FAILED and job.error and job.fine_tuned_model is None
    assert job.error["code"] == "verification_failed" and "answers otherwise" in job.error["message"]


def test_a_job_that_waits_for_its_hand_over_can_be_cancelled(lite: Queue) -> None:
    job_id = submit(lite, steps=1, engine=99)
    wait_for(lambda: "The model is trained" in " ".join(messages(lite, job_id)))
    want(lite, job_id, "cancel")
    assert wait(lite, job_id).status == Status.CANCELLED


def test_jobs_get_gpus_of_their_own_and_large_ones_are_not_starved(queue: Queue, home: Home) -> None:
    first = [submit(queue, steps=100, step_s=0.02, estimate=2.0) for _ in range(2)]
    for job_id in first:
        wait_for(lambda job_id=job_id: is_training(home, job_id))  # type: ignore[misc]
    large = submit(queue, "bob", steps=1, gpus=2)
    wait(queue, large, Status.QUEUED)
    later = [submit(queue, f"t{n}", steps=1, estimate=1000.0) for n in range(6)]
    job = wait(queue, large)
    assert job.status == Status.SUCCEEDED
    began = {name: get(queue, name).started_at for name in [large, *later]}
    assert all(began[large] < (began[name] or float("inf")) for name in later)  # type: ignore[operator]
    assert all(wait(queue, name).status == Status.SUCCEEDED for name in later)


def test_a_job_of_more_gpus_than_there_are_fails_at_once(lite: Queue) -> None:
    job = wait(lite, submit(lite, gpus=3))
    assert job.status == Status.FAILED and job.error and job.error["code"] == "insufficient_resources"


def test_the_engine_leaves_for_a_job_and_is_back_for_its_hand_over(home: Home) -> None:
    engine = Engine({0: 9})
    with serving(home, gpus=1, engine=engine, policy=Policy.YIELD) as queue:
        assert wait(queue, submit(queue, steps=1)).status == Status.SUCCEEDED
        wait_for(lambda: engine.told == ["suspend", "resume"] and not queue.parts.placer.is_away)
        assert leases(queue) == ["engine:0"]


def test_jobs_share_a_gpu_when_they_may(home: Home) -> None:
    with serving(home, gpus=1) as queue:
        jobs = [submit(queue, steps=3000, step_s=0.01, bytes=4, may_share=True) for _ in range(2)]
        for job_id in jobs:
            wait_for(lambda job_id=job_id: is_training(home, job_id))  # type: ignore[misc]
        third = submit(queue, steps=1, bytes=4, may_share=True)
        wait(queue, third, Status.QUEUED)
        time.sleep(3 * queue.parts.settings.tick_s)
        assert get(queue, third).status == Status.QUEUED
        for job_id in jobs:
            want(queue, job_id, "cancel")
        assert wait(queue, third).status == Status.SUCCEEDED


def test_a_server_that_is_stopped_puts_its_jobs_back_and_the_next_goes_on(home: Home, url: str | None) -> None:
    with serving(home, url) as queue:
        job_id = submit(queue, steps=25, step_s=0.02)
        wait_for(lambda: is_training(home, job_id, 3))
    assert journal(home, job_id)[-1] == "end"
    with serving(home, url) as queue:
        job = wait(queue, job_id)
    assert (job.status, job.attempt, job.faults) == (Status.SUCCEEDED, 2, 0)
    assert [line for line in journal(home, job_id) if line.startswith("step")] == [f"step {n}" for n in range(1, 26)]


def test_a_server_may_leave_its_trainers_alone(home: Home) -> None:
    queue = make_queue(home)
    queue.start()
    job_id = submit(queue, steps=25, step_s=0.02)
    wait_for(lambda: is_training(home, job_id, 3))
    queue.close(stop_trainers=False)
    assert get(queue, job_id).status == Status.RUNNING
    queue.parts.store.close()
    with serving(home) as queue:
        job = wait(queue, job_id)
    assert (job.status, job.attempt) == (Status.SUCCEEDED, 1)
    assert [line.split()[0] for line in journal(home, job_id)].count("start") == 1
    assert messages(queue, job_id, "metrics") == list(dict.fromkeys(messages(queue, job_id, "metrics")))


def test_a_bug_in_a_step_fails_the_job_and_not_the_queue(lite: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by a bug")

    monkeypatch.setattr(lite.attempts, "judge", fail)
    job = wait(lite, submit(lite, steps=1))
    assert job.status == Status.FAILED and job.error and "ZeroDivisionError" in job.error["message"]
    monkeypatch.undo()
    assert wait(lite, submit(lite, steps=1)).status == Status.SUCCEEDED


def test_a_trainer_that_somebody_stops_goes_on(lite: Queue, home: Home) -> None:
    job_id = submit(lite, steps=30, step_s=0.02)
    wait_for(lambda: is_training(home, job_id, 2))
    os.kill(int(journal(home, job_id)[0].split()[1]), signal.SIGTERM)
    job = wait(lite, job_id)
    assert (job.status, job.attempt, job.faults) == (Status.SUCCEEDED, 2, 0)


def test_the_home_of_jobs_is_private(lite: Queue, home: Home) -> None:
    wait(lite, submit(lite, steps=1))
    private = [home.root / "jobs-dbos.sqlite", home.root / "jobs.sqlite", *Path(home.root / "files").iterdir()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in private)


def test_a_full_disk_is_waited_for(lite: Queue, home: Home) -> None:
    store = lite.parts.store

    def fill(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")

    with store.read() as session:
        pages = session.scalar(text("PRAGMA page_count")) or 0
    job_id = submit(lite, steps=100, step_s=0.01)
    wait_for(lambda: is_training(home, job_id))
    event.listen(store.engine, "checkout", fill)
    wait_for(lambda: lite.parts.complained > 0)
    wait_for(lambda: journal(home, job_id)[-1] == "end")  # the trainer goes on
    pages = 1 << 30
    job = wait(lite, job_id)
    assert (job.status, job.attempt) == (Status.SUCCEEDED, 1)
    assert messages(lite, job_id, "metrics")[:100] == [
        f"Step {step}/100: training loss={round(1 / step, 4):.2f}" for step in range(1, 101)
    ]


def test_what_is_asked_for_while_an_attempt_ends_is_done(lite: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue has decided to try again; then its owner cancels."""
    judged = lite.attempts.judge

    def cancelled_meanwhile(job: Job) -> Outcome:
        found = judged(job)
        want(lite, job.id, "cancel")
        return found

    monkeypatch.setattr(lite.attempts, "judge", cancelled_meanwhile)
    job = wait(lite, submit(lite, steps=3, fail={"step": 2, "code": 1}))
    assert (job.status, job.attempt, job.wanted) == (Status.CANCELLED, 1, None)

"""Servers, trainers and PostgreSQL are killed at random moments: every job reaches its end once, and none trains twice.

A longer run of the same, for a person: python -m tests.test_jobs_queue_faults ROUNDS [SEED]
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import select, update

from loraport.clients.errors import ResourceError
from loraport.clients.home import Home
from loraport.serve.jobs.attempt import Attempts
from loraport.serve.jobs.durable import Leaving
from loraport.serve.jobs.outcome import Fault
from loraport.serve.jobs.words import failure
from loraport.serve.store.store import Store, open_store
from loraport.serve.store.tables import ENDED, Event, Job, Lease, Status
from tests.postgres import Postgres
from tests.queue_kit import Server, get, journal, make_queue, serving, submit, wait, wait_for

TENANTS = ("ann", "bob", "cat")


def submit_some(store: Store, dice: random.Random, count: int) -> dict[str, Status]:
    """Jobs of all kinds, and how each has to end."""
    wanted = {}
    for number in range(count):
        kind = dice.choice(["good", "good", "good", "unfit", "refused", "large", "crashing"])
        knobs: dict[str, object] = {"steps": dice.randint(3, 12), "step_s": 0.02, "checkpoints": [2], "estimate": 0.3}
        if kind == "unfit":
            knobs["unfit"] = "Line 3"
        if kind == "refused":
            knobs["fail"] = {"step": 2, "code": 3, "times": -1, "error": {"kind": "DataError", "message": "row 2."}}
        if kind == "large":
            knobs["gpus"] = 2
        if kind == "crashing":
            knobs["fail"] = {"step": 2, "code": -9, "times": 1}
        job_id = submit(store, TENANTS[number % len(TENANTS)], **knobs)
        wanted[job_id] = Status.FAILED if kind in ("unfit", "refused") else Status.SUCCEEDED
    return wanted


def trainers(home: Home) -> list[int]:
    """Trainers that live now."""
    found = []
    for path in (home.root / "jobs").glob("*/journal.txt"):
        starts = [int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("start")]
        for pid in starts[-1:]:
            with suppress(OSError):
                if str(path.parent) in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
    return found


def disturb(home: Home, server: Server, dice: random.Random, postgres: Postgres | None) -> bool:
    """Kill something; whether the server is gone."""
    kind = dice.choice(["server", "server", "trainer", "group", "stop", "postgres"])
    victims = trainers(home)
    if kind in ("trainer", "group") and victims:
        for pid in victims if kind == "group" else [dice.choice(victims)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if kind == "postgres" and postgres:
        postgres.stop()
        time.sleep(dice.uniform(0.0, 0.3))
        postgres.start()
    if kind in ("server", "group"):
        server.kill()
    if kind == "stop":
        server.stop()
    return kind in ("server", "group", "stop")


def run_rounds(home: Home, url: str | None, rounds: int, seed: int, postgres: Postgres | None = None) -> Counter[str]:
    """Disturb a queue, so many times; then let it end all jobs, and look at what really happened."""
    dice = random.Random(seed)
    store = open_store(home, url)
    wanted = submit_some(store, dice, max(6, rounds))
    server = Server(home, url)
    for _ in range(rounds):
        time.sleep(dice.uniform(0.0, 1.2))
        if disturb(home, server, dice, postgres):
            server = Server(home, url)
    server.ready()

    def are_over() -> list[Job] | None:
        with store.read() as session:
            jobs = list(session.scalars(select(Job)))
        return jobs if all(job.status in ENDED for job in jobs) else None

    try:
        jobs = wait_for(are_over, 60.0 + 5.0 * rounds)
    finally:
        server.stop()
    check(home, store, jobs, wanted)
    store.close()
    return Counter(job.status for job in jobs)


def check(home: Home, store: Store, jobs: list[Job], wanted: dict[str, Status]) -> None:
    """Each job has ended as it must, once; no step was trained twice, nothing told twice; nothing is left behind."""
    for job in jobs:
        # A trainer that the kernel ends counts as a fault of the machine, and three of those are enough.
        is_unlucky = job.status == Status.FAILED and job.error and job.error["code"] == "training_failed"
        assert job.status == wanted[job.id] or (is_unlucky and job.faults >= 3), (job.id, job.error)
        ends = [line for line in events(store, job.id) if line.startswith(("The job has succ", "The job has failed"))]
        assert len(ends) == 1
        if (home.root / "jobs" / job.id / "journal.txt").exists():
            check_journal(journal(home, job.id), job)
    accepted = (home.root / "accepted.txt").read_text().split("\n")
    assert {line.split()[0] for line in accepted if line} >= {job.id for job in jobs if job.status == Status.SUCCEEDED}
    with store.read() as session:
        assert session.scalars(select(Lease).where(Lease.holder.like("ftjob-%"))).all() == []
    assert trainers(home) == []


def check_journal(lines: list[str], job: Job) -> None:
    """Steps in order, one trainer at a time; one comes twice only where a kill came between it and its checkpoint."""
    steps = [int(line.split()[1]) for line in lines if line.startswith("step")]
    starts = sum(line.startswith("start") for line in lines)
    assert starts <= job.attempt and len(steps) - len(set(steps)) < starts
    assert all(after in (before, before + 1) for before, after in pairwise(steps))
    if job.status == Status.SUCCEEDED:
        assert sorted(set(steps)) == list(range(1, job.options["steps"] + 1))


def events(store: Store, job_id: str) -> list[str]:
    """What a job's events say; none of a step twice."""
    with store.read() as session:
        found = list(session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.seq)))
    told = [event.message for event in found if event.type == "metrics" and event.data and "train_loss" in event.data]
    assert len(told) == len(set(told)), told
    return [event.message for event in found]


def test_whatever_is_killed_every_job_ends_once(home: Home) -> None:
    assert run_rounds(home, None, 5, seed=2)


def test_whatever_is_killed_and_postgresql_too_every_job_ends_once(home: Home, tmp_path: Path) -> None:
    with Postgres.started(tmp_path / "server") as postgres:
        assert run_rounds(home, postgres.fresh(), 4, 3, postgres)


def test_a_queue_that_starts_without_its_database_waits_for_it(home: Home, tmp_path: Path) -> None:
    with Postgres.started(tmp_path / "server") as postgres:
        queue = make_queue(home, postgres.fresh())
        job_id = submit(queue, steps=1)
        postgres.stop()
        queue.start()
        assert queue.parts.complained > 0
        postgres.start()
        assert wait(queue, job_id).status == Status.SUCCEEDED
        queue.close()
        queue.parts.store.close()


def test_a_trainer_that_nobody_follows_ends_with_its_server(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """DBOS ends a workflow between two steps where it cannot write down that the first is over."""

    def never(*_: object) -> None:
        raise Leaving

    monkeypatch.setattr(Attempts, "follow", never)
    queue = make_queue(home)
    queue.start()
    job_id = submit(queue, steps=10_000, step_s=0.01)
    wait_for(lambda: trainers(home) and not queue.durable.under_way.jobs)
    queue.close()
    assert trainers(home) == [] and journal(home, job_id)[-1] == "end"
    queue.parts.store.close()


def test_without_its_database_a_queue_ends_and_takes_its_trainers_along(home: Home, tmp_path: Path) -> None:
    with Postgres.started(tmp_path / "server") as postgres:
        queue = make_queue(home, postgres.fresh())
        queue.start()
        job_id = submit(queue, steps=10_000, step_s=0.01)
        wait_for(lambda: trainers(home))
        postgres.stop()
        queue.close()
        assert trainers(home) == [] and journal(home, job_id)[-1] == "end"
        postgres.start()
        assert get(queue, job_id).status == Status.RUNNING  # to be gone on with
        queue.parts.store.close()


def test_attempts_that_nobody_saw_end_are_counted_by_themselves(home: Home) -> None:
    queue = make_queue(home, lost_attempts=2)
    finishing, error = queue.attempts.finishing, failure("training_failed", "nobody saw its end.")
    job_id = submit(queue)

    def after(fault: Fault, attempt: int) -> Job:
        with queue.parts.store.begin() as session:
            session.execute(update(Job).where(Job.id == job_id).values(status=Status.RUNNING, attempt=attempt))
        finishing.try_again(get(queue, job_id), fault)
        return get(queue, job_id)

    job = after(Fault(error), attempt=9)  # eight of them ended by pauses and restarts
    assert (job.status, job.faults, job.lost) == (Status.QUEUED, 1, 0)
    job = after(Fault(error, counts=False), attempt=10)
    assert (job.status, job.faults, job.lost) == (Status.QUEUED, 1, 1)
    job = after(Fault(error, counts=False), attempt=11)
    assert (job.status, job.faults, job.lost) == (Status.FAILED, 1, 2)
    queue.parts.store.close()


def test_a_trainer_that_cannot_be_started_is_told_without_paths(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ResourceError(f"no room in {home.root}/jobs.", f"look into {home.root}")

    with serving(home, attempts=1) as queue:
        monkeypatch.setattr(queue.parts.runner, "start", refuse)
        job = wait(queue, submit(queue))
    assert job.error and job.error["code"] == "resources_lacking"
    assert job.error["message"].startswith("no room in the home/jobs. Look into the home.")


@pytest.mark.parametrize("clock_s", [-3600.0, 3600.0])
def test_a_trainer_whose_clock_is_wrong_is_believed(home: Home, clock_s: float) -> None:
    fault = {"step": 2, "code": 3, "times": 1, "error": {"kind": "ResourceError", "message": "no disk."}}
    with serving(home) as queue:
        job = wait(queue, submit(queue, steps=3, clock_s=clock_s, fail=fault))
    assert (job.status, job.attempt, job.faults) == (Status.SUCCEEDED, 2, 1)


def main(rounds: int, seed: int = 0) -> None:
    """The longer run, on both databases."""
    folder = Path(tempfile.mkdtemp())
    with Postgres.started(folder / "server") as postgres:
        for kind, url in (("sqlite", None), ("postgresql", postgres.fresh())):
            began = time.monotonic()
            counts = run_rounds(Home(folder / kind), url, rounds, seed, postgres if url else None)
            words = f"{kind}: {rounds} rounds in {time.monotonic() - began:.0f} s: {dict(counts)}\n"
            sys.stdout.write(words)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""What is told of the queue in figures, and fair turns among a thousand jobs through the queue itself."""

import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import select

from loraport.clients.home import Home
from loraport.serve.jobs.figures import QueueFigures, cost_of
from loraport.serve.jobs.service import Queue
from loraport.serve.store.store import open_store
from loraport.serve.store.tables import Job, Status
from tests.queue_kit import Done, new_job, serving, submit, wait, wait_for


@pytest.fixture
def lite(home: Home) -> Iterator[Queue]:
    """A queue of two GPUs."""
    with serving(home) as queue:
        yield queue


def test_metrics_tell_of_jobs_waiting_and_cost(lite: Queue) -> None:
    for tenant, options in (("ann", {"steps": 1}), ("bob", {"unfit": "Line 1"})):
        wait(lite, submit(lite, tenant, **options))
    registry = CollectorRegistry()
    registry.register(QueueFigures(lite.parts.store, price_per_gpu_hour=3600.0))
    text = generate_latest(registry).decode()
    job_ids = [line for line in text.splitlines() if line.startswith("loraport_jobs{")]
    assert 'loraport_jobs{status="succeeded"} 1.0' in job_ids and 'loraport_jobs{status="failed"} 1.0' in job_ids
    assert 'loraport_job_failures_total{code="invalid_training_file"} 1.0' in text
    used = float(text.split('loraport_job_gpu_seconds_total{tenant="ann"} ')[1].split()[0])
    assert 0 < used == pytest.approx(float(text.split('loraport_job_cost_total{tenant="ann"} ')[1].split()[0]))
    assert 'loraport_job_attempts_total{tenant="bob"} 0.0' in text and "loraport_queue_length 0.0" in text


def test_the_cost_of_a_job_is_told_before_and_after(lite: Queue) -> None:
    job = wait(lite, submit(lite, steps=1, estimate=7200.0))
    found = cost_of(job, 2.0, time.time())
    assert found == {"gpu_hours": job.gpu_s / 3600, "cost": job.gpu_s / 1800}
    job.status, job.gpu_s = Status.QUEUED, 0.0
    assert cost_of(job, 2.0, 0.0)["estimated_cost"] == 4.0


def test_a_thousand_jobs_of_twenty_tenants_get_fair_turns_through_a_restart(home: Home) -> None:
    runner, store = Done(), open_store(home)
    tenants = [f"t{number % 20 if number >= 500 else 0}" for number in range(1000)]  # t0 came first, with half of them
    with store.begin() as session:
        for tenant in tenants:
            job = new_job(tenant, {"estimate": 30.0})
            job.status, job.config, job.queued_at, job.estimated_s = Status.QUEUED, {"knobs": {}}, time.time(), 30.0
            session.add(job)
    store.close()
    for wanted in (16, 32):
        with serving(home, gpus=8, runner=runner) as queue:
            wait_for(lambda wanted=wanted: len(runner.started) >= wanted)  # type: ignore[misc]
    with serving(home, gpus=8, runner=runner) as queue, queue.parts.store.read() as session:
        given = select(Job.started_at, Job.tenant).where(Job.started_at.is_not(None)).order_by(Job.started_at)
        turns = session.execute(given).all()  # as GPUs were given; a trainer may start later than one after it
    assert len(set(runner.started)) == len(runner.started) >= 32
    assert {tenant for began, tenant in turns if began <= turns[19][0]} == set(tenants)  # one turn for each, at first

"""What goes of jobs that are over, and when; and what stays whatever its age."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import select, update

from loraport.clients.home import Home
from loraport.serve.adapters import remove as removal
from loraport.serve.adapters.catalog import Registered
from loraport.serve.jobs.housekeeping import Housekeeping
from loraport.serve.jobs.service import Queue
from loraport.serve.store.tables import Job, Status
from tests.queue_kit import make_queue, submit

DAY_S = 24 * 3600.0


@pytest.fixture
def queue(home: Home) -> Iterator[Queue]:
    """One that does not look: its housekeeping alone."""
    queue = make_queue(home)
    yield queue
    queue.parts.store.close()


def sweep(queue: Queue) -> None:
    """All that is done every minute but DBOS's."""
    keeper = Housekeeping(queue.parts, queue.durable)
    keeper.forget = lambda: None  # type: ignore[method-assign]
    keeper.clean_up()


def job_of(queue: Queue, status: Status, days: float = 0.0) -> str:
    """A job with an adapter, one of a checkpoint, and a log; over for so many days, if it is over."""
    job_id = submit(queue)
    finished_at = time.time() - days * DAY_S if days else None
    with queue.parts.store.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(status=status, finished_at=finished_at))
    home = queue.parts.home
    for name in (job_id, f"{job_id}.step-2"):
        (home.adapters / name / "v1").mkdir(parents=True)
        (home.adapters / name / "v1" / "adapter_model.safetensors").touch()
        (home.adapters / name / "aliases.json").write_text("{}")
    home.ensure(home.root / "jobs" / job_id).joinpath("train.log").write_text("words")
    return job_id


def left(parent: Path) -> set[str]:
    """The jobs that have something there."""
    return {path.name.partition(".")[0] for path in parent.iterdir()}


def test_adapters_of_jobs_that_came_to_nothing_go_after_a_day(queue: Queue, home: Home) -> None:
    gone = {job_of(queue, status, 1.1) for status in (Status.FAILED, Status.CANCELLED)}
    kept = {job_of(queue, status, 0.9) for status in (Status.FAILED, Status.CANCELLED)}
    kept.add(job_of(queue, Status.SUCCEEDED, 400.0))
    kept |= {job_of(queue, status) for status in (Status.PAUSED, Status.RUNNING, Status.QUEUED, Status.VALIDATING)}
    (home.adapters / "ftjob-unknown" / "v1").mkdir(parents=True)
    (home.adapters / "mine" / "v1").mkdir(parents=True)
    sweep(queue)
    assert left(home.adapters) == kept | {"ftjob-unknown", "mine"}
    assert gone < left(home.root / "jobs")  # logs stay longer


def test_logs_go_after_a_month(queue: Queue, home: Home) -> None:
    ended = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)
    for status in ended:
        job_of(queue, status, 31.0)
    kept = {job_of(queue, status, 29.0) for status in ended} | {job_of(queue, Status.PAUSED)}
    home.ensure(home.root / "jobs" / "ftjob-unknown")
    sweep(queue)
    assert left(home.root / "jobs") == kept | {"ftjob-unknown"}
    with queue.parts.store.read() as session:
        assert len(session.scalars(select(Job)).all()) == 7  # their rows stay


def test_what_an_endpoint_serves_stays(queue: Queue, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = job_of(queue, Status.FAILED, 2.0)

    served = Registered("base", (f"{job_id}@v1",))
    monkeypatch.setattr(removal, "serving_ports", lambda _: {8000: served})
    monkeypatch.setattr(removal, "read_records", lambda _: [SimpleNamespace(port=8000, process=None)])
    monkeypatch.setattr(removal, "is_alive", lambda _: True)
    monkeypatch.setattr(removal.remote, "listings", lambda _: [])
    sweep(queue)
    assert (home.adapters / job_id / "v1").is_dir()

"""The database of jobs: on SQLite, and on a real PostgreSQL; migrations, transactions, changes and pages."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, NoResultFound

from loraport.clients.errors import ConfigError, ResourceError
from loraport.clients.home import Home
from loraport.serve.jobs.durable import dbos_url
from loraport.serve.store.changes import move, page, tell
from loraport.serve.store.home_lock import HomeLock
from loraport.serve.store.ownership import FRESH_S, SETTLE_S, Ownership
from loraport.serve.store.store import Store, open_store
from loraport.serve.store.tables import (
    Checkpoint,
    Delivery,
    Event,
    Job,
    Lease,
    Permission,
    Status,
    Table,
    Webhook,
)
from tests.postgres import Postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, home: Home) -> Iterator[Store]:
    """An empty store on either database."""
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").fresh()
    store = open_store(home, url)
    yield store
    store.close()


def new_job(store: Store, **fields: Any) -> str:
    """The id of a queued job."""
    job = Job(
        tenant="ann", model="base", training_file="file-1", seed=1, method={}, request_sha256="", status=Status.QUEUED
    )
    for name, value in fields.items():
        setattr(job, name, value)
    with store.begin() as session:
        session.add(job)
    return job.id


def test_migrations_make_what_the_tables_say(store: Store) -> None:
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []


def test_opened_again_it_has_what_was_written(home: Home) -> None:
    store = open_store(home)
    job_id = new_job(store, labels={"team": "a"})
    store.close()
    store = open_store(home)
    with store.read() as session:
        job = session.scalars(select(Job)).one()
    assert job.id == job_id and job.labels == {"team": "a"} and job.created_at > 1e9
    assert (home.root / "jobs.sqlite").stat().st_mode & 0o777 == 0o600
    store.close()


def test_a_database_of_a_newer_loraport_is_left_alone(store: Store, home: Home) -> None:
    with store.begin() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="newer Loraport"):
        open_store(home, store.url.render_as_string(hide_password=False))


def test_many_processes_may_open_an_empty_database_at_once(request: pytest.FixtureRequest, home: Home) -> None:
    for url in (None, request.getfixturevalue("postgres").fresh()):
        failed: list[BaseException] = []

        def open_one(url: str | None = url, failed: list[BaseException] = failed) -> None:
            try:
                open_store(home, url).close()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=open_one) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []


def test_of_two_who_end_a_job_one_does(store: Store) -> None:
    job_id = new_job(store)
    outcomes: list[bool] = []

    def end(status: Status) -> None:
        with store.begin() as session:
            outcomes.append(move(session, job_id, {Status.QUEUED}, status))

    threads = [threading.Thread(target=end, args=(s,)) for s in (Status.CANCELLED, Status.FAILED) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]
    with store.read() as session:
        assert session.scalars(select(Job)).one().finished_at and len(session.scalars(select(Event)).all()) == 1


def test_a_block_that_fails_changes_nothing(store: Store) -> None:
    job_id = new_job(store)
    with pytest.raises(RuntimeError), store.begin() as session:
        assert move(session, job_id, {Status.QUEUED}, Status.RUNNING)
        raise RuntimeError
    with store.read() as session:
        assert session.scalars(select(Job.status)).one() == Status.QUEUED and not session.scalars(select(Event)).all()


def test_who_waits_for_a_job_is_told_of_its_end(store: Store) -> None:
    job_id = new_job(store)
    with store.begin() as session:
        session.add(Webhook(tenant="ann", url="http://a", secret="s", events=["fine_tuning.job.failed"]))
        session.add(Webhook(tenant="bob", url="http://b", secret="s", events=["fine_tuning.job.failed"]))
    with store.begin() as session:
        assert move(session, job_id, {Status.QUEUED}, Status.FAILED, error={"message": "row 3 is empty"})
    with store.read() as session:
        (delivery,) = session.scalars(select(Delivery))
        assert (delivery.type, delivery.body) == ("fine_tuning.job.failed", {"id": job_id})
        assert session.scalars(select(Event.message)).one() == "The job has failed: row 3 is empty"


def test_pages_go_on_after_a_row_and_end(store: Store) -> None:
    job_id = new_job(store)
    with store.begin() as session:
        for number in range(5):
            tell(session, job_id, str(number))
    asked = select(Event).where(Event.job_id == job_id)
    seen, after, more = [], None, True
    while more:
        with store.read() as session:
            rows, more = page(session, Event, asked, after, 2)
        seen += [row.message for row in rows]
        after = rows[-1].id
    assert seen == ["4", "3", "2", "1", "0"]
    with store.read() as session, pytest.raises(NoResultFound):
        page(session, Event, asked, "ftevent-of-somebody-else", 2)


def test_a_gpu_is_leased_once_to_a_holder(store: Store) -> None:
    with store.begin() as session:
        session.add(Lease(holder="ftjob-1", node="here", gpu=0))
    with pytest.raises(IntegrityError), store.begin() as session:
        session.add(Lease(holder="ftjob-1", node="here", gpu=0))


@pytest.mark.parametrize("url", ["postgresql://ann:secret@127.0.0.1:1/none", "not a url", "mysql://ann:secret@h/d"])
def test_a_database_that_cannot_be_used_is_an_error_without_the_password(home: Home, url: str) -> None:
    with pytest.raises((ConfigError, ResourceError)) as caught:
        open_store(home, url)
    assert "secret" not in str(caught.value) and caught.value.hint


def test_a_database_that_cannot_be_written_is_a_resource_that_lacks(home: Home, tmp_path: Path) -> None:
    store = open_store(home)
    with store.read() as session:
        session.execute(text("PRAGMA query_only = ON"))
        with pytest.raises(ResourceError, match="cannot be used"), store.begin() as other:
            other.execute(text("PRAGMA query_only = ON"))
            other.add(Lease(holder="a", node="b", gpu=0))
    store.close()


def test_one_owner_of_a_postgresql_at_a_time(postgres: Postgres, home: Home) -> None:
    url = postgres.fresh()
    stores = [open_store(home, url) for _ in range(2)]
    first, second = map(Ownership, stores)
    assert not first.is_sure and first.take() and not second.take()
    assert first.taken_at + SETTLE_S - time.monotonic() <= first.wait_s + 1e-3 <= SETTLE_S + 1e-3
    assert first.holds() and first.is_sure and not second.is_sure and not second.holds()
    first.sign()
    postgres.restart()
    assert not first.holds() and second.take() and first.take_again() is False and not first.is_sure
    second.drop()
    assert first.take_again() and not second.holds(), "nobody has begun meanwhile"
    first.drop()
    assert second.take()
    second.sign()
    second.drop()
    assert first.take_again() is False and not first.is_sure, "another had begun"
    assert first.take() and first.holds()
    first.sign()
    postgres.stop()
    assert not first.holds() and first.take_again() is None
    postgres.start()
    assert first.take_again() and first.holds()
    for ownership, store in zip((first, second), stores, strict=True):
        ownership.drop()
        store.close()


def test_a_look_counts_for_a_while(postgres: Postgres, home: Home) -> None:
    store = open_store(home, postgres.fresh())
    ownership = Ownership(store)
    assert ownership.take()
    ownership.seen_at -= FRESH_S
    assert not ownership.is_sure and ownership.holds() and ownership.is_sure
    ownership.drop()
    assert not ownership.is_sure
    store.close()


def test_of_sqlite_the_lock_file_decides(home: Home) -> None:
    store = open_store(home)
    ownership = Ownership(store)
    assert ownership.take() and ownership.holds() and ownership.is_sure and ownership.wait_s == 0.0
    ownership.drop()
    store.close()
    first, second = HomeLock(home), HomeLock(home)
    assert first.take("http://a/v1") and not second.take("http://b/v1") and second.owner() == "http://a/v1"
    first.drop()
    assert second.take("http://b/v1") and first.owner() == "http://b/v1"
    second.drop()


def test_a_postgresql_that_is_unplugged_is_noticed(postgres: Postgres, home: Home) -> None:
    store = open_store(home, f"{postgres.fresh()}?connect_timeout=3")
    raw = store.engine.raw_connection()
    known: dict[str, str] = raw.driver_connection.info.get_parameters()  # type: ignore[union-attr]
    raw.close()
    assert known["connect_timeout"] == "3" and known["tcp_user_timeout"] == "20000" and known["keepalives_idle"] == "10"
    assert "tcp_user_timeout" in dbos_url(store.url, home)
    store.close()


def test_a_model_of_a_base_with_a_long_name_is_kept(store: Store) -> None:
    name = f"ft:{'b' * 300}:ann::1"
    job_id = new_job(store, fine_tuned_model=name)
    with store.begin() as session:
        session.add(Checkpoint(job_id=job_id, step=1, model=f"{name}:ckpt-step-1", adapter="a@v1", metrics={}))
        session.add(Permission(model=name, tenant="bob", granted_by="ann"))
    with store.read() as session:
        assert session.scalars(select(Job.fine_tuned_model)).one() == name

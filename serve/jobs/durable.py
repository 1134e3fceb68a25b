"""DBOS, which carries an attempt of a job through a `kill -9`: what was begun goes on at the next start, where it was.

A workflow is one attempt, with three steps: begin, follow, settle. DBOS notes which are over; a server that starts
finds the others pending and runs them again, so each of them has to be fit to be done twice. Which job starts, and
where, is no affair of DBOS's: its queues count jobs, not GPUs (docs/decisions/0012-what-dbos-is-for.md).

One of these a process, because there is one DBOS a process. It opens no port and sends nothing anywhere.

    >>> durable = Durable(store.url, home, work)
    >>> durable.start()
    >>> durable.ensure("ftjob-1", attempt=1)
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy.engine import URL

from loraport.clients.errors import ResourceError
from loraport.clients.home import Home

DATABASE = "jobs-dbos.sqlite"
# Pinned: with a version of its own for each change of our code, what is pending would stay so after an upgrade. To be
# raised when the steps below become others; nothing may be pending then.
VERSION = "1"
EXECUTOR = "loraport"  # whoever serves from this database goes on with what the one before left
NEVER_S = 3600.0
LEAVE_S = 10.0  # for steps under way to see that the server ends
OVER = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")


class Leaving(BaseException):
    """The server ends, and this step goes on at its next start.

    No Exception: DBOS would write one down as how the step ended.
    """


class Work(Protocol):
    """What an attempt of a job is. Each may be done again after it was done in part."""

    def begin(self, job_id: str, attempt: int) -> dict[str, Any] | None:
        """Start the trainer; the error where that cannot be."""

    def follow(self, job_id: str, attempt: int) -> None:
        """Tell what it says, until it has ended."""

    def settle(self, job_id: str, attempt: int, error: dict[str, Any] | None) -> None:
        """Give the job its next status. `error`: why it did not begin."""

    def give_up(self, job_id: str, attempt: int, bug: Exception) -> None:
        """One of the above has a bug: end the trainer and the job."""


class Durable:
    """Runs attempts. `start` before `ensure`; `close` returns when DBOS is gone."""

    def __init__(self, url: URL, home: Home, work: Work) -> None:
        self.url, self.home, self.work = url, home, work
        self.workflow: Any = None
        self.under_way = UnderWay()

    def start(self) -> None:
        """Launch DBOS; attempts that an earlier server left pending go on. ResourceError where its database is away."""
        from dbos import DBOS
        from sqlalchemy.exc import DBAPIError

        if self.workflow is not None:
            return

        logging.getLogger("dbos").setLevel(logging.ERROR)  # before it has read its settings, it speaks
        self.workflow = register(self.work, self.under_way)
        DBOS(
            config={
                "name": "loraport",
                "system_database_url": dbos_url(self.url, self.home),
                "application_version": VERSION,
                "executor_id": EXECUTOR,
                "log_level": "ERROR",
                "enable_otlp": False,
                "use_listen_notify": False,
                "notification_listener_polling_interval_sec": 0.25,
                "scheduler_polling_interval_sec": NEVER_S,
            }
        )
        try:
            DBOS.launch()
        except DBAPIError as error:
            self.workflow = None
            DBOS.destroy(destroy_registry=True)
            reason = str(error.orig).strip().splitlines()[0].rstrip(".")
            raise ResourceError(f"the database of DBOS cannot be used: {reason}.", "see whether it runs") from error

    def ensure(self, job_id: str, attempt: int, is_stuck: bool = False) -> None:
        """Have an attempt run, if it does not yet: once, however often this is called.

        `is_stuck`: DBOS has had time enough to go on with what it has pending, and does not.
        """
        from dbos import DBOS, SetWorkflowID

        name = f"{job_id}.{attempt}"
        count = 0
        while (known := DBOS.get_workflow_status(name)) is not None:
            if known.status not in OVER and not is_stuck:
                return
            count += 1  # it is over for DBOS and not for us: the server was killed in between, or has a bug
            name = f"{job_id}.{attempt}.{count}"
        with SetWorkflowID(name):
            DBOS.start_workflow(self.workflow, job_id, attempt)

    def forget(self, before: float) -> None:
        """Remove what DBOS remembers of attempts that were over at that time (seconds since the epoch)."""
        from datetime import UTC, datetime

        from dbos import DBOS

        end = datetime.fromtimestamp(before, UTC).isoformat()
        gone = DBOS.list_workflows(status=list(OVER), end_time=end, load_input=False, load_output=False, limit=1000)
        DBOS.delete_workflows([each.workflow_id for each in gone])

    def be_brief(self) -> None:
        """Have DBOS no longer wait for a database that is gone: a process cannot end before its threads.

        DBOS offers no way to say so; without it they try for ever, and a server without its PostgreSQL cannot be
        stopped. A wait that has begun goes on: about as long as the database was gone by then, 90 seconds at most.
        """
        from dbos import _dbos

        logging.getLogger("dbos").setLevel(logging.CRITICAL)  # what fails now is what was to fail
        database = getattr(getattr(_dbos, "_dbos_global_instance", None), "_sys_db_field", None)
        if database is not None:
            database._retry_connection_errors = False

    def close(self) -> None:
        """End DBOS. Steps under way have to raise Leaving, or end."""
        from dbos import DBOS

        if self.workflow is None:
            return
        self.under_way.wait(LEAVE_S)  # a step that ends now is written down
        DBOS.destroy(destroy_registry=True)
        self.workflow = None


def register(work: Work, under_way: "UnderWay") -> Any:
    """The workflow of an attempt, known to DBOS by name.

    A bug of ours is dealt with inside the step that has it. What comes out of a step is DBOS's own trouble, which is no
    matter of the job: it is left as it is, and `ensure` finds it.
    """
    from dbos import DBOS

    @DBOS.step(name="begin")
    def begin(job_id: str, attempt: int) -> dict[str, Any] | None:
        try:
            return work.begin(job_id, attempt)
        except Exception as bug:
            work.give_up(job_id, attempt, bug)
            return None

    @DBOS.step(name="follow")
    def follow(job_id: str, attempt: int) -> None:
        try:
            work.follow(job_id, attempt)
        except Exception as bug:
            work.give_up(job_id, attempt, bug)

    @DBOS.step(name="settle")
    def settle(job_id: str, attempt: int, error: dict[str, Any] | None) -> None:
        try:
            work.settle(job_id, attempt, error)
        except Exception as bug:
            work.give_up(job_id, attempt, bug)

    @DBOS.workflow(name="attempt")
    def attempt_of_job(job_id: str, attempt: int) -> None:
        with under_way.once(job_id, attempt) as is_first:
            if is_first:
                error = begin(job_id, attempt)
                if error is None:
                    follow(job_id, attempt)
                settle(job_id, attempt, error)

    return attempt_of_job


class UnderWay:
    """The attempts that this process sees to: each once, also where DBOS knows it under two names."""

    def __init__(self) -> None:
        self.attempts: set[tuple[str, int]] = set()
        self.changed = threading.Condition()

    @contextmanager
    def once(self, job_id: str, attempt: int) -> Iterator[bool]:
        """While it lasts, the attempt is under way; False where it is already."""
        with self.changed:
            is_first = (job_id, attempt) not in self.attempts
            self.attempts.add((job_id, attempt))
        try:
            yield is_first
        finally:
            if is_first:
                with self.changed:
                    self.attempts.discard((job_id, attempt))
                    self.changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Until none is, or so long; whether none is."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.attempts, seconds)

    @property
    def jobs(self) -> set[str]:
        """Their jobs."""
        with self.changed:
            return {job_id for job_id, _ in self.attempts}


def dbos_url(url: URL, home: Home) -> str:
    """Where DBOS keeps its own tables: a file beside ours, or the schema `dbos` of the same PostgreSQL."""
    if url.drivername == "sqlite":
        path: Path = home.ensure(home.root) / DATABASE
        path.touch(mode=0o600)
        return f"sqlite:///{path}"
    return url.set(drivername="postgresql").render_as_string(hide_password=False)

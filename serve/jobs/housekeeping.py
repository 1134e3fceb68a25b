"""What has to be cleaned up now and then: leases and checkpoints of jobs that are over, DBOS's memory, others' chores.

Not by DBOS's schedules: each run of one is rows of its database, and it looks for changes of them only every so often;
what is done here depends on nothing but the tables, and may be missed.

    >>> Housekeeping(parts, durable).tend()
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence

from sqlalchemy import select

from loraport.clients.errors import LoraportError
from loraport.clients.terminal import say
from loraport.serve.jobs.durable import Durable
from loraport.serve.jobs.finishing import tidy
from loraport.serve.jobs.parts import Parts
from loraport.serve.pool.pool import ENGINE, lock_leases
from loraport.serve.store.tables import ENDED, Job, Status

EVERY_S = 60.0
REMEMBERED_S = 24 * 3600.0  # by DBOS, of what is over
JOB = "ftjob-"


class Housekeeping:
    """Cleans up every minute, in a thread of its own. `chores`: of others, without arguments; the list may grow."""

    def __init__(self, parts: Parts, durable: Durable, chores: Sequence[Callable[[], object]] = ()) -> None:
        self.parts, self.durable, self.chores = parts, durable, chores
        self.next_at = time.monotonic() + EVERY_S
        self.thread: threading.Thread | None = None

    def tend(self) -> None:
        """Begin to clean up, if it is time and nobody does."""
        if time.monotonic() < self.next_at or (self.thread and self.thread.is_alive()):
            return
        self.next_at = time.monotonic() + EVERY_S
        self.thread = threading.Thread(target=self.clean_up, name="housekeeping", daemon=True)
        self.thread.start()

    def clean_up(self) -> None:
        """All chores; one that fails keeps none of the others."""
        for chore in (lambda: sweep_leases(self.parts, spared=ENGINE), self.sweep_runs, self.forget, *self.chores):
            if self.parts.leaving.is_set():
                return
            try:
                chore()
            except LoraportError as error:
                say(f"warning: cleaning up after fine-tuning jobs: {error.message}", "yellow")
            except Exception as bug:
                say(f"warning: cleaning up after fine-tuning jobs: {type(bug).__name__}: {bug}", "yellow")

    def sweep_runs(self) -> None:
        """Remove checkpoints of jobs that are over: who cancels one that waits does not.

        Those of a job that nobody here knows stay: it may be another database's.
        """
        folders = [path for path in (self.parts.home.root / "runs").glob(f"{JOB}*") if path.is_dir()]
        with self.parts.store.read() as session:
            asked = select(Job.id).where(Job.id.in_([path.name for path in folders]), Job.status.in_(ENDED))
            over = set(session.scalars(asked))
        for path in folders:
            if path.name in over:
                shutil.rmtree(path, ignore_errors=True)
                tidy(self.parts, path.name)

    def forget(self) -> None:
        """Have DBOS forget what is long over."""
        self.durable.forget(time.time() - REMEMBERED_S)


def sweep_leases(parts: Parts, spared: str | None = None) -> None:
    """End all leases but those of jobs that run, and of holders whose names begin with `spared`."""
    with parts.store.begin() as session:
        lock_leases(session)  # a job that is admitted meanwhile has its lease before it is seen to run
        running = set(session.scalars(select(Job.id).where(Job.status == Status.RUNNING)))
        parts.placer.pool.sweep(
            session, lambda holder: holder in running or (spared is not None and holder.startswith(spared))
        )

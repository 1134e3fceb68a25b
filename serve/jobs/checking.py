"""The jobs whose files are checked: a few at a time, in fair turns, each in a thread. What is found is written down.

Not by DBOS: a check that was cut off is simply done again, because the job still says `validating_files`, and whose
turn it is depends on who had one already, which a queue of DBOS does not know.

    >>> checking = Checking(parts, validator)
    >>> checking.tend()                 # as often as the queue looks
"""

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy import and_, or_, select, update

from loraport.clients.terminal import say
from loraport.serve.jobs.durable import Leaving
from loraport.serve.jobs.finishing import load_job
from loraport.serve.jobs.leftovers import tidy
from loraport.serve.jobs.order import Running, Waiting, choose
from loraport.serve.jobs.parts import Parts
from loraport.serve.jobs.validate import Fit, Found, Later, Unfit
from loraport.serve.jobs.words import failure
from loraport.serve.pool.policy import Needs, impossible
from loraport.serve.store.changes import move, tell
from loraport.serve.store.tables import Event, Job, Status

LOOK_S = 1.0  # between two looks whether a job is still wanted
TO_CHECK = or_(Job.status == Status.VALIDATING, and_(Job.status == Status.QUEUED, Job.config.is_(None)))


class Checker(Protocol):
    """Who says whether a job can be trained: validate.py."""

    def check(self, job: Job, is_over: Callable[[], bool]) -> Found:
        """What is found; None where `is_over` says that nobody wants to know any more."""


class Checking:
    """Runs checks. One thread calls `tend`."""

    def __init__(self, parts: Parts, validator: Checker) -> None:
        self.parts, self.validator = parts, validator
        self.under_way: dict[str, tuple[str, threading.Thread]] = {}  # job: its tenant, its thread
        self.had: Counter[str] = Counter()  # checks of each tenant

    def tend(self) -> None:
        """Begin checks, as many as there may be."""
        self.under_way = {name: found for name, found in list(self.under_way.items()) if found[1].is_alive()}
        room = self.parts.settings.checks
        if len(self.under_way) >= room:
            return
        jobs = self.to_check()
        waiting = [Waiting(job.id, job.tenant, job.seq, priority=job.priority) for job in jobs.values()]
        running = [Running(tenant, 1, 0.0) for tenant, _ in self.under_way.values()]
        used = {tenant: float(count) for tenant, count in self.had.items()}
        for name in choose(waiting, running, used, gpus=room, take=lambda *_: 1, now=0.0):
            self.begin(jobs[name])

    def to_check(self) -> dict[str, Job]:
        """Jobs whose files are to be checked now, by id."""
        with self.parts.store.read() as session:
            asked = select(Job).where(TO_CHECK, Job.not_before <= time.time())
            return {job.id: job for job in session.scalars(asked) if job.id not in self.under_way}

    def begin(self, job: Job) -> None:
        """Check a job in a thread of its own, which lives as long as its processes."""
        self.had[job.tenant] += 1
        thread = threading.Thread(target=self.check, args=(job,), name=f"check-{job.id}", daemon=True)
        self.under_way[job.id] = job.tenant, thread
        thread.start()

    def check(self, job: Job) -> None:
        """Check a job, and write down what is found."""
        try:
            found = self.parts.patient(lambda: self.validator.check(job, Unwanted(self.parts, job.id)))
            self.parts.patient(lambda: self.conclude(job, found))
        except Leaving:
            return
        except Exception as bug:
            say(f"error: job {job.id} failed by a bug of ours: {''.join(traceback.format_exception(bug))}", "red")
            words = failure("server_error", f"the server has a bug ({type(bug).__name__}); its own words say more.")
            self.parts.patient(lambda: self.fail(job.id, words))
        self.parts.wake()

    def conclude(self, job: Job, found: Found) -> None:
        """Queue the job, fail it, or have it checked again later."""
        if isinstance(found, Fit):
            self.queue(job, found)
        elif isinstance(found, Unfit):
            self.fail(job.id, found.error)
        elif isinstance(found, Later):
            self.again(job, found.error)

    def queue(self, job: Job, fit: Fit) -> None:
        """It can be trained: write down what is known, and queue it, unless somebody has paused it meanwhile."""
        needs = Needs(fit.gpus, fit.gpu_bytes, job.may_share, fit.estimated_s)
        with self.parts.store.begin() as session:
            reason = impossible(needs, self.parts.placer.pool.free(session))
            known: dict[str, Any] = {"config": fit.config, "gpus": fit.gpus, "not_before": 0.0}
            known |= {"estimated_s": fit.estimated_s, "gpu_bytes": fit.gpu_bytes, "faults": 0}
            session.execute(update(Job).where(Job.id == job.id, Job.finished_at.is_(None)).values(**known))
            if not reason:
                move(session, job.id, {Status.VALIDATING}, Status.QUEUED)
        if reason:
            self.fail(job.id, failure("insufficient_resources", f"{reason}."))

    def fail(self, job_id: str, error: dict[str, Any]) -> None:
        """It cannot be trained."""
        with self.parts.store.begin() as session:
            move(session, job_id, {Status.VALIDATING, Status.QUEUED}, Status.FAILED, error=error)
        tidy(self.parts, job_id)

    def again(self, job: Job, error: dict[str, Any]) -> None:
        """The machine was at fault: check it again later; a check that dies again and again fails the job."""
        is_lacking = error["code"] == "resources_lacking"
        faults = job.faults + (not is_lacking)
        if faults >= self.parts.settings.attempts:
            self.fail(job.id, error)
            return
        wait_s = self.parts.settings.backoff(max(1, faults))
        with self.parts.store.begin() as session:
            session.execute(update(Job).where(Job.id == job.id).values(faults=faults, not_before=time.time() + wait_s))
            source = f"check {faults} {error['code']}"
            told = select(Event.seq).where(Event.job_id == job.id, Event.source == source)
            if session.scalars(told).first() is None:
                words = f"The files cannot be checked now: {error['message']}"
                tell(session, job.id, words, level="warn", source=source)


class Unwanted:
    """Whether a check is for nothing: its job was cancelled or paused, or the server ends. Looks once a second."""

    def __init__(self, parts: Parts, job_id: str) -> None:
        self.parts, self.job_id = parts, job_id
        self.looked = time.monotonic()
        self.is_over = False

    def __call__(self) -> bool:
        if self.parts.leaving.is_set() or self.parts.stopping.is_set():
            return True
        if not self.is_over and time.monotonic() - self.looked > LOOK_S:
            self.looked = time.monotonic()
            job = self.parts.patient(lambda: load_job(self.parts.store, self.job_id))
            self.is_over = job is None or job.status not in (Status.VALIDATING, Status.QUEUED)
        return self.is_over

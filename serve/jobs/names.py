"""What fine-tuned models are called, and who may know them.

    ft:{base}:{org}:{suffix}:{id}           the result of a job, for clients; `…:ckpt-step-40` a checkpoint of it
    ftjob-3f…, ftjob-3f….step-40            the same as adapters, for the engine and the home; for no client

A model is there from the moment in which its job succeeded, until it is deleted: then its job has no `adapter` any
more. Nothing is loaded here: handover.py.

    >>> model_name(job)
    'ft:reader-9m:loraport:support:9f86d081884c'
    >>> Names(store).find("ft:reader-9m:loraport:support:9f86d081884c").reference
    'ftjob-9f86d081884c7d659a2feaa0@v1'
"""

import time
from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, exists, or_, select
from sqlalchemy.orm import Session

from loraport.clients.errors import ResourceError
from loraport.serve.gateway.tuned import PUBLIC, Tuned
from loraport.serve.store.store import Store
from loraport.serve.store.tables import Checkpoint, Job, Permission, Status

NOBODY = "-"  # the tenant where no keys are asked for
OURS = "loraport"
SHORT = 12  # hexadecimal digits of a job's id: two jobs of one tenant and suffix never meet in 48 bits
FRESH_S = 1.0  # for which what was found counts: a permission that was taken away ends then


def model_name(job: Job) -> str:
    """The public name of a job's result."""
    org = OURS if job.tenant == NOBODY else job.tenant
    return f"{PUBLIC}{job.model}:{org}:{job.suffix or ''}:{job.id.removeprefix('ftjob-')[:SHORT]}"


def checkpoint_name(job: Job, step: int) -> str:
    """The public name of a checkpoint."""
    return f"{model_name(job)}:ckpt-step-{step}"


def checkpoint_adapter(job_id: str, step: int) -> str:
    """The name of a checkpoint as an adapter."""
    return f"{job_id}.step-{step}"


class Names:
    """Models by their public names, over the store. What was found is remembered for a second."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.found: dict[str, tuple[Tuned, float]] = {}

    def known(self, name: str) -> Tuned | None:
        """The model of that name, where it was looked up just now; never asks the store."""
        tuned, at = self.found.get(name, (None, 0.0))
        return tuned if time.monotonic() - at < FRESH_S else None

    def find(self, name: str) -> Tuned | None:
        """The model of that name, whoever's it is. A store that cannot answer: as it was known last."""
        try:
            with self.store.read() as session:
                tuned = find(session, name)
        except ResourceError:
            if name not in self.found:
                raise
            return self.found[name][0]
        self.forget(name)
        if tuned:
            self.found[name] = (tuned, time.monotonic())
        return tuned

    def listing(self, tenant: str | None) -> list[Tuned]:
        """The models that a tenant may use, None: all; the newest last. A store that cannot answer: those known."""
        try:
            with self.store.read() as session:
                return [*results(session, tenant), *checkpoints(session, tenant)]
        except ResourceError:
            known = [tuned for tuned, _ in list(self.found.values())]
            return [tuned for tuned in known if tenant is None or tenant in {tuned.tenant, *tuned.shared}]

    def forget(self, name: str) -> None:
        """Look that name up anew."""
        self.found.pop(name, None)


def find(session: Session, name: str) -> Tuned | None:
    """The model of that public name, with all who may use it."""
    shared = frozenset(session.scalars(select(Permission.tenant).where(Permission.model == name)))
    job = session.scalars(select(Job).where(is_there(), Job.fine_tuned_model == name)).first()
    if job:
        return result_of(job, shared)
    found = session.execute(pairs().where(Checkpoint.model == name)).first()
    return checkpoint_of(found[0], found[1], shared) if found else None


def results(session: Session, tenant: str | None) -> list[Tuned]:
    """Results of jobs, of a tenant and shared with it."""
    asked = select(Job).where(is_there()).order_by(Job.seq)
    if tenant is not None:
        asked = asked.where(or_(Job.tenant == tenant, is_shared(Job.fine_tuned_model, tenant)))
    return [result_of(job) for job in session.scalars(asked)]


def checkpoints(session: Session, tenant: str | None) -> list[Tuned]:
    """Checkpoints, of a tenant and shared with it."""
    asked = pairs().order_by(Checkpoint.seq)
    if tenant is not None:
        asked = asked.where(or_(Job.tenant == tenant, is_shared(Checkpoint.model, tenant)))
    return [checkpoint_of(found[0], found[1]) for found in session.execute(asked)]


def pairs() -> Select[Job, Checkpoint]:
    """Jobs with each of their checkpoints that can be asked."""
    return select(Job, Checkpoint).join(Checkpoint, Checkpoint.job_id == Job.id).where(is_there())


def is_there() -> ColumnElement[bool]:
    """Whether the models of a job can be asked: it has succeeded, and its result was not deleted."""
    return and_(Job.status == Status.SUCCEEDED, Job.adapter.is_not(None))


def is_shared(model: Any, tenant: str) -> ColumnElement[bool]:
    """Whether a tenant was given a model."""
    return exists().where(and_(Permission.model == model, Permission.tenant == tenant))


def result_of(job: Job, shared: Collection[str] = ()) -> Tuned:
    """The result of a job as the gateway knows it."""
    return Tuned(job.fine_tuned_model or "", job.adapter or "", job.tenant, frozenset(shared), job.model, created(job))


def checkpoint_of(job: Job, checkpoint: Checkpoint, shared: Collection[str] = ()) -> Tuned:
    """A checkpoint as the gateway knows it."""
    return Tuned(checkpoint.model, checkpoint.adapter, job.tenant, frozenset(shared), job.model, created(job))


def created(job: Job) -> int:
    """When a model came to be, in seconds since the epoch."""
    return int(job.finished_at or job.created_at)

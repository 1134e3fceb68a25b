"""Which jobs start now: the order (order.py) and the GPUs (placing.py) in one transaction with the jobs' new status.

A job that runs has its GPUs, and a job that has GPUs runs: both are written together, whenever the server is killed.

    >>> for job_id, attempt in admit(store, placer, settings, time.time()):
    ...     durable.ensure(job_id, attempt)
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, case, func, or_, select
from sqlalchemy.orm import Session

from loraport.serve.jobs.order import Running, Waiting, choose, decayed
from loraport.serve.jobs.settings import QueueSettings
from loraport.serve.pool.placing import Placer
from loraport.serve.pool.policy import Needs
from loraport.serve.store.changes import move
from loraport.serve.store.store import Store
from loraport.serve.store.tables import Job, Lease, Status

FORGOTTEN = 8  # half lives after which use counts for nothing
READY = (Job.status == Status.QUEUED, Job.config.is_not(None))  # those whose rows are checked


@dataclass(frozen=True)
class Queued:
    """A job that waits for GPUs, as the order and the policy want to know it."""

    waiting: Waiting
    needs: Needs
    attempt: int
    started_at: float | None


def admit(store: Store, placer: Placer, settings: QueueSettings, now: float) -> list[tuple[str, int]]:
    """Start what can start: (job, attempt) of each. They run from then on, as far as the tables know."""
    if not is_worth_it(store, placer, now):
        return []
    with store.begin() as session:
        placer.look(session)
        queued = load_queued(session)

        def take(job: Waiting, avoid: str | None) -> int | None:
            return placer.take(session, job.id, queued[job.id].needs, now, avoid)

        names = choose(
            [job.waiting for job in queued.values()],
            load_running(session),
            load_used(session, now, settings.half_life_s),
            gpus=placer.most_gpus,
            take=take,
            now=now,
            free=placer.count_free,
            rules=settings.rules,
        )
        return [(name, attempt) for name in names if (attempt := start(session, placer, queued[name], now))]


def is_worth_it(store: Store, placer: Placer, now: float) -> bool:
    """Whether any job could start. Only looks, which keeps nobody from writing: most of the time none can."""
    with store.read() as session:
        asked = select(func.count(), func.sum(case((Job.may_share, 1), else_=0)))
        count, sharers = session.execute(asked.where(*READY, Job.not_before <= now)).one()
        if not count:
            return False
        placer.look(session)
        return bool(sharers) or any(placer.count_free().values())


def load_queued(session: Session) -> dict[str, Queued]:
    """All jobs that wait for GPUs, by id."""
    asked = select(
        *(Job.id, Job.tenant, Job.seq, Job.gpus, Job.priority, Job.estimated_s, Job.not_before, Job.queued_at),
        *(Job.may_share, Job.gpu_bytes, Job.attempt, Job.started_at),
    ).where(*READY)
    found = {}
    for (
        name,
        tenant,
        seq,
        gpus,
        priority,
        estimated_s,
        not_before,
        since,
        shares,
        held,
        attempt,
        began,
    ) in session.execute(asked):
        may_share = bool(shares and held)
        waiting = Waiting(name, tenant, seq, gpus, priority, estimated_s, not_before, since, may_share)
        found[name] = Queued(waiting, Needs(gpus, held, may_share, estimated_s), attempt, began)
    return found


def load_running(session: Session) -> list[Running]:
    """The jobs that have GPUs."""
    began, node = func.min(Lease.created_at), func.min(Lease.node)  # it lies on one
    asked = select(Job.tenant, Job.gpus, began, Job.estimated_s, node).join(Lease, Lease.holder == Job.id)
    return [Running(*row) for row in session.execute(asked.group_by(Job.seq))]


def load_used(session: Session, now: float, half_life_s: float) -> dict[str, float]:
    """GPU-seconds of each tenant lately: the longer ago, the less they count."""
    is_late: ColumnElement[bool] = or_(Job.finished_at.is_(None), Job.finished_at > now - FORGOTTEN * half_life_s)
    used: dict[str, float] = {}
    for tenant, gpu_s, ended_at in session.execute(
        select(Job.tenant, Job.gpu_s, Job.finished_at).where(Job.gpu_s > 0, is_late)
    ):
        used[tenant] = used.get(tenant, 0.0) + decayed(gpu_s, ended_at or now, now, half_life_s)
    return used


def start(session: Session, placer: Placer, job: Queued, now: float) -> int:
    """Make a job run that has its GPUs; its attempt, 0 where it was cancelled or paused meanwhile."""
    attempt = job.attempt + 1
    fields: dict[str, Any] = {"attempt": attempt, "started_at": job.started_at or now, "wanted": None}
    fields["attempt_bytes"] = Job.progress_bytes  # all that earlier attempts have said was told
    if move(session, job.waiting.id, {Status.QUEUED}, Status.RUNNING, **fields):
        return attempt
    placer.pool.give_back(session, job.waiting.id)
    return 0

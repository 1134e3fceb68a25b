"""What may happen to a job, each in the caller's transaction; and pages of a list, as OpenAI's API asks for them.

A job changes its status here and nowhere else, and only from a status that it has at that moment: of two who want to
end it, one does. What clients are to hear of goes out with the change itself: the event, and the webhooks' deliveries.

    >>> with store.begin() as session:
    ...     if move(session, job_id, {Status.QUEUED}, Status.RUNNING, started_at=now):
    ...         tell(session, job_id, "training begins")
"""

import time
from collections.abc import Collection
from typing import Any, TypeVar

from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session

from loraport.serve.store.tables import ENDED, Delivery, Event, Job, Sequenced, Status, Webhook

Row = TypeVar("Row", bound=Sequenced)
# What a webhook hears of: OpenAI's names.
TOLD = {
    Status.SUCCEEDED: "fine_tuning.job.succeeded",
    Status.FAILED: "fine_tuning.job.failed",
    Status.CANCELLED: "fine_tuning.job.cancelled",
}
WORDS = {
    Status.VALIDATING: "The job's files are to be validated.",
    Status.QUEUED: "The job is queued.",
    Status.RUNNING: "The job has started.",
    Status.PAUSED: "The job is paused; its checkpoint is kept.",
    Status.SUCCEEDED: "The job has successfully completed.",
    Status.FAILED: "The job has failed.",
    Status.CANCELLED: "The job was cancelled.",
}


def move(session: Session, job_id: str, before: Collection[Status], after: Status, **fields: Any) -> bool:
    """Give a job another status, if it has one of `before` now; False otherwise. `fields`: other columns to set.

    Tells the job's events, and at its end its tenant's webhooks.
    """
    now = time.time()
    if after in ENDED:
        fields = {"finished_at": now, "wanted": None, "estimated_finish": None} | fields
    if after is Status.QUEUED:
        fields = {"queued_at": now} | fields
    changed = session.execute(
        update(Job).where(Job.id == job_id, Job.status.in_(before)).values(status=after, **fields).returning(Job.id)
    )
    if changed.scalar_one_or_none() is None:
        return False
    error = fields.get("error") or {}
    words = f"{WORDS[after].rstrip('.')}: {error['message']}" if error.get("message") else WORDS[after]
    tell(session, job_id, words, level="error" if after is Status.FAILED else "info")
    if after in TOLD:
        deliver(session, job_id, TOLD[after])
    return True


def tell(
    session: Session,
    job_id: str,
    message: str,
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
    source: str | None = None,
    is_metrics: bool = False,
    at: float | None = None,
) -> None:
    """Add an event to a job. `source`: whoever tells the same twice is heard once (look before: it is unique)."""
    kind = "metrics" if is_metrics else "message"
    session.add(
        Event(
            job_id=job_id,
            message=message,
            level=level,
            data=data,
            source=source,
            type=kind,
            created_at=at or time.time(),
        )
    )


def deliver(session: Session, job_id: str, kind: str) -> None:
    """Have the webhooks of a job's tenant told, those that asked for that kind."""
    tenant = session.execute(select(Job.tenant).where(Job.id == job_id)).scalar_one()
    for webhook in session.scalars(select(Webhook).where(Webhook.tenant == tenant)):
        if kind in webhook.events:
            session.add(Delivery(webhook_id=webhook.id, type=kind, body={"id": job_id}))


def page(
    session: Session, kind: type[Row], asked: Select[Any], after: str | None, limit: int, is_newest_first: bool = True
) -> tuple[list[Row], bool]:
    """(the rows of a page, whether there are more), after the row of the id `after`; `asked` selects rows of `kind`.

    NoResultFound where `after` is none of those that `asked` selects: a client would else read from the start for ever.
    """
    order = kind.seq.desc() if is_newest_first else kind.seq.asc()
    if after is not None:
        last: Row = session.scalars(asked.where(kind.__table__.c.id == after)).one()
        asked = asked.where(kind.seq < last.seq if is_newest_first else kind.seq > last.seq)
    found: list[Row] = list(session.scalars(asked.order_by(order).limit(limit + 1)))
    return found[:limit], len(found) > limit

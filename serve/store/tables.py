"""The tables of the fine-tuning service, which are its only truth: what is not here did not happen.

    files, uploads, parts        what was sent
    jobs                         what is to be trained, how far it is, and what came of it
    events, checkpoints          what happened in a job, in order
    permissions                  whose models others may use
    leases                       which GPU, or which part of one, is whose
    webhooks, deliveries         who wants to be told, and what is still to be said

Every row belongs to a tenant: the name of an API key, `-` where none is asked for. Times are seconds since the epoch.
`seq` is the order in which rows came, which times alone do not say. Who changes a table here writes a migration too
(migrations/versions); a test compares the two.

    >>> with store.begin() as session:
    ...     session.scalars(select(Job).where(Job.status == "queued").order_by(Job.seq)).all()
"""

import secrets
import time
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, Integer, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# Constraints by rule, so that migrations can name them on both databases.
NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
# SQLite counts up only what is an INTEGER; PostgreSQL needs its 64 bits.
Count = BigInteger().with_variant(Integer, "sqlite")
ID_BYTES = 12  # random, of every id: nobody guesses 96 bits


def new_id(prefix: str) -> str:
    """`file-3f…`: a prefix as OpenAI's, and random hexadecimal digits."""
    return prefix + secrets.token_hex(ID_BYTES)


class Status(StrEnum):
    """Of a job, in OpenAI's words."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)
WAITING = (Status.VALIDATING, Status.QUEUED)


class Table(DeclarativeBase):
    """The base of all tables."""

    metadata = MetaData(naming_convention=NAMES)


class Sequenced(Table):
    """What every table begins with: its order, and when a row was made."""

    __abstract__ = True
    seq: Mapped[int] = mapped_column(Count, primary_key=True, autoincrement=True)
    created_at: Mapped[float] = mapped_column(Double, default=time.time)


class File(Sequenced):
    """A file, whole on disk at files/<id> in the home.

    A deleted one stays a while as a row of that status, which nobody is shown: a page may go on after it.
    """

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(String(64), unique=True, default=lambda: new_id("file-"))
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    rows: Mapped[int | None] = mapped_column(BigInteger)  # of a JSONL file that was counted
    status: Mapped[str] = mapped_column(String(16), default="processed")  # uploaded, processed, error, deleted
    status_details: Mapped[str | None] = mapped_column(Text)
    expires_at: Mapped[float | None] = mapped_column(Double)
    request_sha256: Mapped[str | None] = mapped_column(String(64))  # tells a request that was sent again

    __table_args__ = (Index("ix_files_request", "tenant", "request_sha256"),)


class Upload(Sequenced):
    """A file that comes in parts, which lie at uploads/<id>/ in the home until it is complete."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(String(64), unique=True, default=lambda: new_id("upload_"))
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    filename: Mapped[str] = mapped_column(Text)
    purpose: Mapped[str] = mapped_column(String(32))
    mime_type: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int] = mapped_column(BigInteger)  # as announced
    status: Mapped[str] = mapped_column(String(16), default="pending")  # completed, cancelled, expired
    expires_at: Mapped[float] = mapped_column(Double)
    file_expires_s: Mapped[float | None] = mapped_column(Double)  # seconds that the file is to live, once complete
    file_id: Mapped[str | None] = mapped_column(String(64))
    request_sha256: Mapped[str | None] = mapped_column(String(64))  # tells a request that was sent again

    __table_args__ = (Index("ix_uploads_request", "tenant", "request_sha256"),)


class Part(Sequenced):
    """One part of an upload, at uploads/<upload>/<id>."""

    __tablename__ = "parts"
    id: Mapped[str] = mapped_column(String(64), unique=True, default=lambda: new_id("part_"))
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class Job(Sequenced):
    """A fine-tuning job. What the client said stands as it was said; `config` is the run configuration made of it.

    `wanted` is what somebody has asked for and the queue has not done yet: pause or cancel. `attempt` counts starts of
    the trainer, whatever ended them. `gpu_s`: GPU-seconds spent by all attempts. `request_sha256` tells a request that
    was sent again.
    """

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(64), unique=True, default=lambda: new_id("ftjob-"))
    tenant: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(20), default=Status.VALIDATING)
    wanted: Mapped[str | None] = mapped_column(String(8))

    model: Mapped[str] = mapped_column(Text)
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(BigInteger)
    method: Mapped[dict[str, Any]] = mapped_column(JSON)
    integrations: Mapped[list[Any] | None] = mapped_column(JSON)
    labels: Mapped[dict[str, str] | None] = mapped_column("metadata", JSON)
    options: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)  # ours, of extra_body
    request_sha256: Mapped[str] = mapped_column(String(64))

    config: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    priority: Mapped[int] = mapped_column(Integer, default=0)  # the higher, the earlier
    gpus: Mapped[int] = mapped_column(Integer, default=1)
    gpu_bytes: Mapped[int | None] = mapped_column(BigInteger)  # on each, as planned; None: all of it
    may_share: Mapped[bool] = mapped_column(default=False)  # a GPU with another job
    estimated_s: Mapped[float | None] = mapped_column(Double)  # of training, as planned

    attempt: Mapped[int] = mapped_column(Integer, default=0)
    faults: Mapped[int] = mapped_column(Integer, default=0)  # attempts that the machine failed, not the job
    lost: Mapped[int] = mapped_column(Integer, default=0)  # attempts whose end nobody saw
    not_before: Mapped[float] = mapped_column(Double, default=0.0)
    queued_at: Mapped[float | None] = mapped_column(Double)
    started_at: Mapped[float | None] = mapped_column(Double)
    finished_at: Mapped[float | None] = mapped_column(Double)
    estimated_finish: Mapped[float | None] = mapped_column(Double)
    gpu_s: Mapped[float] = mapped_column(Double, default=0.0)
    progress_bytes: Mapped[int] = mapped_column(BigInteger, default=0)  # of the trainer's progress file, read so far
    attempt_bytes: Mapped[int] = mapped_column(BigInteger, default=0)  # of it, what earlier attempts have said

    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    adapter: Mapped[str | None] = mapped_column(String(96))  # `name@v1` in the home
    fine_tuned_model: Mapped[str | None] = mapped_column(Text, index=True)  # as long as the name of its base
    result_file: Mapped[str | None] = mapped_column(String(64))  # metrics of each step, as CSV
    report_file: Mapped[str | None] = mapped_column(String(64))  # of what was trained and fell short, as HTML
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # code, message, param

    __table_args__ = (
        Index("ix_jobs_tenant_seq", "tenant", "seq"),
        Index("ix_jobs_status_seq", "status", "seq"),
        Index("ix_jobs_request", "tenant", "request_sha256"),
    )


class Event(Sequenced):
    """Something that happened in a job. `source`: place in the progress file, so that none is told twice."""

    __tablename__ = "events"
    id: Mapped[str] = mapped_column(String(64), unique=True, default=lambda: new_id("ftevent-"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    level: Mapped[str] = mapped_column(String(8), default="info")
    type: Mapped[str] = mapped_column(String(8), default="message")  # or metrics
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    source: Mapped[str | None] = mapped_column(String(64))

    __table_args__ = (Index("ix_events_job_id_seq", "job_id", "seq"), UniqueConstraint("job_id", "source"))


class Checkpoint(Sequenced):
    """A state of a job's training that can be asked as a model."""

    __tablename__ = "checkpoints"
    id: Mapped[str] = mapped_column(String(64), unique=True, default=lambda: new_id("ftckpt_"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    step: Mapped[int] = mapped_column(BigInteger)
    model: Mapped[str] = mapped_column(Text, unique=True)
    adapter: Mapped[str] = mapped_column(String(96))
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON)

    __table_args__ = (UniqueConstraint("job_id", "step"),)


class Permission(Sequenced):
    """Another tenant may use a model: OpenAI's `project_id` is the name of its key."""

    __tablename__ = "permissions"
    id: Mapped[str] = mapped_column(String(64), unique=True, default=lambda: new_id("cp_"))
    model: Mapped[str] = mapped_column(Text)
    tenant: Mapped[str] = mapped_column(String(64))  # who may
    granted_by: Mapped[str] = mapped_column(String(64))

    __table_args__ = (UniqueConstraint("model", "tenant"),)


class Lease(Sequenced):
    """A part of a GPU that is somebody's until it is given back: a job's, or the serving engine's (`engine:<port>`)."""

    __tablename__ = "leases"
    holder: Mapped[str] = mapped_column(String(64), index=True)
    node: Mapped[str] = mapped_column(String(255))
    gpu: Mapped[int] = mapped_column(Integer)  # 0 on a machine without: its one slot
    bytes: Mapped[int | None] = mapped_column(BigInteger)  # None: all of it

    __table_args__ = (UniqueConstraint("holder", "node", "gpu"),)


class Owner(Table):
    """Which server has begun with the queue of a PostgreSQL: one row (ownership.py)."""

    __tablename__ = "owners"
    token: Mapped[str] = mapped_column(String(64), primary_key=True)


class Webhook(Sequenced):
    """Where a tenant wants to be told. The secret signs (Standard Webhooks), so it is kept as it is.

    After it was changed, the old one may sign beside it until `old_secret_until`.
    """

    __tablename__ = "webhooks"
    id: Mapped[str] = mapped_column(String(64), unique=True, default=lambda: new_id("we_"))
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(Text)
    events: Mapped[list[str]] = mapped_column(JSON)
    name: Mapped[str | None] = mapped_column(Text)
    updated_at: Mapped[float | None] = mapped_column(Double)
    old_secret: Mapped[str | None] = mapped_column(Text)
    old_secret_until: Mapped[float | None] = mapped_column(Double)


class Delivery(Sequenced):
    """Something to be told to a webhook: written in the same step as what it tells of, gone when it arrived."""

    __tablename__ = "deliveries"
    id: Mapped[str] = mapped_column(String(64), unique=True, default=lambda: new_id("evt_"))
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"), index=True)
    type: Mapped[str] = mapped_column(String(48))
    body: Mapped[dict[str, Any]] = mapped_column(JSON)
    tries: Mapped[int] = mapped_column(Integer, default=0)
    next_at: Mapped[float] = mapped_column(Double, default=time.time, index=True)

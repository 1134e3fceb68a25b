"""From bytes on disk to a row in the store: who may have it, whether it was sent before, and its end.

Files come by two ways, in one piece (files.py) and in parts (uploads.py); both end here.

    >>> file = keep(service, caller, arriving, Wish("rows.jsonl", "fine-tune"))
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from loraport.serve.finetuning.again import fingerprint, sent_before
from loraport.serve.finetuning.disk import Arriving, bad_file
from loraport.serve.finetuning.guard import Caller
from loraport.serve.finetuning.lists import alone
from loraport.serve.finetuning.service import GIB, Service, out_of_quota
from loraport.serve.gateway.refusals import bad_request
from loraport.serve.store.tables import ENDED, File, Job, Part, Upload

PURPOSES = ("fine-tune", "assistants", "batch", "user_data", "vision", "evals")  # what clients may give
CHECKED = "fine-tune"
DELETED = "deleted"
BATCH_S = 30 * 24 * 3600  # after which OpenAI's files for batches end by themselves
LEAST_EXPIRY_S, MOST_EXPIRY_S = 3600, 30 * 24 * 3600
NAME_LENGTH = 512


@dataclass(frozen=True)
class Wish:
    """What a client says of a file. `expires_s`: seconds that it is to live; None: until it is deleted."""

    filename: str
    purpose: str
    expires_s: float | None = None

    def __post_init__(self) -> None:
        """Refusal 400 for what cannot be."""
        if self.purpose not in PURPOSES:
            there = ", ".join(f"'{purpose}'" for purpose in PURPOSES)
            raise bad_request("invalid_value", f"Invalid value for 'purpose': it should be one of {there}.", "purpose")
        if not 0 < len(self.filename) <= NAME_LENGTH:
            message = f"The file's name must have 1 to {NAME_LENGTH} characters."
            raise bad_request("invalid_value", message, "file")

    @property
    def lives_s(self) -> float | None:
        """How long it lives."""
        return self.expires_s if self.expires_s is not None or self.purpose != "batch" else BATCH_S


def expiry(fields: dict[str, str]) -> float | None:
    """`expires_after[anchor]` and `[seconds]` of a form; Refusal 400 for other values than OpenAI's."""
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    number = int(seconds) if seconds and seconds.isascii() and seconds.isdigit() and len(seconds) < 10 else None
    if anchor != "created_at":
        message = "Invalid value for 'expires_after[anchor]': it should be 'created_at'."
        raise bad_request("invalid_value", message, "expires_after[anchor]")
    if number is None or not LEAST_EXPIRY_S <= number <= MOST_EXPIRY_S:
        message = "Invalid value for 'expires_after[seconds]': it should be 3600 to 2592000."
        raise bad_request("invalid_value", message, "expires_after[seconds]")
    return float(number)


def is_there(now: float | None = None) -> ColumnElement[bool]:
    """Whether a file is neither deleted nor expired."""
    return (File.status != DELETED) & or_(File.expires_at.is_(None), File.expires_at > (now or time.time()))


def is_held() -> ColumnElement[bool]:
    """Whether a job that is not over has a link to a file: its bytes are on disk even when it is deleted."""
    is_open, rows = Job.status.not_in(ENDED), Job.validation_file
    named = select(Job.training_file).where(is_open).union_all(select(rows).where(is_open, rows.is_not(None)))
    return File.id.in_(named)


def used_bytes(session: Session, tenant: str) -> int:
    """Bytes of a tenant that are on disk: of files, of deleted ones that jobs hold, of parts of uploads."""
    on_disk = or_(File.status != DELETED, is_held())
    files = select(func.coalesce(func.sum(File.bytes), 0)).where(File.tenant == tenant, on_disk)
    parts = select(func.coalesce(func.sum(Part.bytes), 0)).join(Upload, Upload.id == Part.upload_id)
    pending = parts.where(Upload.tenant == tenant, Upload.status == "pending")
    return int(session.scalar(files) or 0) + int(session.scalar(pending) or 0)


def taker(service: Service, tenant: str, counts: list[int], freed: int = 0) -> Callable[[int], None]:
    """What asks for room before bytes are written: Refusal 429 where the tenant has no more.

    `freed`: bytes that are replaced by those.
    """
    most = service.quotas.disk_bytes
    with service.store.read() as session:
        left = most - used_bytes(session, tenant) + freed

    def take(count: int) -> None:
        if not service.room.take(tenant, count, left):
            raise out_of_quota(f"{most / GIB:,.3g} GiB of files")
        counts.append(count)

    return take


def keep(
    service: Service,
    caller: Caller,
    arriving: Arriving,
    wish: Wish,
    also: Callable[[Session, File], None] = lambda *_: None,
    freed: int = 0,
) -> File:
    """Write the row of a content that has arrived whole, and give it its name. `also`: what happens in the same step.

    `freed`: bytes that it replaces. Refusal 400 for what is no JSONL where it must be, 429 beyond the quota.
    """
    with arriving.settled():
        rows = check(arriving, wish)
        file = record(service, caller, arriving, wish, rows, also, freed)
        if file.id == arriving.id:
            arriving.keep()
    return file


def record(
    service: Service,
    caller: Caller,
    arriving: Arriving,
    wish: Wish,
    rows: int | None,
    also: Callable[[Session, File], None],
    freed: int,
) -> File:
    """The row of a content; that of an earlier one where the same request is sent again."""
    said = f"{wish.filename}\0{wish.purpose}\0{wish.expires_s}\0{arriving.sha256.hexdigest()}"
    found, now = fingerprint(caller, said.encode()), time.time()
    with service.store.begin() as session:
        alone(session, caller.tenant)
        before = sent_before(session, File, caller, found)
        if before is not None and before.status != DELETED:
            return before
        require_room(session, service, caller.tenant, arriving.bytes - freed)
        file = File(
            id=arriving.id,
            tenant=caller.tenant,
            filename=wish.filename,
            purpose=wish.purpose,
            bytes=arriving.bytes,
            sha256=arriving.sha256.hexdigest(),
            rows=rows,
            status="processed",
            created_at=now,
            expires_at=None if wish.lives_s is None else now + wish.lives_s,
            request_sha256=found,
        )
        session.add(file)
        session.flush()
        also(session, file)
    return file


def check(arriving: Arriving, wish: Wish) -> int | None:
    """Rows of a file to train on, None for another; Refusal 400 for what is no JSONL or has nothing in it."""
    if wish.purpose != CHECKED or arriving.lines is None:
        return None
    if arriving.lines.fault:
        raise bad_file(arriving.lines.fault)
    if not arriving.lines.rows:
        raise bad_file("it has no line")
    return arriving.lines.rows


def require_room(session: Session, service: Service, tenant: str, count: int) -> None:
    """Refusal 429 where a tenant may have no further file of so many bytes."""
    quotas = service.quotas
    have = session.scalar(select(func.count()).select_from(File).where(File.tenant == tenant, File.status != DELETED))
    if (have or 0) >= quotas.files:
        raise out_of_quota(f"{quotas.files:,} files")
    require_bytes(session, service, tenant, count)


def require_bytes(session: Session, service: Service, tenant: str, count: int) -> None:
    """Refusal 429 where a tenant may have no more bytes on disk. What arrived beside it may have its row by now."""
    most = service.quotas.disk_bytes
    if used_bytes(session, tenant) + count > most:
        raise out_of_quota(f"{most / GIB:,.3g} GiB of files")

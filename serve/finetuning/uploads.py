"""/v1/uploads: a file in parts, each as large as one request may be, put together when all are there.

    POST /v1/uploads {"filename", "purpose", "bytes", "mime_type", "expires_after"}
    POST /v1/uploads/{id}/parts             a form: data
    POST /v1/uploads/{id}/complete {"part_ids", "md5"}      POST /v1/uploads/{id}/cancel

What is not complete after an hour ends by itself (sweep.py).
"""

import asyncio
import shutil
import time
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from loraport.serve.finetuning.again import fingerprint, sent_before
from loraport.serve.finetuning.disk import Arriving, content, require_space
from loraport.serve.finetuning.guard import Asking, Caller, Guarded, Strict, already
from loraport.serve.finetuning.kept import (
    DELETED,
    LEAST_EXPIRY_S,
    MOST_EXPIRY_S,
    NAME_LENGTH,
    PURPOSES,
    Wish,
    keep,
    require_bytes,
    require_room,
    taker,
)
from loraport.serve.finetuning.lists import alone, one
from loraport.serve.finetuning.multipart import PIECE, form_schema, receive_form
from loraport.serve.finetuning.service import GIB, Service, out_of_quota, taken
from loraport.serve.finetuning.shapes import PartObject, UploadObject
from loraport.serve.gateway.refusals import bad_request
from loraport.serve.store.tables import File, Part, Upload, new_id

LIFE_S = 3600.0
PARTS = 10_000
FORM = form_schema(("data",), {"data": {"type": "string", "format": "binary"}})


class Expiry(Strict):
    """When a file ends."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=LEAST_EXPIRY_S, le=MOST_EXPIRY_S)


class NewUpload(Strict):
    """What is to come."""

    filename: str = Field(min_length=1, max_length=NAME_LENGTH)
    purpose: str = Field(max_length=32, json_schema_extra={"enum": list(PURPOSES)})
    bytes: int = Field(ge=1, le=1 << 53)
    mime_type: str = Field(max_length=255)
    expires_after: Expiry | None = None


class Complete(Strict):
    """The parts in their order; `md5` of the whole, in hexadecimal."""

    part_ids: list[str] = Field(min_length=1, max_length=PARTS)
    md5: str | None = Field(None, max_length=64)


def routes(find: Any) -> APIRouter:
    """The routes; `find` gives the service."""
    router = APIRouter(prefix="/uploads", route_class=Guarded)

    @router.post("", response_model=UploadObject)
    def create_upload(request: Request, body: NewUpload, caller: Asking) -> UploadObject:
        return UploadObject.of(begin(find(), caller, body, request.state.raw))

    @router.post("/{upload_id}/parts", response_model=PartObject, openapi_extra=FORM)
    async def add_part(request: Request, upload_id: str, caller: Asking) -> PartObject:
        return await receive_part(request, find(), caller, upload_id)

    @router.post("/{upload_id}/complete", response_model=UploadObject)
    async def complete_upload(upload_id: str, body: Complete, caller: Asking) -> UploadObject:
        return await complete_in_turn(find(), caller, upload_id, body)

    @router.post("/{upload_id}/cancel", response_model=UploadObject)
    def cancel_upload(upload_id: str, caller: Asking) -> UploadObject:
        service: Service = find()
        with service.store.begin() as session:
            upload = one(session, Upload, caller, "upload", upload_id)
            if not (upload.status == "cancelled" and caller.is_again):
                require_pending(upload)
            end(session, upload, "cancelled")
        shutil.rmtree(service.uploads / upload_id, ignore_errors=True)
        return UploadObject.of(upload)

    return router


def begin(service: Service, caller: Caller, body: NewUpload, raw: bytes) -> Upload:
    """A new upload; Refusal where it would be too large."""
    quotas, now = service.quotas, time.time()
    expires_s = float(body.expires_after.seconds) if body.expires_after else None
    Wish(body.filename, body.purpose, expires_s)
    if body.bytes > quotas.upload_bytes:
        raise bad_request("file_too_large", f"A file may have {quotas.upload_bytes / GIB:,.3g} GiB.", "bytes")
    found = fingerprint(caller, raw)
    with service.store.begin() as session:
        alone(session, caller.tenant)
        before = sent_before(session, Upload, caller, found)
        if before and before.status == "pending" and before.expires_at > now:
            return before
        pending = select(func.count()).select_from(Upload).where(Upload.tenant == caller.tenant)
        if (session.scalar(pending.where(Upload.status == "pending")) or 0) >= quotas.uploads:
            raise out_of_quota(f"{quotas.uploads:,} uploads that are not complete")
        upload = Upload(
            tenant=caller.tenant,
            filename=body.filename,
            purpose=body.purpose,
            mime_type=body.mime_type,
            bytes=body.bytes,
            status="pending",
            created_at=now,
            expires_at=now + LIFE_S,
            file_expires_s=expires_s,
            request_sha256=found,
        )
        session.add(upload)
    return upload


async def receive_part(request: Request, service: Service, caller: Caller, id: str) -> PartObject:
    """Take a part in; nothing is left of it where it is refused."""

    def owner() -> str:
        with service.store.read() as session:
            return require_pending(one(session, Upload, caller, "upload", id)).tenant

    tenant = await service.aside(owner)
    with taken(service.room, tenant) as counts:
        take = await service.aside(taker, service, tenant, counts)
        require_space(service.uploads, service.quotas.part_bytes)
        with Arriving(service.uploads / id, new_id("part_"), service.quotas.part_bytes, take) as arriving:
            await receive_form(request, "data", arriving, service)
            arriving.is_handed = True
            return PartObject.of(await service.aside(keep_part, service, caller, id, arriving))


def keep_part(service: Service, caller: Caller, id: str, arriving: Arriving) -> Part:
    """Write a part's row, while its upload waits for it."""
    with arriving.settled():
        with service.store.begin() as session:
            upload = one(session, Upload, caller, "upload", id)
            alone(session, upload.tenant)
            session.refresh(upload)
            require_part(session, service, require_pending(upload), arriving.bytes)
            require_bytes(session, service, upload.tenant, arriving.bytes)
            part = Part(id=arriving.id, upload_id=id, bytes=arriving.bytes, sha256=arriving.sha256.hexdigest())
            session.add(part)
        arriving.keep()
    return part


def require_part(session: Session, service: Service, upload: Upload, size: int) -> None:
    """Refusal 400 where an upload has enough parts; some come twice, because their answers were lost."""
    counted = select(func.count(), func.coalesce(func.sum(Part.bytes), 0)).where(Part.upload_id == upload.id)
    count, have = session.execute(counted).one()
    if count >= PARTS:
        raise bad_request("too_many_parts", f"An upload may have {PARTS:,} parts.", "data")
    if have + size > 2 * upload.bytes + service.quotas.part_bytes:
        raise bad_request("too_many_bytes", f"The upload was to have {upload.bytes:,} bytes.", "data")


def require_pending(upload: Upload) -> Upload:
    """Refusal 400 for an upload that is over."""
    if upload.status == "pending" and upload.expires_at <= time.time():
        raise already("The upload has expired.")
    if upload.status != "pending":
        raise already(f"The upload is {upload.status} already.")
    return upload


def end(session: Session, upload: Upload, status: str) -> None:
    """Let an upload be over; its parts are no longer known."""
    upload.status = status
    session.execute(delete(Part).where(Part.upload_id == upload.id))


async def complete_in_turn(service: Service, caller: Caller, id: str, body: Complete) -> UploadObject:
    """`complete`, which copies the whole file: one of a tenant at a time, and few of all. Who comes second, waits."""
    while under_way := service.completing.get(caller.tenant):
        await asyncio.wait({under_way})
    copy = asyncio.get_running_loop().run_in_executor(service.copiers, complete, service, caller, id, body)
    service.completing[caller.tenant] = copy
    copy.add_done_callback(lambda _: service.completing.pop(caller.tenant))
    return await copy


def complete(service: Service, caller: Caller, id: str, body: Complete) -> UploadObject:
    """Put the parts together; an upload that cannot be put together stays as it is."""
    with service.store.read() as session:
        upload = one(session, Upload, caller, "upload", id)
        if upload.status == "completed" and caller.is_again:
            return UploadObject.of(upload, made_of(session, upload))
        require_pending(upload)
        known = {part.id: part for part in session.scalars(select(Part).where(Part.upload_id == id))}
        parts = [known[part_id] for part_id in body.part_ids if part_id in known]
        check_parts(upload, parts, body)
        freed = sum(part.bytes for part in known.values())
        require_room(session, service, upload.tenant, upload.bytes - freed)
    require_space(service.files, upload.bytes)
    owner = Caller(caller.key, upload.tenant)  # an admin completes it for its owner
    wish = Wish(upload.filename, upload.purpose, upload.file_expires_s)

    def finish(session: Session, file: File) -> None:
        done = update(Upload).where(Upload.id == id, Upload.status == "pending").values(file_id=file.id)
        if session.execute(done.returning(Upload.id)).scalar_one_or_none() is None:
            raise already("The upload is over already.")
        end(session, session.scalars(select(Upload).where(Upload.id == id)).one(), "completed")

    is_checked = upload.purpose == "fine-tune"
    with taken(service.room, upload.tenant) as counts:
        take = taker(service, upload.tenant, counts, freed)
        with Arriving(service.files, new_id("file-"), upload.bytes, take, is_checked) as arriving:
            copy(service, parts, id, arriving)
            if body.md5 and arriving.md5.hexdigest() != body.md5.lower():
                raise bad_request("md5_mismatch", "The file is not the one of that MD5.", "md5")
            file = keep(service, owner, arriving, wish, finish, freed)
    shutil.rmtree(service.uploads / id, ignore_errors=True)
    upload.status = "completed"
    return UploadObject.of(upload, file)


def made_of(session: Session, upload: Upload) -> File:
    """The file that an upload has become; Refusal 400 where that was deleted since."""
    file = session.scalars(select(File).where(File.id == upload.file_id, File.status != DELETED)).first()
    if file is None:
        raise already("The upload was completed, and its file has been deleted since.")
    return file


def check_parts(upload: Upload, parts: Sequence[Part], body: Complete) -> None:
    """Refusal 400 where these parts are not the whole file."""
    if len(parts) != len(body.part_ids) or len(set(body.part_ids)) != len(body.part_ids):
        message = "Invalid value for 'part_ids': some are none of this upload, or stand there twice."
        raise bad_request("invalid_value", message, "part_ids")
    size = sum(part.bytes for part in parts)
    if size != upload.bytes:
        message = f"The parts have {size:,} bytes, and the upload was to have {upload.bytes:,}."
        raise bad_request("wrong_size", message, "part_ids")


def copy(service: Service, parts: Sequence[Part], id: str, arriving: Arriving) -> None:
    """The contents of parts, one after the other."""
    for part in parts:
        path = content(service.uploads / id, part.id)
        try:
            source = path.open("rb") if path else None
        except FileNotFoundError:
            source = None
        if source is None:
            raise bad_request("part_lost", f"The part {part.id} is gone; send it again.", "part_ids")
        with source:
            while data := source.read(PIECE):
                arriving.write(data)

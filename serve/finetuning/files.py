"""/v1/files: files streamed to disk, listed, read back and deleted.

    POST /v1/files                          a form: file, purpose, expires_after[anchor], expires_after[seconds]
    GET  /v1/files?after&limit&order&purpose
    GET  /v1/files/{id}   DELETE /v1/files/{id}   GET /v1/files/{id}/content

A file to train on is checked while it arrives (lines.py). The content is on disk before its row is written, and its row
before anybody hears of it.
"""

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse

from loraport.serve.finetuning.disk import Arriving, content, drop, hide, require_space
from loraport.serve.finetuning.guard import Asking, Caller, Guarded, nothing
from loraport.serve.finetuning.kept import DELETED, PURPOSES, Wish, expiry, is_there, keep, taker
from loraport.serve.finetuning.lists import After, listing, mine, one, rows_after
from loraport.serve.finetuning.multipart import Form, form_schema, receive_form
from loraport.serve.finetuning.service import Service, taken
from loraport.serve.finetuning.shapes import Deleted, FileObject, Page
from loraport.serve.gateway.refusals import bad_request
from loraport.serve.store.tables import File, new_id

FORM = form_schema(
    ("file", "purpose"),
    {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
)
BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


def routes(find: Any) -> APIRouter:
    """The routes; `find` gives the service."""
    router = APIRouter(route_class=Guarded)

    @router.post("/files", response_model=FileObject, openapi_extra=FORM)
    async def upload_file(request: Request, caller: Asking) -> FileObject:
        return await receive(request, find(), caller)

    @router.get("/files", response_model=Page[FileObject])
    def list_files(
        caller: Asking,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: Annotated[str | None, Query(max_length=100)] = None,
    ) -> Any:
        whole, is_newest_first = mine(File, caller), order == "desc"
        with find().store.read() as session:
            asked = rows_after(session, File, whole, after, limit, is_newest_first).where(is_there())
            asked = asked if purpose is None else asked.where(File.purpose == purpose)
            return listing(session, File, asked, limit, FileObject, is_newest_first)

    @router.get("/files/{file_id}", response_model=FileObject)
    def show_file(file_id: str, caller: Asking) -> FileObject:
        return FileObject.of(existing(find(), caller, file_id))

    @router.get("/files/{file_id}/content", response_class=FileResponse, responses=BINARY)
    def read_file(file_id: str, caller: Asking) -> FileResponse:
        service: Service = find()
        file = existing(service, caller, file_id)
        path = content(service.files, file.id)
        if path is None:
            raise nothing("content of the file", file_id)
        return FileResponse(path, media_type="application/octet-stream", filename=file.filename)

    @router.delete("/files/{file_id}", response_model=Deleted)
    def delete_file(file_id: str, caller: Asking) -> Deleted:
        remove(find(), caller, file_id)
        return Deleted(id=file_id, object="file")

    return router


async def receive(request: Request, service: Service, caller: Caller) -> FileObject:
    """Take a file in; nothing is left of it where it is refused, or where the client or the server goes away."""
    quotas, declared = service.quotas, request.headers.get("content-length", "")
    with taken(service.room, caller.tenant) as counts:
        take = await service.aside(taker, service, caller.tenant, counts)
        require_space(service.files, min(int(declared), quotas.file_bytes) if declared.isdigit() else 0)
        with Arriving(service.files, new_id("file-"), quotas.file_bytes, take, is_checked=True) as arriving:
            form = await receive_form(request, "file", arriving, service)
            wish, arriving.is_handed = wish_of(form), True
            return FileObject.of(await service.aside(keep, service, caller, arriving, wish))


def wish_of(form: Form) -> Wish:
    """What a form says of its file; Refusal 400 where that is too little or too much."""
    known = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
    if unknown := sorted(set(form.fields) - known):
        name = unknown[0][:100]
        raise bad_request("unknown_parameter", f"Unknown parameter: '{name}'.", name)
    if "purpose" not in form.fields:
        raise bad_request("missing_required_parameter", "Missing required parameter: 'purpose'.", "purpose")
    return Wish(form.filename or "", form.fields["purpose"], expiry(form.fields))


def existing(service: Service, caller: Caller, id: str) -> File:
    """A file that is there; Refusal 404."""
    with service.store.read() as session:
        found = session.scalars(mine(File, caller).where(File.id == id, is_there())).first()
    if found is None:
        raise nothing("file", id)
    return found


def remove(service: Service, caller: Caller, id: str) -> None:
    """Delete a file. Jobs that use it keep what they need: they have links of their own.

    A row of it stays for a while, so that a client that deletes while it lists can go on after it, and so that a
    request that is sent again gets the same answer; and as long as a job holds its bytes, which count.
    """
    with service.store.begin() as session:
        file = one(session, File, caller, "file", id)
        if file.status == DELETED:
            if caller.is_again:
                return
            raise nothing("file", id)
        hide(service.files, file.id)
        file.status, file.filename, file.expires_at = DELETED, "", time.time()
    drop(service.files, id)

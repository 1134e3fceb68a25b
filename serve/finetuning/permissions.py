"""Who else may use a fine-tuned model, or a checkpoint of one.

    GET/POST /v1/fine_tuning/checkpoints/{model}/permissions     DELETE …/permissions/{id}

OpenAI's projects are tenants here: names of API keys. A model is shared by its owner or an admin; who it is shared with
uses it, and neither shares nor deletes it. Deleting a model is the gateway's (serve/gateway/tuned.py).
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from loraport.serve.finetuning.guard import Asking, Caller, Guarded, Strict, nothing
from loraport.serve.finetuning.lists import After, alone, listing, mine, rows_after
from loraport.serve.finetuning.service import Service
from loraport.serve.finetuning.shapes import Deleted, Page, PermissionObject
from loraport.serve.gateway.keys import NAME
from loraport.serve.gateway.refusals import bad_request
from loraport.serve.jobs.names import is_there
from loraport.serve.store.tables import Checkpoint, Job, Permission

MOST = 100
Named = Annotated[str, Field(min_length=1, max_length=64, pattern=f"^{NAME.pattern}$")]


class Grant(Strict):
    """Who is to use a model."""

    project_ids: list[Named] = Field(min_length=1, max_length=MOST)


def routes(find: Any) -> APIRouter:
    """The routes; `find` gives the service."""
    router = APIRouter(route_class=Guarded)
    base = "/fine_tuning/checkpoints/{model:path}/permissions"

    @router.post(base, response_model=Page[PermissionObject])
    def share_model(model: str, body: Grant, caller: Asking) -> Any:
        service: Service = find()
        with service.store.begin() as session:
            owned(session, caller, model)
            made = [PermissionObject.of(row) for row in grant(session, caller, model, body.project_ids)]
        return Page[PermissionObject](data=made, first_id=made[0].id, last_id=made[-1].id)

    @router.get(base, response_model=Page[PermissionObject])
    def list_permissions(
        model: str,
        caller: Asking,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 10,
        order: Literal["ascending", "descending"] = "descending",
        project_id: Annotated[str | None, Query(max_length=64)] = None,
    ) -> Any:
        is_newest_first = order == "descending"
        with find().store.read() as session:
            owned(session, caller, model)
            whole = select(Permission).where(Permission.model == model)
            asked = rows_after(session, Permission, whole, after, limit, is_newest_first)
            asked = asked if project_id is None else asked.where(Permission.tenant == project_id)
            return listing(session, Permission, asked, limit, PermissionObject, is_newest_first)

    @router.delete(base + "/{permission_id}", response_model=Deleted)
    def unshare_model(model: str, permission_id: str, caller: Asking) -> Deleted:
        with find().store.begin() as session:
            owned(session, caller, model)
            chosen = select(Permission).where(Permission.model == model, Permission.id == permission_id)
            found = session.scalars(chosen).first()
            if found is not None:
                session.delete(found)
            elif not caller.is_again:
                raise nothing("permission", permission_id)
        return Deleted(id=permission_id, object="checkpoint.permission")

    return router


def grant(session: Session, caller: Caller, model: str, tenants: list[str]) -> list[Permission]:
    """The permissions of these tenants, each of which there is once."""
    alone(session, model)
    chosen = select(Permission).where(Permission.model == model)
    known = {row.tenant: row for row in session.scalars(chosen)}
    for tenant in tenants:
        if tenant not in known:
            known[tenant] = Permission(model=model, tenant=tenant, granted_by=caller.tenant)
            session.add(known[tenant])
    if len(known) > MOST:
        raise bad_request("too_many_permissions", f"A model can be shared with {MOST} others.", "project_ids")
    session.flush()
    return [known[tenant] for tenant in dict.fromkeys(tenants)]


def owned(session: Session, caller: Caller, model: str) -> Job:
    """The job of a model that is the caller's own; Refusal 404, as the gateway's for any other."""
    jobs = mine(Job, caller).outerjoin(Checkpoint, Checkpoint.job_id == Job.id)
    named = or_(Job.fine_tuned_model == model, Checkpoint.model == model)
    found = session.scalars(jobs.where(is_there(), named)).first()
    if found is None:
        raise nothing("model", model)
    return found

"""/v1/webhook_endpoints: where a tenant wants to be told of its jobs, as OpenAI's client makes and lists them.

    GET/POST /v1/webhook_endpoints    GET/POST/DELETE /v1/webhook_endpoints/{id}    POST …/{id}/rotate_secret   …/test
    GET      /v1/webhook_event_types

The secret is shown once. What is told, and when, is not here: serve/finetuning/sender.py.
"""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import AfterValidator, Field
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from loraport.clients.errors import EndpointError, UsageError
from loraport.serve.finetuning import sender
from loraport.serve.finetuning.guard import AGAIN_S, Asking, Caller, Guarded, Strict, nothing
from loraport.serve.finetuning.lists import After, Limit, alone, listing, mine, one, rows_after
from loraport.serve.finetuning.service import FINAL, Service, out_of_quota
from loraport.serve.finetuning.shapes import Deleted, EventTypes, Page, WebhookObject, WebhookSecret, WebhookTest
from loraport.serve.gateway.access import ANYONE
from loraport.serve.gateway.refusals import Refusal, bad_request
from loraport.serve.store.changes import TOLD
from loraport.serve.store.tables import Webhook

KINDS = tuple(TOLD.values())
OLD_SECRET_S = 24 * 3600.0


def known(value: str) -> str:
    """A kind of event that is told of here."""
    if value not in KINDS:
        raise ValueError(f"Input should be one of {', '.join(KINDS)}")
    return value


Kind = Annotated[str, AfterValidator(known), Field(json_schema_extra={"enum": list(KINDS)})]
Kinds = Annotated[list[Kind], Field(min_length=1, max_length=len(KINDS))]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Url = Annotated[str, Field(min_length=1, max_length=2048, json_schema_extra={"format": "uri"})]


class NewWebhook(Strict):
    """Whom to tell what."""

    name: Name
    url: Url
    event_types: Kinds


class ChangedWebhook(Strict):
    """What is to be otherwise."""

    name: Name | None = None
    url: Url | None = None
    event_types: Kinds | None = None


class Rotation(Strict):
    """Whether the old secret signs too, for a day."""

    keep_old_secret_active_for_24_hours: bool = False


class Sample(Strict):
    """Of what to send a sample."""

    event_type: Kind


def routes(find: Any) -> APIRouter:
    """The routes; `find` gives the service."""
    router = APIRouter(route_class=Guarded)

    @router.get("/webhook_event_types", response_model=EventTypes)
    def list_event_types(caller: Asking) -> EventTypes:
        find()
        return EventTypes(data=list(KINDS))

    @router.post("/webhook_endpoints", response_model=WebhookSecret)
    def create_webhook(body: NewWebhook, caller: Asking) -> WebhookSecret:
        row = create(find(), caller, body)
        return WebhookSecret.of(row, signing_secret=row.secret)

    @router.get("/webhook_endpoints", response_model=Page[WebhookObject])
    def list_webhooks(caller: Asking, after: After = None, limit: Limit = 20) -> Any:
        with find().store.read() as session:
            asked = rows_after(session, Webhook, mine(Webhook, caller), after, limit)
            return listing(session, Webhook, asked, limit, WebhookObject)

    @router.get("/webhook_endpoints/{webhook_id}", response_model=WebhookObject)
    def show_webhook(webhook_id: str, caller: Asking) -> WebhookObject:
        with find().store.read() as session:
            return WebhookObject.of(one(session, Webhook, caller, "webhook endpoint", webhook_id))

    @router.post("/webhook_endpoints/{webhook_id}", response_model=WebhookObject)
    def change_webhook(webhook_id: str, body: ChangedWebhook, caller: Asking) -> WebhookObject:
        return WebhookObject.of(change(find(), caller, webhook_id, body))

    @router.delete("/webhook_endpoints/{webhook_id}", response_model=Deleted)
    def delete_webhook(webhook_id: str, caller: Asking) -> Deleted:
        with find().store.begin() as session:
            found = session.scalars(mine(Webhook, caller).where(Webhook.id == webhook_id)).first()
            if found is not None:
                session.delete(found)
            elif not caller.is_again:
                raise nothing("webhook endpoint", webhook_id)
        return Deleted(id=webhook_id, object="webhook_endpoint.deleted")

    @router.post("/webhook_endpoints/{webhook_id}/rotate_secret", response_model=WebhookSecret)
    def rotate_secret(webhook_id: str, body: Rotation, caller: Asking) -> WebhookSecret:
        row = rotate(find(), caller, webhook_id, body.keep_old_secret_active_for_24_hours)
        return WebhookSecret.of(row, signing_secret=row.secret)

    @router.post("/webhook_endpoints/{webhook_id}/test", response_model=WebhookTest)
    async def test_webhook(webhook_id: str, body: Sample, caller: Asking) -> WebhookTest:
        return await send_sample(find(), caller, webhook_id, body.event_type)

    return router


def create(service: Service, caller: Caller, body: NewWebhook) -> Webhook:
    """A new webhook with a new secret."""
    check_url(body.url, caller, service.private_webhooks)
    row = Webhook(
        tenant=caller.tenant,
        url=body.url,
        secret=sender.new_secret(),
        events=sorted(set(body.event_types)),
        name=body.name,
        updated_at=time.time(),
    )
    with service.store.begin() as session:
        alone(session, caller.tenant)
        if before := made_before(session, caller, row):
            return before
        count = select(func.count()).select_from(Webhook).where(Webhook.tenant == caller.tenant)
        if (session.scalar(count) or 0) >= service.quotas.webhooks:
            raise out_of_quota(f"{service.quotas.webhooks} webhook endpoints")
        session.add(row)
    return row


def made_before(session: Session, caller: Caller, row: Webhook) -> Webhook | None:
    """The webhook of a request that is sent again, with its secret, which nobody has seen."""
    if not caller.is_again:
        return None
    same = select(Webhook).where(Webhook.tenant == caller.tenant, Webhook.url == row.url, Webhook.name == row.name)
    found = session.scalars(same.where(Webhook.created_at > time.time() - AGAIN_S).order_by(Webhook.seq.desc()))
    return next((made for made in found if made.events == row.events and made.id not in caller.answers.heard), None)


def rotate(service: Service, caller: Caller, id: str, is_kept: bool) -> Webhook:
    """A webhook with a new secret; `is_kept`: the old one signs too, for a day. Once, also when it is asked again."""
    now = time.time()
    with service.store.begin() as session:
        row = one(session, Webhook, caller, "webhook endpoint", id)
        is_done = (row.old_secret_until or 0) > now + OLD_SECRET_S - AGAIN_S
        if not (caller.is_again and is_kept and is_done):
            row.old_secret = row.secret if is_kept else None
            row.old_secret_until = now + OLD_SECRET_S if is_kept else None
            row.secret, row.updated_at = sender.new_secret(), now
    return row


def change(service: Service, caller: Caller, id: str, body: ChangedWebhook) -> Webhook:
    """A webhook with another name, address or choice of events."""
    if body.url is not None:
        check_url(body.url, caller, service.private_webhooks)
    with service.store.begin() as session:
        row = one(session, Webhook, caller, "webhook endpoint", id)
        said = (body.name or row.name, body.url or row.url, sorted(set(body.event_types or row.events)))
        if said != (row.name, row.url, row.events):
            row.name, row.url, row.events = said
            row.updated_at = time.time()
    return row


async def send_sample(service: Service, caller: Caller, id: str, kind: str) -> WebhookTest:
    """Send a sample now; Refusal 502 where nobody answers, 429 beside another of that tenant."""

    def find() -> Webhook:
        with service.store.read() as session:
            return one(session, Webhook, caller, "webhook endpoint", id)

    row = await asyncio.to_thread(find)
    if service.test_webhook is None:
        raise Refusal(501, "no_samples", "This endpoint sends no samples.", headers=FINAL)
    if row.tenant in service.sampling:
        words = "Another sample is being sent; wait for its answer."
        raise Refusal(429, "sample_under_way", words, headers={"Retry-After": "2"})
    service.sampling.add(row.tenant)
    try:
        status = await service.test_webhook(row, kind)
    except EndpointError as error:
        raise Refusal(502, "webhook_unreachable", error.message, headers=FINAL) from error
    finally:
        service.sampling.discard(row.tenant)
    return WebhookTest(webhook_endpoint_id=row.id, event_type=kind, status_code=status)


def check_url(url: str, caller: Caller, is_private_fine: bool = False) -> None:
    """Refusal 400 for an address that cannot be told, or that only this machine or its network reaches.

    The latter would let a client of this endpoint send requests from inside. Where there are no keys, and where who
    runs the endpoint allows it, it is fine. A name can mean an inner address all the same: who sends looks again.
    """
    try:
        sender.check_url(url, is_private_fine or caller.tenant == ANYONE.name)
    except UsageError as error:
        raise bad_request("invalid_value", f"Invalid value for 'url': {error.message}", "url") from None

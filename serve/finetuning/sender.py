"""Webhooks: what was written to the outbox (store/changes.py, `deliver`) is sent to who asked for it.

In the form of Standard Webhooks and with OpenAI's bodies, so that its client's `webhooks.unwrap` takes them:

    webhook-id: evt_3f…   webhook-timestamp: 1763810000   webhook-signature: v1,<HMAC-SHA256 of id.timestamp.body>
    {"id": "evt_3f…", "object": "event", "created_at": …, "type": "fine_tuning.job.succeeded", "data": {"id": "ftjob…"}}

A delivery leaves the outbox when its receiver has answered with 2xx, or after the last try, half a day later. What is
interrupted is sent again, so a receiver may hear of a thing twice, with the same id. Each receiver is waited for by
itself. Addresses of this machine and of private networks are refused when the connection is made, whatever a name
meant before; nobody is followed elsewhere. No address and no secret is written to a log.

    >>> webhooks = Webhooks(store)
    >>> webhooks.start()
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from sqlalchemy import delete, select, update
from yarl import URL

from loraport.clients.errors import EndpointError, LoraportError, UsageError
from loraport.serve.jobs.names import NOBODY
from loraport.serve.store.store import Store
from loraport.serve.store.tables import Delivery, Webhook, new_id

log = logging.getLogger("loraport.gateway")
PREFIX = "whsec_"
SECRET_BYTES = 32
LONGEST_URL = 2048
# Seconds until the next try, after each that failed: half a day in all.
RETRY_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 3600.0, 7200.0, 10800.0, 14400.0)
ANSWER_S, CONNECT_S = 15.0, 5.0
LOOK_S = 2.0  # between two looks into the outbox, where nobody wakes it
AT_ONCE, EACH_AT_ONCE = 32, 2  # deliveries under way, and those to one webhook
TENANTS_AT_ONCE = AT_ONCE // 4  # those of one tenant
BATCH = 100
CARRIERS = (
    IPv6Network("64:ff9b::/96"),
    IPv6Network("::/96"),
)  # IPv6 addresses that hold an IPv4 one: NAT64, compatible

Result = TypeVar("Result")


class Private(OSError):
    """An address that webhooks are not sent to."""


def new_secret() -> str:
    """What signs the deliveries to a webhook."""
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def check_url(url: str, allows_private: bool = False) -> None:
    """UsageError for what is no address of a receiver. What its name means is looked up at each delivery."""
    try:
        parts = urlsplit(url)
        host, _ = URL(url).host or "", parts.port  # as aiohttp reads it, whatever digits it is written in
    except ValueError:
        raise UsageError("the URL of a webhook is not one.", "for example https://example.com/hooks") from None
    if parts.scheme not in ("http", "https") or not host or len(url) > LONGEST_URL or not url.isprintable():
        raise UsageError("the URL of a webhook must be https:// or http:// and a host.", "https://example.com/hooks")
    if parts.username is not None or parts.password is not None:
        raise UsageError("the URL of a webhook must not hold a user or password.", "the signature says who sends")
    if not allows_private and (is_private(host) or host.lower().rstrip(".").endswith("localhost")):
        raise UsageError(
            "the URL of a webhook must not be of this machine or a private network.",
            "whoever runs this endpoint may allow it: loraport serve --private-webhooks",
        )


def is_private(host: str) -> bool:
    """Whether an address is none of the public internet; a name is not judged."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    inner: list[IPv4Address | IPv6Address] = [address]
    if isinstance(address, IPv6Address):  # an IPv4 address in another dress
        inner += [each for each in (address.ipv4_mapped, address.sixtofour) if each]
        inner += [IPv4Address(int(address) & 0xFFFFFFFF) for network in CARRIERS if address in network]
    return any(not each.is_global or each.is_multicast for each in inner)


def public_socket(found: tuple[Any, ...]) -> socket.socket:
    """A socket for an address that was found; Private where it is one: the last word, whoever read the URL."""
    family, kind, protocol, _, address = found
    if is_private(str(address[0])):
        raise Private("the address is private")
    return socket.socket(family, kind, protocol)


class Public(AbstractResolver):
    """Looks names up, and leaves out private addresses."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of a name; Private where there are none but such."""
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        public = [entry for entry in found if not is_private(str(entry[4][0]))]
        if not public:
            raise Private("the address is private")
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(hostname=host, host=str(at[0]), port=int(at[1]), family=kind, proto=proto, flags=numeric)
            for kind, _, proto, _, at in public
        ]

    async def close(self) -> None:
        """Nothing is held."""


class Webhooks:
    """The outbox and a thread that empties it. `retry_s`: the pauses between tries, `look_s`: between looks.

    `allows_private`: of all; those of who needs no key may be private anyway, for only this machine can make them.
    """

    def __init__(
        self,
        store: Store,
        allows_private: bool = False,
        retry_s: Sequence[float] = RETRY_S,
        look_s: float = LOOK_S,
    ) -> None:
        self.store, self.allows_private, self.retry_s, self.look_s = store, allows_private, retry_s, look_s
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.run, name="webhooks", daemon=True)
        self.sending: dict[str, tuple[str, str]] = {}  # deliveries under way: (webhook, tenant) of each
        self.tasks: set[asyncio.Task[None]] = set()
        self.news = asyncio.Event()
        self.is_over = False

    def start(self) -> None:
        """Send from now on."""
        self.thread.start()

    def stop(self) -> None:
        """Send no more; what is under way is sent again by the next server."""
        self.is_over = True
        self.wake()
        if self.thread.ident is not None:
            self.thread.join(CONNECT_S)

    def wake(self) -> None:
        """There may be something in the outbox. From any thread."""
        with suppress(RuntimeError):  # it has ended
            self.loop.call_soon_threadsafe(self.news.set)

    async def test(self, webhook: Webhook, kind: str) -> int:
        """Send a sample of an event; the status of the answer, EndpointError without one. From any loop."""
        if self.is_over or not self.thread.is_alive():
            raise EndpointError("the endpoint is being stopped.", "send it again")
        sample = Delivery(id=new_id("evt_"), type=kind, body={"id": "ftjob-sample"}, created_at=time.time())
        try:
            asked = asyncio.run_coroutine_threadsafe(self.try_once(sample, webhook), self.loop)
            return await asyncio.wait_for(asyncio.wrap_future(asked), 2 * ANSWER_S)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise EndpointError(f"the webhook did not answer: {reason_of(error)}.", "is its URL right?") from error

    # What these are made of.

    def run(self) -> None:
        """The thread."""
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self.send_all())
        finally:
            self.loop.close()

    async def send_all(self) -> None:
        """Look, send, wait."""
        while not self.is_over:
            self.news.clear()
            try:
                found = await asyncio.to_thread(self.due)
            except LoraportError:
                found = []  # the database is away: what was written is there when it comes back
            for delivery, webhook in found:
                if self.has_room(webhook):
                    self.sending[delivery.id] = webhook.id, webhook.tenant
                    self.keep(self.send(delivery, webhook))
            if len(found) < BATCH:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), self.look_s)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done beside the rest."""
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def has_room(self, webhook: Webhook) -> bool:
        """Whether one more may be sent there now."""
        webhooks, tenants = full(self.sending)
        return len(self.sending) < AT_ONCE and webhook.id not in webhooks and webhook.tenant not in tenants

    def due(self) -> list[tuple[Delivery, Webhook]]:
        """What is to be sent now, without what cannot be sent beside what is under way."""
        sending = dict(self.sending)
        if len(sending) >= AT_ONCE:
            return []
        webhooks, tenants = full(sending)
        with self.store.read() as session:
            asked = (
                select(Delivery, Webhook)
                .join(Webhook, Webhook.id == Delivery.webhook_id)
                .where(Delivery.next_at <= time.time(), Delivery.id.not_in(sending))
                .where(Webhook.id.not_in(webhooks), Webhook.tenant.not_in(tenants))
                .order_by(Delivery.next_at, Delivery.seq)
                .limit(BATCH)
            )
            return [(found[0], found[1]) for found in session.execute(asked)]

    async def send(self, delivery: Delivery, webhook: Webhook) -> None:
        """One try, and what comes of it."""
        try:
            status = await self.try_once(delivery, webhook)
            problem = "" if 200 <= status < 300 else f"it answered {status}"
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            problem = reason_of(error)
        try:
            await asyncio.to_thread(self.settle, delivery, problem)
        except LoraportError:
            await asyncio.sleep(self.look_s)  # the database is away: it is sent again
        finally:
            del self.sending[delivery.id]
            self.news.set()

    def settle(self, delivery: Delivery, problem: str) -> None:
        """Take a delivery out of the outbox, or say when it is tried again."""
        tries = delivery.tries + 1
        with self.store.begin() as session:
            if not problem or tries > len(self.retry_s):
                session.execute(delete(Delivery).where(Delivery.id == delivery.id))
            else:
                at = time.time() + self.retry_s[tries - 1] * random.uniform(0.8, 1.2)
                session.execute(update(Delivery).where(Delivery.id == delivery.id).values(tries=tries, next_at=at))
        if problem and tries > len(self.retry_s):
            log.error(
                "webhook %s: %s was given up after %d tries: %s", delivery.webhook_id, delivery.id, tries, problem
            )

    async def try_once(self, delivery: Delivery, webhook: Webhook) -> int:
        """The status of the receiver's answer."""
        allows_private = self.allows_private or webhook.tenant == NOBODY
        try:
            check_url(webhook.url, allows_private)
        except UsageError as error:
            raise Private(error.message.rstrip(".")) from error
        body = body_of(delivery)
        guards: dict[str, Any] = {} if allows_private else {"resolver": Public(), "socket_factory": public_socket}
        connector = aiohttp.TCPConnector(force_close=True, **guards)
        timeout = aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=CONNECT_S)
        async with (
            aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False) as client,
            client.post(
                webhook.url,
                data=body,
                headers=headers_of(delivery.id, body, secrets_of(webhook)),
                timeout=timeout,
                allow_redirects=False,
            ) as answer,
        ):
            return answer.status


def full(sending: Mapping[str, tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Webhooks and tenants that nothing more may be sent to now."""
    webhooks, tenants = (Counter(each[at] for each in sending.values()) for at in (0, 1))
    return (
        [webhook for webhook, count in webhooks.items() if count >= EACH_AT_ONCE],
        [tenant for tenant, count in tenants.items() if count >= TENANTS_AT_ONCE],
    )


def body_of(delivery: Delivery) -> bytes:
    """The event, as OpenAI's client reads it."""
    document = {
        "id": delivery.id,
        "object": "event",
        "created_at": int(delivery.created_at),
        "type": delivery.type,
        "data": delivery.body,
    }
    return json.dumps(document, separators=(",", ":")).encode()


def secrets_of(webhook: Webhook) -> list[str]:
    """What signs now: the secret, and the one before while that still may."""
    is_old_valid = webhook.old_secret and (webhook.old_secret_until or 0.0) > time.time()
    return [webhook.secret, *([webhook.old_secret] if is_old_valid and webhook.old_secret else [])]


def headers_of(id: str, body: bytes, signed_with: Sequence[str], now: float | None = None) -> dict[str, str]:
    """The headers of Standard Webhooks, with a signature for each secret."""
    stamp = str(int(time.time() if now is None else now))
    signatures = [f"v1,{sign(secret, id.encode() + b'.' + stamp.encode() + b'.' + body)}" for secret in signed_with]
    return {
        "content-type": "application/json",
        "user-agent": "Loraport",
        "webhook-id": id,
        "webhook-timestamp": stamp,
        "webhook-signature": " ".join(signatures),
    }


def sign(secret: str, content: bytes) -> str:
    """HMAC-SHA256 in base64, with the bytes that a secret stands for."""
    key = base64.b64decode(secret.removeprefix(PREFIX)) if secret.startswith(PREFIX) else secret.encode()
    return base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()


def reason_of(error: Exception) -> str:
    """Why there was no answer, without the address."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Private):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, TimeoutError):
        return "it took too long"
    return "it cannot be reached" if isinstance(error, (aiohttp.ClientConnectionError, OSError)) else "it broke off"

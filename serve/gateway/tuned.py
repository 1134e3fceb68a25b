"""Fine-tuned models: found by their public names, by those who may use them, and loaded when they are asked for.

Clients know them as `ft:…`, the engine as adapters called `ftjob-…`, a name that no client may use or sees: not in
lists, hints, replies or figures. Another's model is answered as one that does not exist. Whose they are and how one is
loaded the gateway is told by `TunedModels` (serve/jobs/handover.py); nothing here knows the store.

    >>> gateway.tuned = models
    >>> model, tuned = await find(gateway, key, "ft:reader-9m:ann:support:9f86d081884c")
    >>> model.asked_as
    'ftjob-9f86d081884c7d659a2feaa0@v1'
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from loraport.clients.errors import AdapterError, LoraportError, ResourceError, VerificationError
from loraport.serve.gateway import models
from loraport.serve.gateway.access import ANYONE, tenant_of
from loraport.serve.gateway.keys import Key
from loraport.serve.gateway.refusals import Refusal, no_route, not_ready
from loraport.serve.gateway.state import RETRY_S, Model, Phase

if TYPE_CHECKING:
    from loraport.serve.gateway.forward import Gateway

log = logging.getLogger("loraport.gateway")
PUBLIC = "ft:"
LOAD_WAIT_S = 60.0  # that a request waits for its model; then its client is told when to come back
MOST_WAITED_FOR = 8  # models that are to be loaded, one after the other
EACH_WAITED_FOR = 2  # of these, for one tenant where there are several
FAILED_S, LONGEST_FAILED_S = 60.0, 3600.0  # before what could not be loaded is tried again: twice as long each time
MOST_FAILED = 1000  # models of which that is remembered
LOOKUPS = 4  # in the store at once
# What a client is told of a load that failed. The error itself may name other models and places of this machine.
WHY_NOT: dict[type[LoraportError], str] = {
    AdapterError: "its files are not what the engine can load",
    VerificationError: "the engine does not answer with it as it did in training",
    ResourceError: "all LoRA slots are in use, or are too small for it",
}
TRIES = 3  # a model may be let go for another between its load and the request

Result = TypeVar("Result")


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model: its public name, the version that it is (`ftjob-…@v1`), whose it is, and who else may use it.

    `base`: as the job named it. `created`: seconds since the epoch.
    """

    name: str
    reference: str
    tenant: str
    shared: frozenset[str] = frozenset()
    base: str = "base"
    created: int = 0

    @property
    def served(self) -> str:
        """What it is called among the models of the engine."""
        return self.reference.partition("@")[0]

    def is_for(self, key: Key) -> bool:
        """Whether a key may use it: its owner's, one it was shared with, an administrator's."""
        return key.is_admin or tenant_of(key) in {self.tenant, *self.shared}


class TunedModels(Protocol):
    """Who knows the fine-tuned models. All but `known` and `used` may wait for others, and raise LoraportError."""

    def known(self, name: str) -> Tuned | None:
        """The model of that public name, if that is known at once."""

    def find(self, name: str) -> Tuned | None:
        """The model of that public name, whoever's it is."""

    def listing(self, tenant: str | None) -> list[Tuned]:
        """The models that a tenant may use; None: all."""

    def used(self, tuned: Tuned) -> None:
        """It was asked for now."""

    def load(self, tuned: Tuned, key: Key) -> None:
        """Have the engines hold it, proven, and tell the gateway; nothing where they do, or where it is the key's no
        longer.
        """

    def delete(self, tuned: Tuned) -> None:
        """Serve it no longer, and remove it for good."""


@dataclass
class Failed:
    """A load that failed: what to say of it, and until when (on the monotonic clock) it is not tried again."""

    refusal: Refusal
    wait_s: float
    until: float


@dataclass
class Loads:
    """Loads that are under way, by the name of what is loaded; one at a time, in a thread of their own.

    `pending`: each with the tenant that asked first. Looking up and removing have threads of their own too: these wait
    for the store and for loads, and nothing else of the gateway is to wait with them.
    """

    pending: "dict[str, tuple[asyncio.Future[None], str]]" = field(default_factory=dict)
    failed: dict[str, Failed] = field(default_factory=dict)
    thread: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "models"))
    lookups: Executor = field(default_factory=lambda: ThreadPoolExecutor(LOOKUPS, "lookups"))
    removals: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "removals"))

    async def wait(self, tuned: Tuned, key: Key, load: Callable[[Tuned, Key], None]) -> None:
        """Until it is loaded; Refusal 503 where that takes too long, goes wrong, or too many wait."""
        task = self.pending[tuned.served][0] if tuned.served in self.pending else self.begin(tuned, key, load)
        await asyncio.wait({task}, timeout=LOAD_WAIT_S)
        if not task.done():
            raise loading("The model is being loaded")
        error = task.exception()
        if isinstance(error, LoraportError):
            raise not_served(tuned, error)
        if error:
            raise error

    def begin(self, tuned: Tuned, key: Key, load: Callable[[Tuned, Key], None]) -> "asyncio.Future[None]":
        """Have it loaded; Refusal 503 where too many wait, or where that failed a short while ago."""
        failed, tenant = self.failed.get(tuned.served), tenant_of(key)
        if failed and time.monotonic() < failed.until:
            raise failed.refusal.again()
        theirs = sum(asked_by == tenant for _, asked_by in self.pending.values())
        most = MOST_WAITED_FOR if tenant == ANYONE.name else EACH_WAITED_FOR
        if len(self.pending) >= MOST_WAITED_FOR or theirs >= most:
            raise loading("Other fine-tuned models are being loaded")
        task = asyncio.get_running_loop().run_in_executor(self.thread, load, tuned, key)
        self.pending[tuned.served] = task, tenant
        task.add_done_callback(lambda done: self.end(tuned, done))
        return task

    def end(self, tuned: Tuned, done: "asyncio.Future[None]") -> None:
        """A load is over; its error has been seen, even if nobody waits for it any more."""
        self.pending.pop(tuned.served, None)
        if done.cancelled():
            return
        error, before = done.exception(), self.failed.pop(tuned.served, None)
        if error:
            log.error("%s could not be loaded: %s: %s", tuned.reference, type(error).__name__, error)
        # That others beside it answer wrongly is no fault of this one.
        if isinstance(error, AdapterError) or (
            isinstance(error, VerificationError) and tuned.reference in error.message
        ):
            wait_s = min(LONGEST_FAILED_S, 2 * before.wait_s) if before else FAILED_S
            self.failed[tuned.served] = Failed(not_served(tuned, error), wait_s, time.monotonic() + wait_s)
            if len(self.failed) > MOST_FAILED:
                del self.failed[next(iter(self.failed))]


async def find(gateway: "Gateway", key: Key, name: str) -> tuple[Model, Tuned | None]:
    """(the model of that name, what it is if it was fine-tuned here), which the engine holds now.

    No other request comes between this and the caller's next step. Refusal 404 where the key has no such model, 503
    where it cannot be had now.
    """
    if gateway.tuned is None or not name.startswith(PUBLIC):
        return models.resolve(gateway.engine.snapshot, key, name), None
    for _ in range(TRIES):
        tuned = await known(gateway, key, name)  # again after each load: it may be gone, or the key's no longer
        if gateway.engine.snapshot.phase is not Phase.READY:
            raise not_ready(gateway.engine.snapshot)
        gateway.tuned.used(tuned)
        if model := gateway.engine.snapshot.find(tuned.reference):
            return model, tuned
        await gateway.loads.wait(tuned, key, gateway.tuned.load)
    raise loading("The slots of the engine are wanted by many models at once")


async def known(gateway: "Gateway", key: Key, name: str) -> Tuned:
    """The fine-tuned model of that name; Refusal 404 where it is none of the key's."""
    assert gateway.tuned is not None
    found = gateway.tuned.known(name)
    if found is None or not found.is_for(key):  # it may have been shared just now
        found = await aside(gateway.loads.lookups, gateway.tuned.find, name)
    if found is not None and found.is_for(key):
        return found
    mine = [tuned.name for tuned in await mine_of(gateway, key)]
    raise models.unknown(name, [*models.names(gateway.engine.snapshot, key), *mine])


async def mine_of(gateway: "Gateway", key: Key) -> list[Tuned]:
    """The fine-tuned models that a key may use."""
    if gateway.tuned is None:
        return []
    return await aside(gateway.loads.lookups, gateway.tuned.listing, None if key.is_admin else tenant_of(key))


async def cards(gateway: "Gateway", key: Key) -> list[dict[str, Any]]:
    """The fine-tuned models of a key as GET /v1/models shows them."""
    return [card(gateway, tuned) for tuned in await mine_of(gateway, key)]


def card(gateway: "Gateway", tuned: Tuned) -> dict[str, Any]:
    """One of them, by its public name alone. It was verified before it was listed, and is so at each load."""
    snapshot = gateway.engine.snapshot
    held, base = snapshot.find(tuned.reference), snapshot.find(tuned.base)
    shown = Model(
        tuned.name,
        "adapter",
        parent=tuned.base,
        max_model_len=base.max_model_len if base else None,
        verified=held.verified if held else True,
        created=tuned.created,
    )
    return models.card(shown) | {"owned_by": tuned.tenant if tuned.tenant != "-" else "loraport"}


async def delete(gateway: "Gateway", key: Key, name: str) -> dict[str, Any]:
    """DELETE /v1/models/{id}; Refusal 403 for a model that is not the key's to delete."""
    if gateway.tuned is None:
        raise no_route("DELETE", f"/v1/models/{name}")
    if not name.startswith(PUBLIC):
        models.resolve(gateway.engine.snapshot, key, name)
        raise Refusal(403, "not_deletable", f"{name} is no fine-tuned model; only these can be deleted.", param="model")
    tuned = await known(gateway, key, name)
    if not key.is_admin and tuned.tenant != tenant_of(key):
        raise Refusal(403, "not_owner", f"{name} was shared with this key; only its owner may delete it.")
    await aside(gateway.loads.removals, gateway.tuned.delete, tuned)
    return {"id": name, "object": "model", "deleted": True}


async def aside(threads: Executor, work: Callable[..., Result], *given: Any) -> Result:
    """Do what blocks in a thread; Refusal 503 where it cannot be done now, whose reason is for the log alone."""
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, work, *given)
    except LoraportError as error:
        log.error("%s: %s", type(error).__name__, error.message)
        words = "The endpoint cannot look up or change its fine-tuned models now; try again."
        raise Refusal(503, "not_now", words, headers={"Retry-After": str(RETRY_S)}) from error


def loading(reason: str) -> Refusal:
    """503: come back soon."""
    return Refusal(503, "model_loading", f"{reason}; try again.", headers={"Retry-After": str(RETRY_S)})


def not_served(tuned: Tuned, error: LoraportError) -> Refusal:
    """503 in words of our own. What time alone will not mend is not to be tried again by the client."""
    words = next((said for kind, said in WHY_NOT.items() if isinstance(error, kind)), None)
    headers = {"x-should-retry": "false"} if words else {"Retry-After": str(RETRY_S)}
    reason = words or "the engine cannot take it now; try again"
    return Refusal(503, "model_not_served", f"{tuned.name} cannot be served: {reason}.", headers=headers)

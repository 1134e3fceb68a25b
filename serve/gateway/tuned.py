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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from loraport.clients.errors import EndpointError, EngineError, LoraportError
from loraport.serve.gateway import models
from loraport.serve.gateway.access import tenant_of
from loraport.serve.gateway.keys import Key
from loraport.serve.gateway.refusals import Refusal, no_route, not_ready
from loraport.serve.gateway.state import RETRY_S, Model, Phase

if TYPE_CHECKING:
    from loraport.serve.gateway.forward import Gateway

PUBLIC = "ft:"
LOAD_WAIT_S = 60.0  # that a request waits for its model; then its client is told when to come back
MOST_WAITED_FOR = 8  # models that are to be loaded, one after the other
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

    def load(self, tuned: Tuned) -> None:
        """Have the engines hold it, proven, and tell the gateway; nothing where they do."""

    def delete(self, tuned: Tuned) -> None:
        """Serve it no longer, and remove it for good."""


@dataclass
class Loads:
    """Loads that are under way, by the name of what is loaded; one at a time, in a thread of their own."""

    tasks: "dict[str, asyncio.Future[None]]" = field(default_factory=dict)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "models"))

    async def wait(self, tuned: Tuned, load: Callable[[Tuned], None]) -> None:
        """Until it is loaded; Refusal 503 where that takes too long, goes wrong, or too many wait."""
        task = self.tasks.get(tuned.served)
        if task is None:
            if len(self.tasks) >= MOST_WAITED_FOR:
                raise loading("Other fine-tuned models are being loaded")
            task = asyncio.get_running_loop().run_in_executor(self.thread, load, tuned)
            self.tasks[tuned.served] = task
            task.add_done_callback(lambda done: self.forget(tuned.served, done))
        await asyncio.wait({task}, timeout=LOAD_WAIT_S)
        if not task.done():
            raise loading("The model is being loaded")
        error = task.exception()
        if isinstance(error, LoraportError):
            raise not_served(tuned, error)
        if error:
            raise error

    def forget(self, served: str, done: "asyncio.Future[None]") -> None:
        """A load is over; its error has been seen, even if nobody waits for it any more."""
        self.tasks.pop(served, None)
        if not done.cancelled():
            done.exception()


async def find(gateway: "Gateway", key: Key, name: str) -> tuple[Model, Tuned | None]:
    """(the model of that name, what it is if it was fine-tuned here), which the engine holds now.

    No other request comes between this and the caller's next step. Refusal 404 where the key has no such model, 503
    where it cannot be had now.
    """
    if gateway.tuned is None or not name.startswith(PUBLIC):
        return models.resolve(gateway.engine.snapshot, key, name), None
    tuned = await known(gateway, key, name)
    for _ in range(TRIES):
        if gateway.engine.snapshot.phase is not Phase.READY:
            raise not_ready(gateway.engine.snapshot)
        gateway.tuned.used(tuned)
        if model := gateway.engine.snapshot.find(tuned.reference):
            return model, tuned
        await gateway.loads.wait(tuned, gateway.tuned.load)
    raise loading("The slots of the engine are wanted by many models at once")


async def known(gateway: "Gateway", key: Key, name: str) -> Tuned:
    """The fine-tuned model of that name; Refusal 404 where it is none of the key's."""
    assert gateway.tuned is not None
    found = gateway.tuned.known(name)
    if found is None or not found.is_for(key):  # it may have been shared just now
        found = await aside(gateway.tuned.find, name)
    if found is not None and found.is_for(key):
        return found
    mine = [tuned.name for tuned in await mine_of(gateway, key)]
    raise models.unknown(name, [*models.names(gateway.engine.snapshot, key), *mine])


async def mine_of(gateway: "Gateway", key: Key) -> list[Tuned]:
    """The fine-tuned models that a key may use."""
    return await aside(gateway.tuned.listing, None if key.is_admin else tenant_of(key)) if gateway.tuned else []


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
    await aside(gateway.tuned.delete, tuned)
    return {"id": name, "object": "model", "deleted": True}


async def aside(work: Callable[..., Result], *given: Any) -> Result:
    """Do what blocks in a thread; Refusal 503 where it cannot be done now."""
    try:
        return await asyncio.to_thread(work, *given)
    except LoraportError as error:
        headers = {"Retry-After": str(RETRY_S)}
        raise Refusal(503, "not_now", error.message, headers=headers, hint=error.hint) from error


def loading(reason: str) -> Refusal:
    """503: come back soon."""
    return Refusal(503, "model_loading", f"{reason}; try again.", headers={"Retry-After": str(RETRY_S)})


def not_served(tuned: Tuned, error: LoraportError) -> Refusal:
    """503 in words that name the model as its owner knows it. What time will not mend is not to be tried again."""
    words = error.message.replace(tuned.reference, tuned.name).replace(tuned.served, tuned.name)
    is_passing = isinstance(error, (EngineError, EndpointError))
    headers = {"Retry-After": str(RETRY_S)} if is_passing else {"x-should-retry": "false"}
    return Refusal(503, "model_not_served", f"{tuned.name} cannot be served: {words}", headers=headers)

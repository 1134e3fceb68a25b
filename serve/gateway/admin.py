"""What an admin key may see and do: the engine's state, keys without their hashes, usage; and the adapters.

    GET    /admin/engine /admin/keys /admin/usage /admin/adapters
    POST   /admin/adapters {"reference": "demo@v2", "name": null}     load, or replace while requests run
    POST   /admin/adapters/{name}/rollback | verify                   DELETE /admin/adapters/{name}
    POST   /v1/load_lora_adapter, /v1/unload_lora_adapter             the same by vLLM's paths and bodies

Who holds the adapters is told to the gateway; nothing here loads one.

    >>> gateway.adapters = live
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from loraport.clients.errors import (
    AdapterError,
    EndpointError,
    LoraportError,
    ResourceError,
    UsageError,
    VerificationError,
)
from loraport.serve.gateway.access import require_admin
from loraport.serve.gateway.calls import MARK
from loraport.serve.gateway.forward import Gateway
from loraport.serve.gateway.models import card
from loraport.serve.gateway.refusals import Refusal, bad_request, not_ready
from loraport.serve.gateway.state import RETRY_S, Phase

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")
# Status and code by kind of error, the most particular first; `loraport adapters` reads the codes.
STATUSES: tuple[tuple[type[LoraportError], int, str], ...] = (
    (UsageError, 400, "wrong_usage"),
    (AdapterError, 422, "adapter_refused"),
    (VerificationError, 422, "verification_failed"),
    (ResourceError, 409, "no_room"),
    (EndpointError, 502, "engine_unreachable"),
    (LoraportError, 503, "engine_not_ready"),
)


class Named(Protocol):
    """What a change of adapters gives back."""

    @property
    def name(self) -> str:
        """What users ask for."""


class Adapters(Protocol):
    """Who holds the engine's adapters (serve/adapters/live.py). All may take a while, and raise LoraportError."""

    def load(self, reference: str, name: str | None = None) -> Named:
        """Serve the adapter that a reference means."""

    def rollback(self, name: str) -> Named:
        """Serve the version before."""

    def verify(self, name: str) -> Named:
        """Replay the golden replies."""

    def unload(self, name: str) -> None:
        """Serve it no longer."""

    def listing(self) -> list[dict[str, Any]]:
        """All of them, as JSON types."""


class Load(BaseModel):
    """Which adapter to load, and under which name if not its own."""

    reference: str = Field(min_length=1)
    name: str | None = None


class VllmLoad(BaseModel):
    """vLLM's own body."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)


class VllmUnload(BaseModel):
    """vLLM's own body."""

    lora_name: str = Field(min_length=1)


def routes(gateway: Gateway) -> APIRouter:
    """The routes under /admin, and vLLM's own to change adapters."""
    router = APIRouter(dependencies=[Depends(admin_only(gateway))])

    @router.get("/admin/engine")
    async def show_engine() -> dict[str, Any]:
        return engine_document(gateway)

    @router.get("/admin/keys")
    async def list_keys() -> dict[str, Any]:
        shown = [asdict(key) for key in gateway.ring.keys]
        return {"keys": [{name: value for name, value in key.items() if name != "sha256"} for key in shown]}

    @router.get("/admin/usage")
    async def show_usage() -> dict[str, Any]:
        return gateway.usage.document()

    router.include_router(adapter_routes())
    router.include_router(vllm_routes())
    return router


def admin_only(gateway: Gateway) -> Any:
    """A dependency that lets admin keys pass."""

    async def check(request: Request) -> None:
        request.scope[MARK].route = "/admin"
        request.scope[MARK].key = require_admin(request.scope, gateway.ring, gateway.settings).name

    return check


def held_by(request: Request) -> Adapters:
    """Who holds the adapters; Refusal 503 where nobody does yet, 501 where nobody ever will."""
    gateway: Gateway = request.app.state.gateway
    if gateway.adapters is None:
        if gateway.engine.snapshot.phase is not Phase.READY:
            raise not_ready(gateway.engine.snapshot)
        raise Refusal(501, "no_adapters", "This endpoint cannot change its adapters while it runs.")
    return gateway.adapters


def changed_by(request: Request) -> Adapters:
    """The same for a change, which waits for an engine that is ready: Refusal 503 until then."""
    adapters, snapshot = held_by(request), request.app.state.gateway.engine.snapshot
    if snapshot.phase is not Phase.READY:
        raise not_ready(snapshot)
    return adapters


Held = Annotated[Adapters, Depends(held_by)]
Changed = Annotated[Adapters, Depends(changed_by)]


async def parsed(request: Request, kind: type[Body]) -> Body:
    """The body of a request; Refusal 400 in words for another shape."""
    try:
        return kind.model_validate_json(await request.body() or b"{}")
    except ValueError:
        fields = ", ".join(f'"{name}"' for name in kind.model_fields)
        raise bad_request("invalid_body", f"The body must be a JSON object with {fields}, which are texts.") from None


def adapter_routes() -> APIRouter:
    """List, load, roll back, verify, unload."""
    router = APIRouter(prefix="/admin")

    @router.get("/adapters")
    async def list_adapters(adapters: Held) -> dict[str, Any]:
        return {"adapters": await aside(adapters.listing)}

    @router.post("/adapters")
    async def load(request: Request, adapters: Changed) -> dict[str, Any]:
        wanted = await parsed(request, Load)
        return await changed(adapters, lambda: adapters.load(wanted.reference, wanted.name))

    @router.post("/adapters/{name}/rollback")
    async def rollback(name: str, adapters: Changed) -> dict[str, Any]:
        return await changed(adapters, lambda: adapters.rollback(name))

    @router.post("/adapters/{name}/verify")
    async def verify(name: str, adapters: Changed) -> dict[str, Any]:
        return await changed(adapters, lambda: adapters.verify(name))

    @router.delete("/adapters/{name}")
    async def unload(name: str, adapters: Changed) -> dict[str, Any]:
        await aside(lambda: adapters.unload(name))
        return {"unloaded": name}

    return router


def vllm_routes() -> APIRouter:
    """vLLM's paths, for tools that know them. The name is ours to resolve: users ask for it as they would of vLLM."""
    router = APIRouter(prefix="/v1")

    @router.post("/load_lora_adapter")
    async def load(request: Request, adapters: Changed) -> PlainTextResponse:
        wanted = await parsed(request, VllmLoad)
        await aside(lambda: adapters.load(wanted.lora_path, wanted.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{wanted.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter")
    async def unload(request: Request, adapters: Changed) -> PlainTextResponse:
        name = (await parsed(request, VllmUnload)).lora_name
        await aside(lambda: adapters.unload(name))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return router


async def aside(work: Callable[[], Result]) -> Result:
    """Do what blocks in a thread; its errors become refusals with hint and evidence."""
    try:
        return await asyncio.to_thread(work)
    except LoraportError as error:
        status, code = next((status, code) for kind, status, code in STATUSES if isinstance(error, kind))
        headers = {"Retry-After": str(RETRY_S)} if status == 503 else None
        raise Refusal(
            status, code, error.message, headers=headers, hint=error.hint, details=list(error.details)
        ) from error


async def changed(adapters: Adapters, change: Callable[[], Named]) -> dict[str, Any]:
    """Make a change and show the adapter as it is then."""
    name = (await aside(change)).name
    listed = await aside(adapters.listing)
    return next((entry for entry in listed if entry["name"] == name), {"name": name})


def engine_document(gateway: Gateway) -> dict[str, Any]:
    """The engine as JSON types."""
    engine = gateway.engine.snapshot
    return {
        "phase": engine.phase,
        "reason": engine.reason,
        "seconds": round(time.monotonic() - engine.since, 1),
        "expected_s": engine.left_s(),
        "is_overdue": engine.is_overdue,
        "running": len(gateway.running),
        "models": [card(model) for model in engine.models],
        "replicas": [
            {"phase": each.phase, "reason": each.reason, "expected_s": each.left_s()} for each in engine.replicas
        ],
    }

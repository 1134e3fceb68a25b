"""What an admin key may see: the engine's state, the keys without their hashes, and what each has used."""

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request

from loraport.serve.gateway.access import require_admin
from loraport.serve.gateway.calls import MARK
from loraport.serve.gateway.forward import Gateway
from loraport.serve.gateway.models import card


def routes(gateway: Gateway) -> APIRouter:
    """The routes under /admin. Further ones that need an admin key: `Depends(admin_only(gateway))`."""
    router = APIRouter(prefix="/admin", dependencies=[Depends(admin_only(gateway))])

    @router.get("/engine")
    async def show_engine() -> dict[str, Any]:
        return engine_document(gateway)

    @router.get("/keys")
    async def list_keys() -> dict[str, Any]:
        shown = [asdict(key) for key in gateway.ring.keys]
        return {"keys": [{name: value for name, value in key.items() if name != "sha256"} for key in shown]}

    @router.get("/usage")
    async def show_usage() -> dict[str, Any]:
        return gateway.usage.document()

    return router


def admin_only(gateway: Gateway) -> Any:
    """A dependency that lets admin keys pass."""

    async def check(request: Request) -> None:
        request.scope[MARK].route = "/admin"
        request.scope[MARK].key = require_admin(request.scope, gateway.ring, gateway.settings).name

    return check


def engine_document(gateway: Gateway) -> dict[str, Any]:
    """The engine as JSON types."""
    engine = gateway.engine.snapshot
    return {
        "phase": engine.phase,
        "reason": engine.reason,
        "seconds": round(time.monotonic() - engine.since, 1),
        "expected_s": engine.left_s(),
        "running": len(gateway.running),
        "models": [card(model) for model in engine.models],
    }

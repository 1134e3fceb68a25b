"""OpenAI's fine-tuning API as routes of the gateway, and their description.

    /v1/files  /v1/uploads  /v1/fine_tuning/jobs  /v1/fine_tuning/checkpoints/{model}/permissions
    /v1/webhook_endpoints                                  GET /v1/openapi.json

The routes are mounted when the gateway is made, which is before there is a store: `find` gives the service at each
request, or raises a Refusal that says why there is none.

    >>> app = create_app(engine, settings, more=[lambda gateway: routes(gateway, lambda: service)])
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from fastapi import APIRouter
from fastapi.openapi.utils import get_openapi

from loraport.serve.finetuning import files, jobs, own, permissions, uploads, webhooks
from loraport.serve.finetuning.guard import Asking, Guarded
from loraport.serve.finetuning.service import Service
from loraport.serve.finetuning.shapes import Error
from loraport.serve.gateway.forward import Gateway

Find = Callable[[], Service]
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Error, "description": "What is wrong with the request"},
    "5XX": {"model": Error, "description": "What this endpoint cannot do now"},
}


def routes(gateway: Gateway, find: Find) -> APIRouter:
    """All of them. `find` is called at each request, after the key was looked at."""
    router = APIRouter(prefix="/v1", responses=ERRORS)
    for part in (files, uploads, jobs, own, permissions, webhooks):
        router.include_router(part.routes(find))

    @cache
    def described() -> dict[str, Any]:
        return description(router)

    described_by = APIRouter(prefix="/v1", route_class=Guarded)

    @described_by.get("/openapi.json")
    def describe(caller: Asking) -> dict[str, Any]:
        return described()

    both = APIRouter()
    both.include_router(router)
    both.include_router(described_by)
    return both


def description(router: APIRouter) -> dict[str, Any]:
    """The routes as OpenAPI."""
    document = get_openapi(title="Loraport: OpenAI's fine-tuning API", version="1", routes=router.routes)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}, {}]
    return document

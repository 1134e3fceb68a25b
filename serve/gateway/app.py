"""The gateway as an ASGI application: an allow-list of routes between clients and the engines.

    POST  /v1/chat/completions /v1/completions /v1/responses /v1/messages /v1/messages/count_tokens
          /v1/embeddings /tokenize /detokenize              to the engine          forward.py
    GET   /v1/models /v1/models/{id} /health /metrics       answered here          below, tuned.py
    DELETE /v1/models/{id}                                  what was fine-tuned    tuned.py
    GET   /admin/engine /admin/keys /admin/usage            admin keys             admin.py
    all else                                                404, never forwarded

Every request goes through the door (calls.py): id, bounds, errors in one shape, a line in the log. The engine is known
by what its keeper says (state.py); nothing here starts, checks or loads anything.

    >>> engine = EngineState()
    >>> app = create_app(engine, GatewaySettings("127.0.0.1", 8000))
    >>> with run_in_thread(app, "127.0.0.1", 8000):                     # open at once, answers 503 …
    ...     engine.ready([Model("base")], base_url="http://127.0.0.1:8001")  # … until the engine is ready
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from loraport.serve.gateway import access, admin, models, tuned
from loraport.serve.gateway.calls import MARK, Call, Door
from loraport.serve.gateway.forward import Forward, Gateway, limited
from loraport.serve.gateway.keys import Key, Ring
from loraport.serve.gateway.limits import Limits
from loraport.serve.gateway.metrics import CONTENT_TYPE, Metrics, without_keys
from loraport.serve.gateway.refusals import Refusal, no_route, not_ready
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState, Phase, Snapshot, Target
from loraport.serve.gateway.upstream import Upstream
from loraport.serve.gateway.usage import Usage

FORWARDED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
PROBE_S = 5.0
FIGURES_S = 1.0  # for the figures of one of several engines: a scrape must not wait for one that hangs


def create_app(
    engine: EngineState, settings: GatewaySettings, more: Sequence[Callable[[Gateway], APIRouter]] = ()
) -> FastAPI:
    """The application; ConfigError where the file of keys is damaged. `app.state.gateway` holds its parts.

    `more`: routes of others, such as those of serve/finetuning/api.py.
    """
    ring, usage = Ring(settings.keys_path), Usage(settings.usage_path)
    gateway = Gateway(engine, settings, ring, Limits(), usage, Metrics(engine), Upstream(engine, settings))
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan(gateway), redirect_slashes=False)
    app.state.gateway = gateway
    own = Own(gateway)
    app.router.routes[:] = [
        *(Route(path, Forward(gateway, path), methods=["POST"]) for path in FORWARDED),
        Route("/v1/models", own.list_models, methods=["GET"]),
        Route("/v1/models/{id:path}", own.show_model, methods=["GET"]),
        Route("/v1/models/{id:path}", own.delete_model, methods=["DELETE"]),
        Route("/health", own.health, methods=["GET"]),
        Route("/metrics", own.metrics, methods=["GET"]),
    ]
    for routes in (admin.routes, *more):
        app.include_router(routes(gateway))
    app.router.routes.append(Route("/{path:path}", Nothing()))
    app.router.default = Nothing()  # a path with a line break in it is none of `path`
    app.add_middleware(Door, header_bytes=settings.header_bytes, done=gateway.done)
    if settings.origins:  # around the door, so that a page can read refusals too
        shown = ["x-request-id", "retry-after"]
        methods = ["GET", "POST", "DELETE"]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=methods,
            allow_headers=["*"],
            expose_headers=shown,
        )
    return app


def lifespan(gateway: Gateway) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Write usage down now and then, and at the end; close the connections to the engine."""

    @contextlib.asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(sweep(gateway))
        try:
            yield
        finally:
            sweeper.cancel()
            gateway.usage.flush()
            await gateway.upstream.close()

    return live


async def sweep(gateway: Gateway) -> None:
    """Every few seconds: drop stalled clients, write usage down."""
    while True:
        await asyncio.sleep(gateway.settings.flush_s)
        gateway.drop_stalled()
        await gateway.usage.flush_aside()


class Nothing:
    """The end of the allow-list."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """404, whatever the method."""
        raise no_route(scope["method"], scope["path"])


class Own:
    """What the gateway answers itself."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    def enter(self, request: Request, route: str) -> Key:
        """The key of a request for a list; Refusal where it has none."""
        call: Call = request.scope[MARK]
        call.route = route
        key = access.authenticate(request.scope, self.gateway.ring, self.gateway.settings)
        call.key = key.name
        return key

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models: those of the key."""
        with limited(self.gateway, key := self.enter(request, "/v1/models")):
            found = models.listing(self.ready(), key)
            found["data"] += await tuned.cards(self.gateway, key)
            return JSONResponse(found)

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        with limited(self.gateway, key := self.enter(request, "/v1/models/{id}")):
            name, snapshot = request.path_params["id"], self.ready()
            if self.gateway.tuned and name.startswith(tuned.PUBLIC):
                return JSONResponse(tuned.card(self.gateway, await tuned.known(self.gateway, key, name)))
            return JSONResponse(models.card(models.resolve(snapshot, key, name)))

    async def delete_model(self, request: Request) -> Response:
        """DELETE /v1/models/{id}: what was fine-tuned, for good."""
        with limited(self.gateway, key := self.enter(request, "/v1/models/{id}")):
            return JSONResponse(await tuned.delete(self.gateway, key, request.path_params["id"]))

    def ready(self) -> Snapshot:
        """The engine; Refusal 503 while it is not ready."""
        snapshot = self.gateway.engine.snapshot
        if snapshot.phase is not Phase.READY:
            raise not_ready(snapshot)
        return snapshot

    async def health(self, request: Request) -> Response:
        """GET /health: 200 when an engine says so itself; without a key, for load balancers."""
        request.scope[MARK].route = "/health"
        answers = await self.ask_all(self.ready().ready, "/health", {}, PROBE_S, enough=200)
        statuses = [status for status, _ in answers.values()]
        if not statuses:
            raise not_ready(self.gateway.engine.snapshot)
        if 200 not in statuses:
            raise Refusal(503, "engine_unhealthy", f"The engine says of itself: {statuses[0]}.", phase="ready")
        return JSONResponse({"status": "ok", "phase": "ready"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: the gateway's figures, then those of the engines that are up."""
        request.scope[MARK].route = "/metrics"
        sees_keys = access.may_see_metrics(request.scope, self.gateway.ring, self.gateway.settings)
        snapshot = self.gateway.engine.snapshot
        are_many = len(snapshot.replicas) > 1
        wait_s = FIGURES_S if are_many else PROBE_S
        answers = await self.ask_all(snapshot.reachable, "/metrics", {"accept": "text/plain"}, wait_s)
        engines = {number: page for number, (status, page) in sorted(answers.items()) if status == 200}
        page = await asyncio.to_thread(self.gateway.metrics.page, engines, are_many)
        if self.gateway.figures:
            page += await asyncio.to_thread(self.gateway.figures)
        page = page if sees_keys else without_keys(page)
        return Response(page, media_type=None, headers={"content-type": CONTENT_TYPE})

    async def ask_all(
        self,
        engines: Mapping[int, Target],
        path: str,
        headers: dict[str, str],
        wait_s: float,
        enough: int | None = None,
    ) -> dict[int, tuple[int, bytes]]:
        """(status, body) of a question to each engine, by its number; without those that are silent for `wait_s`.

        `enough`: the status of an answer after which nobody else is waited for.
        """
        found: dict[int, tuple[int, bytes]] = {}

        async def ask(number: int, target: Target) -> int:
            with contextlib.suppress(Refusal):
                async with self.gateway.upstream.ask("GET", path, None, headers, wait_s, target) as response:
                    found[number] = response.status, await response.read()
                    return response.status
            return 0

        asked = [asyncio.create_task(ask(*known)) for known in engines.items()]
        try:
            for answer in asyncio.as_completed(asked, timeout=wait_s):
                if await answer == enough:
                    break
        except TimeoutError:
            pass
        finally:
            for task in asked:
                task.cancel()
        return found

"""One request to the engine, from its first byte to its last: read, checked, passed on, answered; or ended in words.

The work runs beside a watch on the client: who hangs up ends the work at once, which closes the connection to the
engine, which stops generating.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from loraport.serve.gateway import body as bodies
from loraport.serve.gateway import context
from loraport.serve.gateway.access import ANYONE, authenticate
from loraport.serve.gateway.body import Body
from loraport.serve.gateway.calls import MARK, Call
from loraport.serve.gateway.keys import Key, Ring
from loraport.serve.gateway.limits import Limits
from loraport.serve.gateway.metrics import Metrics
from loraport.serve.gateway.refusals import Refusal, bad_request, broken, not_ready
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState, Model, Phase
from loraport.serve.gateway.tuned import Loads, TunedModels, find
from loraport.serve.gateway.upstream import Upstream, headers_to_engine, is_events, pass_on, send_whole
from loraport.serve.gateway.usage import Usage

if TYPE_CHECKING:
    from loraport.serve.gateway.admin import Adapters


@dataclass
class Gateway:
    """Everything that lives as long as the application; `running` are the requests that are at the engine now."""

    engine: EngineState
    settings: GatewaySettings
    ring: Ring
    limits: Limits
    usage: Usage
    metrics: Metrics
    upstream: Upstream
    running: dict[Call, "asyncio.Task[None]"] = field(default_factory=dict)
    adapters: "Adapters | None" = None  # who changes them, told once there is an engine
    tuned: TunedModels | None = None  # who knows what was fine-tuned here, where anything is
    loads: Loads = field(default_factory=Loads)
    figures: "Callable[[], bytes] | None" = None  # more for /metrics, in Prometheus' form

    def abort(self) -> None:
        """End the requests that are at the engine, each with an error in words. Call it in the event loop."""
        for task in self.running.values():
            task.cancel()

    def drop_stalled(self) -> None:
        """End the requests of clients that have read nothing for as long as a stream may be silent."""
        longest = time.monotonic() - self.settings.idle_s
        for call, task in self.running.items():
            if call.sending_since is not None and call.sending_since < longest:
                call.is_gone = True
                task.cancel()

    def done(self, call: Call) -> None:
        """Count a request that is over."""
        self.metrics.count(call)
        if call.is_engine_call:
            self.usage.count(call.key, call.status, call.tokens, replies=call.route in bodies.LIMIT_FIELDS)


class Forward:
    """The ASGI endpoint of one route that the engine answers."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self.gateway, self.path = gateway, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Key, limits and phase, before the body is read; then the rest."""
        call: Call = scope[MARK]
        call.route, call.is_engine_call = self.path, True
        gateway = self.gateway
        key = authenticate(scope, gateway.ring, gateway.settings)
        call.key = key.name
        with limited(gateway, key):
            if gateway.engine.snapshot.phase is not Phase.READY:
                raise not_ready(gateway.engine.snapshot)
            body = bodies.parse(await read_body(scope, receive, gateway.settings), gateway.settings.json_depth)
            if gateway.engine.snapshot.phase is not Phase.READY:  # its body took a while to arrive
                raise not_ready(gateway.engine.snapshot)
            model, known = await find(gateway, key, bodies.model_name(body))
            call.model, call.asked_as = known.name if known else model.id, model.asked_as
            call.shown_as = known.name if known else None
            with gateway.metrics.in_flight.track_inprogress():
                await beside_client(self.work(scope, call, body, model, send), call, gateway, receive, send)

    async def work(self, scope: Scope, call: Call, body: Body, model: Model, send: Send) -> None:
        """Change what must be changed, refuse what cannot fit, pass on the rest."""
        bodies.move_thinking(self.path, body)
        bodies.fill_defaults(self.path, body, model.defaults)
        bodies.rename_model(body, model.asked_as)
        await self.refuse_overflow(body, model)
        call.hides_usage = bodies.ask_usage(self.path, body)
        settings, headers = self.gateway.settings, headers_to_engine(scope["headers"], call)
        read_s = settings.idle_s if body.is_stream else settings.reply_s
        async with self.gateway.upstream.ask("POST", self.path, body.raw, headers, read_s) as response:
            if response.status >= 400 and not is_events(response):
                raw = await response.read()
                await self.explain(response.status, words_of(raw), body)
                if call.shown_as and call.asked_as:
                    raw = raw.replace(call.asked_as.encode(), call.shown_as.encode())
                await send_whole(response, raw, send)
            else:
                await pass_on(response, call, send)

    async def refuse_overflow(self, body: Body, model: Model) -> None:
        """Refusal 400 where prompt and wanted reply are longer than the context; the engine counts only in doubt."""
        limit, wanted = model.max_model_len, bodies.wanted_tokens(self.path, body)
        if limit is None or wanted is None or context.fits_surely(self.path, body, limit, wanted):
            return
        prompt = await self.count(body)
        if wanted >= limit or (prompt is not None and prompt + wanted > limit):
            raise context.overflow(self.path, limit, prompt, wanted)

    async def count(self, body: Body) -> int | None:
        """Tokens of the longest prompt, by the engine's own tokenizer; None where it does not say."""
        questions = context.token_questions(self.path, body)
        wait_s = self.gateway.settings.tokenize_s
        asked = [self.gateway.upstream.ask_json(route, question, wait_s) for route, question in questions]
        answers = [answer.get("count", answer.get("input_tokens")) for answer in await asyncio.gather(*asked) if answer]
        return max([context.counted(body), *(count for count in answers if isinstance(count, int))]) or None

    async def explain(self, status: int, message: str, body: Body) -> None:
        """Refusals of the engine that we word better; what is not one of them passes as it is."""
        if status == 404 and message == "Not Found":
            raise Refusal(404, "unsupported_by_engine", f"The engine does not offer {self.path} for this model.")
        if status == 500 and DEAD_CORE in message:
            raise broken(self.gateway.engine.snapshot)
        said = context.read_overflow(message) if status == 400 else None
        if said is not None:
            wanted = bodies.wanted_tokens(self.path, body)
            prompt = said.prompt if said.is_exact else await self.count(body)
            is_exact = prompt is not None and prompt >= (said.prompt or 0)  # a count without tools may be too low
            raise context.overflow(self.path, said.limit, prompt if is_exact else said.prompt, wanted, is_exact)


@contextlib.contextmanager
def limited(gateway: Gateway, key: Key) -> Iterator[None]:
    """Count a request in and out against its key's limits; nobody's key has none."""
    if key is ANYONE:
        yield
        return
    gateway.limits.enter(key)
    try:
        yield
    finally:
        gateway.limits.leave(key)


async def read_body(scope: Scope, receive: Receive, settings: GatewaySettings) -> bytes:
    """The whole body; Refusal where it is too large, too slow, not JSON, or cut off."""
    headers = dict(scope["headers"])
    if not headers.get(b"content-type", b"").lower().startswith(b"application/json"):
        # A browser asks before it sends this type to another site; others it sends from any page.
        raise Refusal(415, "unsupported_media_type", "Send JSON, with the header `Content-Type: application/json`.")
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > settings.body_bytes:
        raise too_large(settings.body_bytes)
    pieces, size = [], 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), settings.body_s)
        except TimeoutError:
            raise Refusal(408, "body_timeout", "The request's body did not arrive.", headers=CLOSE) from None
        if message["type"] == "http.disconnect":
            raise bad_request("body_cut_off", "The request's body was cut off.")
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > settings.body_bytes:
            raise too_large(settings.body_bytes)
        if not message.get("more_body"):
            return b"".join(pieces)


CLOSE = {"Connection": "close"}
# vLLM's API server lives for a moment after its engine has died, and answers so (vllm/v1/engine/exceptions.py).
DEAD_CORE = "EngineCore encountered an issue"


def too_large(most: int) -> Refusal:
    """413."""
    return Refusal(413, "body_too_large", f"The body is larger than {most:,} bytes.", headers=CLOSE)


async def beside_client(
    work: Coroutine[Any, Any, None], call: Call, gateway: Gateway, receive: Receive, send: Send
) -> None:
    """Run `work` until it is done or the client is gone; an error after the first byte becomes the stream's last event.

    Refusals before the first byte go to the caller.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(disconnected(receive))
    gateway.running[call] = task
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        call.is_gone = call.is_gone or not task.done()
    finally:
        gateway.running.pop(call)
        for one in (task, gone):
            one.cancel()
        await asyncio.wait({task, gone})
    if call.is_gone:
        return
    error = broken(gateway.engine.snapshot) if task.cancelled() else task.exception()
    if isinstance(error, Refusal) and call.status:
        await end_stream(error, call, send)
    elif error is not None:
        raise error


async def disconnected(receive: Receive) -> None:
    """Return when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def end_stream(refusal: Refusal, call: Call, send: Send) -> None:
    """Say in a stream that has begun why it ends.

    Another reply, of which a part is sent, is left unfinished: then the server closes the connection.
    """
    call.broke = refusal.code
    if not call.is_events:
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            await send({"type": "http.response.body", "body": refusal.event(call.is_anthropic)})


def words_of(raw: bytes) -> str:
    """The message of an engine's error, in any of its shapes; empty where there is none."""
    try:
        fields = json.loads(raw)
    except ValueError:
        return ""
    if not isinstance(fields, dict):
        return ""
    error = fields.get("error")
    found = error.get("message") if isinstance(error, dict) else fields.get("message") or fields.get("detail")
    return found if isinstance(found, str) else ""

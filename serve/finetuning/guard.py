"""What every route of this API begins and ends with: whose request it is, a bounded body, errors in OpenAI's shape.

FastAPI describes the routes, but never answers in its own words: what it finds wrong is said like everything else.

    >>> router = APIRouter(prefix="/v1", route_class=Guarded)
"""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from loraport.clients.errors import LoraportError, ResourceError
from loraport.serve.finetuning.multipart import GRACE_S, LEAST_RATE
from loraport.serve.finetuning.service import FINAL
from loraport.serve.gateway import body as bodies
from loraport.serve.gateway.access import ANYONE, authenticate, tenant_of
from loraport.serve.gateway.calls import MARK
from loraport.serve.gateway.forward import CLOSE, Gateway, limited, read_body
from loraport.serve.gateway.keys import Key
from loraport.serve.gateway.refusals import Refusal, bad_request

log = logging.getLogger("loraport.gateway")
BODY_BYTES = 1 << 20  # of a JSON body: what is large comes as a file
RETRY_S = 5
AGAIN_S = 15 * 60.0  # in which a client that has lost an answer asks again
REMEMBERED = 10_000  # ids, and refusals
LONGEST_ID, LONGEST_PATH = 64, 200  # of what is remembered
REPEATED = (408, 409, 429)  # that OpenAI's clients send again by themselves, beside 5xx
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Try = tuple[str, str, str, str, int]  # tenant, method, path, length of the body, how often it was sent before


class Answers:
    """Which ids clients have heard of, and which requests were refused before they made anything. Bounded; any thread.

    For what is sent again: it may have been refused before, and then what an equal request has made is another's; so is
    a thing that its client speaks of already.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.heard: dict[str, None] = {}
        self.refused: dict[Try, tuple[int, float]] = {}

    def hear(self, *ids: str | None) -> None:
        """A client speaks of these."""
        with self.lock:
            self.heard |= dict.fromkeys(id for id in ids if id and len(id) <= LONGEST_ID)
            while len(self.heard) > REMEMBERED:
                del self.heard[next(iter(self.heard))]

    def refuse(self, key: Try) -> None:
        """That try, if it comes, follows one that was refused and had made nothing, nor had those before it."""
        with self.lock:
            count, _ = self.refused.pop(key, (0, 0.0))
            self.refused[key] = count + 1, time.monotonic()
            if len(self.refused) > REMEMBERED:
                del self.refused[next(iter(self.refused))]

    def was_refused(self, key: Try) -> bool:
        """Whether that try follows such a refusal; once for each."""
        with self.lock:
            count, at = self.refused.pop(key, (0, 0.0))
            if count > 1:
                self.refused[key] = count - 1, at
        return count > 0 and time.monotonic() - at < AGAIN_S


@dataclass(frozen=True)
class Caller:
    """Who asks: the key, whose things it sees, and what tells a request that is sent again.

    `is_again`: it was sent before, and may have been done then. `next_try`: the same request, should it be sent again.
    """

    key: Key
    tenant: str
    is_again: bool = False
    idempotency_key: str | None = None
    answers: Answers = field(default_factory=Answers)
    next_try: Try | None = None

    @property
    def is_admin(self) -> bool:
        """Whether it sees everybody's."""
        return self.key.is_admin


class Guarded(APIRoute):
    """A route whose request is checked before its body is read, and whose errors are refusals."""

    def get_route_handler(self) -> Handler:
        """FastAPI's handler, guarded."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            gateway: Gateway = request.app.state.gateway
            request.scope[MARK].route = self.path_format
            request.state.caller = caller = enter(request, gateway)
            caller.answers.hear(*map(str, request.path_params.values()))
            try:
                with limited(gateway, caller.key):
                    if self.body_field:
                        await read_json(request, gateway)
                    return await handle(request)
            except RequestValidationError as error:
                raise wrong(error) from None
            except HTTPException as error:
                raise Refusal(error.status_code, "bad_request", str(error.detail)) from None
            except LoraportError as error:
                raise cannot(error) from error  # what was wanted may be done all the same
            except Refusal as refusal:
                if caller.next_try and (refusal.status in REPEATED or refusal.status >= 500):
                    caller.answers.refuse(caller.next_try)
                raise

        return guarded


def enter(request: Request, gateway: Gateway) -> Caller:
    """Who asks; Refusal without a good key, from another's web page, or with text that no database holds."""
    key = authenticate(request.scope, gateway.ring, gateway.settings)
    request.scope[MARK].key = key.name
    origin = request.headers.get("origin")
    is_page = origin is not None and origin not in gateway.settings.origins
    if is_page and key is ANYONE and request.method != "GET":
        raise Refusal(403, "wrong_origin", "Without API keys no web page may change anything here.")
    if "\x00" in request.url.path or "%00" in request.url.query:
        raise bad_request("invalid_value", "The address has a character that cannot be in a name.")
    return who(request, key)


def who(request: Request, key: Key) -> Caller:
    """The caller, and whether what it wants may be done already."""
    headers, answers = request.headers, answers_of(request)
    said = headers.get("x-stainless-retry-count", "")
    count = int(said[:9]) if said.isascii() and said.isdigit() else 0
    asked = (tenant_of(key), request.method, request.url.path[:LONGEST_PATH], headers.get("content-length", "")[:20])
    is_again = count > 0 and not answers.was_refused((*asked, count))
    next_try = None if is_again or request.method != "POST" else (*asked, count + 1)
    return Caller(key, tenant_of(key), is_again, headers.get("idempotency-key") or None, answers, next_try)


def answers_of(request: Request) -> Answers:
    """What is remembered for this application."""
    state = request.app.state
    if not hasattr(state, "answers"):
        state.answers = Answers()
    answers: Answers = state.answers
    return answers


def caller_of(request: Request) -> Caller:
    """The dependency that gives a handler its caller."""
    caller: Caller = request.state.caller
    return caller


Asking = Annotated[Caller, Depends(caller_of)]


async def read_json(request: Request, gateway: Gateway) -> None:
    """Read and parse the body, within bounds, and leave it where FastAPI looks for it."""
    settings = replace(gateway.settings, body_bytes=min(BODY_BYTES, gateway.settings.body_bytes))
    try:
        async with asyncio.timeout(GRACE_S + settings.body_bytes / LEAST_RATE):
            raw = await read_body(request.scope, request.receive, settings)
    except TimeoutError:
        raise Refusal(408, "body_timeout", "The request's body did not arrive.", headers=dict(CLOSE)) from None
    fields = bodies.parse(raw, settings.json_depth).fields
    if not can_be_kept(fields):
        message = "The body has a text with U+0000 or half of a pair in it, or a number beyond all bounds."
        raise bad_request("invalid_json", message)
    request._body, request._json = raw, fields  # what Request.body() and json() would set
    request.state.raw = raw


def can_be_kept(fields: dict[str, Any]) -> bool:
    """Whether both databases hold all texts and numbers of a body."""
    try:
        whole = json.dumps(fields, ensure_ascii=False, allow_nan=False)
        whole.encode()
    except ValueError:
        return False
    return "\\u0000" not in whole


def wrong(error: RequestValidationError) -> Refusal:
    """400 that names the first parameter at fault, in words. What was sent is not quoted."""
    found = error.errors()
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    path = [str(part) for part in first["loc"][1:] if not str(part).startswith(("function-", "literal[", "nullable["))]
    param = ".".join(path) or None
    if first["type"] == "missing" and param:
        return bad_request("missing_required_parameter", f"Missing required parameter: '{param}'.", param)
    if first["type"] == "extra_forbidden" and param:
        return bad_request("unknown_parameter", f"Unknown parameter: '{param}'.", param)
    words = first["msg"].removeprefix("Value error, ").replace("Input should be ", "it should be ", 1).rstrip(".")
    where = f"Invalid value for '{param}': " if param else "The body is not as it must be: "
    return bad_request("invalid_value", f"{where}{words}.", param)


def cannot(error: LoraportError) -> Refusal:
    """What this machine cannot do now; its words, which name paths of it, go to the log and not to a tenant."""
    log.error("%s: %s", type(error).__name__, error.message)
    if isinstance(error, ResourceError):
        message = "The endpoint cannot reach its store of jobs now, or cannot write there; nothing was changed."
        return Refusal(503, "store_unavailable", message, headers={"Retry-After": str(RETRY_S)})
    return bad_request("refused", f"{error.message} {error.hint}".strip())


def already(message: str, param: str | None = None) -> Refusal:
    """400 for what is over: 409 would be sent again by OpenAI's clients."""
    return Refusal(400, "invalid_state", message, param=param, headers=FINAL)


def nothing(kind: str, id: str) -> Refusal:
    """404, in the same words for what never was and for what is another's."""
    shown = id if len(id) <= 100 else id[:100] + "…"
    return Refusal(404, "not_found", f"There is no {kind} {shown!r}.", param="id")


class Strict(BaseModel):
    """A body: no unknown keys, no text where a number should be."""

    model_config = {"extra": "forbid", "strict": True}

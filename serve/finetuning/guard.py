"""What every route of this API begins and ends with: whose request it is, a bounded body, errors in OpenAI's shape.

FastAPI describes the routes, but never answers in its own words: what it finds wrong is said like everything else.

    >>> router = APIRouter(prefix="/v1", route_class=Guarded)
"""

import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from loraport.clients.errors import LoraportError, ResourceError
from loraport.serve.finetuning.service import FINAL
from loraport.serve.gateway import body as bodies
from loraport.serve.gateway.access import ANYONE, authenticate, tenant_of
from loraport.serve.gateway.calls import MARK
from loraport.serve.gateway.forward import Gateway, limited, read_body
from loraport.serve.gateway.keys import Key
from loraport.serve.gateway.refusals import Refusal, bad_request

log = logging.getLogger("loraport.gateway")
BODY_BYTES = 1 << 20  # of a JSON body: what is large comes as a file
RETRY_S = 5
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


@dataclass(frozen=True)
class Caller:
    """Who asks: the key, whose things it sees, and what tells a request that is sent again."""

    key: Key
    tenant: str
    is_again: bool = False
    idempotency_key: str | None = None

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
            with limited(gateway, caller.key):
                if self.body_field:
                    await read_json(request, gateway)
                try:
                    return await handle(request)
                except RequestValidationError as error:
                    raise wrong(error) from None
                except HTTPException as error:
                    raise Refusal(error.status_code, "bad_request", str(error.detail)) from None
                except LoraportError as error:
                    raise cannot(error) from error

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
    headers = request.headers
    count, again = headers.get("x-stainless-retry-count", ""), headers.get("idempotency-key")
    is_again = count.isascii() and count.isdigit() and int(count[:9]) > 0
    return Caller(key, tenant_of(key), is_again, again or None)


def caller_of(request: Request) -> Caller:
    """The dependency that gives a handler its caller."""
    caller: Caller = request.state.caller
    return caller


Asking = Annotated[Caller, Depends(caller_of)]


async def read_json(request: Request, gateway: Gateway) -> None:
    """Read and parse the body, within bounds, and leave it where FastAPI looks for it."""
    settings = replace(gateway.settings, body_bytes=min(BODY_BYTES, gateway.settings.body_bytes))
    raw = await read_body(request.scope, request.receive, settings)
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

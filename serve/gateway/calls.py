"""One request on its way through the gateway, what is written down of it, and the door that all go through.

The log has method, path, model, status, name of the key, times, tokens and the request's id. It never has a key, a
query, a header, or anything of the body; a model is named only when it is one of ours.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraport.serve.gateway.refusals import Refusal
from loraport.serve.gateway.usage import Tokens

log = logging.getLogger("loraport.gateway")
SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")
SECRET = re.compile(r"(?:lp|sk)-[A-Za-z0-9_-]{8,}")
UNPRINTABLE = re.compile(r"[^\x21-\x7e]")
CLIENT_GONE = 499  # what nginx calls it
MARK = "loraport.call"


@dataclass(eq=False)
class Call:
    """What is known of a request so far; `status` 0 until its answer begins."""

    method: str
    path: str
    id: str
    began: float = field(default_factory=time.monotonic)
    route: str = "other"  # a bounded set, for metrics
    key: str = "-"
    model: str = "-"
    asked_as: str | None = None  # what the engine calls that model
    shown_as: str | None = None  # what the reply is to call it, where the engine's name is not for clients
    status: int = 0
    first_byte_s: float | None = None
    tokens: Tokens | None = None
    broke: str | None = None  # code of the error that ended a stream after its first byte
    sending_since: float | None = None  # on the monotonic clock, while a piece of the reply is being sent
    is_events: bool = False  # the reply
    is_gone: bool = False  # the client
    is_engine_call: bool = False
    hides_usage: bool = False  # at the end of a stream, from a client that has not asked for it

    @property
    def is_anthropic(self) -> bool:
        """Whether errors need Anthropic's shape."""
        return self.path.startswith("/v1/messages")

    def line(self) -> str:
        """The line of the access log."""
        ms = (time.monotonic() - self.began) * 1000
        first = f"{self.first_byte_s * 1000:.1f}" if self.first_byte_s is not None else "-"
        tokens = f"{self.tokens.prompt}+{self.tokens.completion}" if self.tokens else "-"
        return (
            f"{self.method[:10]} {loggable(self.path)} {self.status} model={self.model} key={self.key} ms={ms:.1f}"
            f" first_byte_ms={first} tokens={tokens}{f' broke={self.broke}' if self.broke else ''} id={self.id}"
        )


def loggable(path: str) -> str:
    """A path that cannot break a line, hide in it, or carry a key into it."""
    return SECRET.sub("…", UNPRINTABLE.sub("?", path))[:100]


def request_id(given: str | None) -> str:
    """The client's id where it is a sane one, else one of ours."""
    return given if given and SANE_ID.fullmatch(given) and not SECRET.search(given) else f"req-{secrets.token_hex(12)}"


def log_to(path: Path) -> logging.Handler:
    """Write the access log to a file of at most 10 MiB, with three older ones beside it; the caller may remove it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=10 << 20, backupCount=3, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    return handler


class Door:
    """ASGI middleware around everything: gives each request an id and bounds, ends it in words, and writes it down."""

    def __init__(self, app: ASGIApp, header_bytes: int, done: Callable[[Call], None]) -> None:
        self.app, self.header_bytes, self.done = app, header_bytes, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        call = Call(scope["method"], scope["path"], request_id(Headers(scope=scope).get("x-request-id")))
        scope[MARK] = call
        answer = self.answering(call, send)
        try:
            check_headers(scope, self.header_bytes)
            await self.app(scope, receive, answer)
        except Refusal as refusal:
            await refuse(refusal, call, answer)
        except Exception as error:
            tell_bug(error, call)
            if not call.status:
                await refuse(Refusal(500, "gateway_error", "The gateway failed; its log says more."), call, answer)
        finally:
            if call.is_gone or not call.status:
                call.status = CLIENT_GONE
            self.done(call)
            log.info("%s", call.line())

    def answering(self, call: Call, send: Send) -> Send:
        """`send` that adds the request's id and notes status and times."""

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", call.id.encode())]
                message = {**message, "headers": headers}
            elif call.first_byte_s is None:
                call.first_byte_s = time.monotonic() - call.began
            await send(message)

        return answer


def check_headers(scope: Scope, most: int) -> None:
    """Refusal 431 for headers beyond the bound."""
    if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) + len(scope.get("raw_path") or b"") > most:
        raise Refusal(431, "headers_too_large", f"The request's headers are larger than {most:,} bytes.")


async def refuse(refusal: Refusal, call: Call, send: Send) -> None:
    """Answer with a refusal."""
    body = refusal.body(call.is_anthropic)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def tell_bug(error: Exception, call: Call) -> None:
    """Log where the gateway failed; not the error's words, which may quote a request."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else "?"
    log.error("%s at %s in the gateway, id=%s", type(error).__name__, where, call.id)

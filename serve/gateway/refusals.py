"""Every refusal of the gateway, in OpenAI's error shape; on /v1/messages the same with Anthropic's `type` beside it.

{"error": {"message": "…", "type": "invalid_request_error", "param": null, "code": "model_not_found"}}
"""

import json
from typing import Any

from loraport.serve.gateway.state import RETRY_S, Phase, Snapshot

LONG_RETRY_S = 60  # nothing brings it back but a person, or the end of a training that nobody can tell
LONG = (Phase.DOWN, Phase.SUSPENDED)
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
ANTHROPIC_TYPES = {503: "overloaded_error", 500: "api_error", 502: "api_error", 504: "api_error"}


class Refusal(Exception):
    """An answer instead of the engine's. `more` are further fields of the error; `headers` go out with it."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message
        self.param, self.headers, self.more = param, dict(headers or {}), more

    def again(self) -> "Refusal":
        """The same once more: an exception that is raised twice keeps what both requests held."""
        return Refusal(self.status, self.code, self.message, param=self.param, headers=self.headers, **self.more)

    def document(self, is_anthropic: bool = False) -> dict[str, Any]:
        """The body, as JSON types."""
        kind = TYPES.get(self.status, "invalid_request_error")
        if is_anthropic:
            kind = ANTHROPIC_TYPES.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.more}
        return {"type": "error", "error": error} if is_anthropic else {"error": error}

    def body(self, is_anthropic: bool = False) -> bytes:
        """The body, as bytes."""
        return json.dumps(self.document(is_anthropic), ensure_ascii=False).encode()

    def event(self, is_anthropic: bool = False) -> bytes:
        """The last event of a stream that broke. The empty line before it ends an event that was cut short."""
        name = b"event: error\n" if is_anthropic else b""
        return b"\n\n" + name + b"data: " + self.body(is_anthropic) + b"\n\n"


def not_ready(engine: Snapshot) -> Refusal:
    """503 with the phase, what is known of it, and when to come back."""
    left = engine.left_s()
    words = f"The engine is {engine.phase}" + (f": {engine.reason.rstrip('.')}" if engine.reason else "")
    when = f"; about {left} s left." if left else "; it takes longer than usual." if engine.is_overdue else "."
    if engine.phase is Phase.READY:
        words, when = "The engine does not answer; it may have just died", "."
    return Refusal(
        503,
        f"engine_{engine.phase}" if engine.phase is not Phase.READY else "engine_unreachable",
        words + when,
        headers={"Retry-After": str(left or (LONG_RETRY_S if engine.phase in LONG else RETRY_S))},
        phase=str(engine.phase),
        expected_s=left,
    )


def broken(engine: Snapshot) -> Refusal:
    """The engine went away while it answered."""
    refusal = not_ready(engine)
    refusal.code = "engine_stopped"
    refusal.message = "The engine stopped while it answered; send the request again."
    return refusal


def too_slow(seconds: float) -> Refusal:
    """The engine said nothing for that long."""
    return Refusal(504, "engine_timeout", f"The engine said nothing for {seconds:g} s; the request was ended.")


def bad_request(code: str, message: str, param: str | None = None, **more: Any) -> Refusal:
    """400."""
    return Refusal(400, code, message, param=param, **more)


def no_route(method: str, path: str) -> Refusal:
    """404 for what is not on the allow-list."""
    return Refusal(
        404, "unknown_route", f"There is no {method} {path[:100]!r} here; the routes are those of OpenAI's API."
    )

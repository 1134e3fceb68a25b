"""An OpenAI-compatible endpoint on loopback that replies what the test says, as slowly as it says.

with FakeOpenAI({"base": lambda messages: "no", "demo": lambda messages: "yes"}) as endpoint:
    client = OpenAI(base_url=endpoint.base_url, api_key="any")
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import Loopback

Replier = Callable[[list[dict[str, str]]], str]


@dataclass
class Knobs:
    """How the endpoint behaves. A "token" is a character here."""

    token_seconds: float = 0.0
    context: int = 1000  # tokens of prompt and reply together
    key: str = ""  # wanted as the bearer; empty: none
    aliases: tuple[str, ...] = ()  # further names of the first model; all other models are its adapters
    statuses: tuple[int, ...] = ()  # of the coming replies; then 200
    die_after: int | None = None  # requests answered before the connection breaks for good
    tokenizes: bool = False  # whether it has vLLM's /tokenize
    hang_on: str = ""  # a prompt that holds this is not answered until the endpoint closes
    break_stream_after: int | None = None  # tokens


class FakeOpenAI(Loopback):
    """The server. `requests`: bodies of chat completions; `cut`: set when a client closed a stream before its end."""

    def __init__(self, models: dict[str, Replier], knobs: Knobs | None = None) -> None:
        self.models, self.knobs = models, knobs or Knobs()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.cut, self.closing = threading.Event(), threading.Event()
        super().__init__(Handler)
        self.base_url = f"{self.origin}/v1"

    def stop(self) -> None:
        """Stop answering, streams that are under way too."""
        self.closing.set()
        super().stop()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    owner: FakeOpenAI
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the tests ask the endpoint."""

    def do_GET(self) -> None:
        """The list of models."""
        if self.path != "/v1/models":
            self.refuse(404, "Not Found")
        elif self.is_allowed():
            first, knobs = next(iter(self.owner.models), None), self.owner.knobs
            cards = [self.card(name, first, knobs) for name in self.owner.models]
            self.send_json(200, {"object": "list", "data": cards})

    def card(self, name: str, first: str | None, knobs: Knobs) -> dict[str, Any]:
        """A model as vLLM describes it: only the base says its context."""
        is_base = name == first or name in knobs.aliases
        more = {"max_model_len": knobs.context, "parent": None} if is_base else {"parent": first}
        root = f"/models/{first if is_base else name}"
        return {"id": name, "object": "model", "created": 0, "owned_by": "fake", "root": root, **more}

    def is_allowed(self) -> bool:
        """Whether the key is right; refuse otherwise."""
        self.owner.keys.append(self.headers.get("Authorization", ""))
        if self.owner.knobs.key and self.owner.keys[-1] != f"Bearer {self.owner.knobs.key}":
            self.refuse(401, "Unauthorized")
            return False
        return True

    def do_POST(self) -> None:
        """A chat completion, or the trouble that the knobs order."""
        endpoint, knobs = self.owner, self.owner.knobs
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize" and knobs.tokenizes:
            self.send_json(200, {"count": len(body["prompt"]), "max_model_len": knobs.context, "tokens": []})
        elif self.path != "/v1/chat/completions":
            self.refuse(404, "Not Found")
        elif knobs.die_after is not None and len(endpoint.requests) >= knobs.die_after:
            self.close_connection = True
        elif self.is_allowed():
            endpoint.requests.append(body)
            status, knobs.statuses = (knobs.statuses or (200,))[0], knobs.statuses[1:]
            self.complete(body, knobs) if status == 200 else self.refuse(status, "as ordered")

    def complete(self, body: dict[str, Any], knobs: Knobs) -> None:
        """Reply in one piece or as a stream."""
        prompt = "".join(message["content"] for message in body["messages"])
        if knobs.hang_on and knobs.hang_on in prompt:
            self.owner.closing.wait()
        elif body["model"] not in self.owner.models:
            self.refuse(404, f"The model `{body['model']}` does not exist.")
        elif len(prompt) > knobs.context:
            self.refuse(400, f"This model's maximum context length is {knobs.context} tokens. Please reduce it.")
        else:
            reply = self.owner.models[body["model"]](body["messages"])
            room = min(body.get("max_tokens") or knobs.context, knobs.context - len(prompt))
            ending = "length" if len(reply) > room else "stop"
            (self.stream if body.get("stream") else self.send_whole)(reply[:room], ending, len(prompt))

    def send_whole(self, reply: str, ending: str, prompt_tokens: int) -> None:
        """The reply as one document."""
        time.sleep(self.owner.knobs.token_seconds * len(reply))
        message = {"role": "assistant", "content": reply}
        choice = {"index": 0, "message": message, "finish_reason": ending, "logprobs": None}
        self.send_json(200, document("chat.completion", [choice], usage(prompt_tokens, len(reply))))

    def stream(self, reply: str, ending: str, prompt_tokens: int) -> None:
        """The reply as server-sent events: a role, a chunk for each token, the ending, the usage."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}, *({"content": token} for token in reply)]
        try:
            for sent, delta in enumerate(deltas):
                if sent == self.owner.knobs.break_stream_after:
                    self.connection.shutdown(2)
                self.send_event(delta, None)
                time.sleep(self.owner.knobs.token_seconds)
            self.send_event({}, ending)
            self.send_text(json.dumps(document("chat.completion.chunk", [], usage(prompt_tokens, len(reply)))))
            self.send_text("[DONE]")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.owner.cut.set()
        self.close_connection = True

    def send_event(self, delta: dict[str, str], ending: str | None) -> None:
        """One chunk."""
        choice = {"index": 0, "delta": delta, "finish_reason": ending}
        self.send_text(json.dumps(document("chat.completion.chunk", [choice], None)))

    def send_text(self, data: str) -> None:
        """One server-sent event."""
        event = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
        self.wfile.flush()

    def refuse(self, status: int, message: str) -> None:
        """An error in OpenAI's form."""
        self.send_json(status, {"error": {"message": message, "type": "fake", "param": None, "code": status}})

    def send_json(self, status: int, body: Any) -> None:
        """A JSON answer."""
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def document(kind: str, choices: list[Any], used: dict[str, int] | None) -> dict[str, Any]:
    """What completions and chunks have in common."""
    return {"id": "fake", "object": kind, "created": 0, "model": "fake", "choices": choices, "usage": used}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}

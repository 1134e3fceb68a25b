"""A server of token streams that does to each request what the name of its model says.

with Misbehaving(["good", "cut"]) as server:
    Pool(Address.parse(server.base_url))
"""

import json
import threading
from http.server import BaseHTTPRequestHandler
from socket import SHUT_WR
from typing import Any

from tests.loopback import Loopback


class Misbehaving(Loopback):
    """`seen`: bodies of all requests. `limit`: requests that are answered before 429."""

    def __init__(self, models: list[str], key: str = "", limit: int = 1 << 30, context: int | None = 4096) -> None:
        self.models, self.key, self.limit, self.context = models, key, limit, context
        self.seen: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.closing = threading.Event()
        super().__init__(Handler)
        self.base_url = f"{self.origin}/v1"

    def stop(self) -> None:
        """Stop; what hangs ends too."""
        self.closing.set()
        super().stop()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    owner: Misbehaving
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    ending = "\n\n"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """The models: the first is the base of the others."""
        if self.owner.key and self.headers.get("Authorization") != f"Bearer {self.owner.key}":
            return self.answer(401, {"error": {"message": "Unauthorized"}})
        first = self.owner.models[0]
        cards: list[dict[str, Any]] = [
            {"id": name, "parent": None if name == first else first, "max_model_len": self.owner.context}
            for name in self.owner.models
        ]
        return self.answer(200 if self.path == "/v1/models" else 404, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        """What the model's name says."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("completions"):
            return self.answer(404, {"detail": "Not Found"})
        self.owner.seen.append(body)
        self.owner.heads.append(dict(self.headers))
        if len(self.owner.seen) > self.owner.limit:
            return self.answer(429, {"error": {"message": "too many"}})
        return getattr(self, body["model"].partition("-")[0])(body)

    def good(self, body: dict[str, Any], usage: bool = True) -> None:
        """A reply as it should be."""
        self.begin()
        for _ in range(body["max_tokens"]):
            self.text(body, " x")
        self.end(body, usage)

    def strict(self, body: dict[str, Any]) -> None:
        """Knows no field that OpenAI does not have, and ends replies where it likes."""
        if "ignore_eos" in body:
            return self.answer(400, {"error": {"message": "Unrecognized request argument: ignore_eos"}})
        return self.good(body | {"max_tokens": min(3, body["max_tokens"])})

    def silent(self, body: dict[str, Any]) -> None:
        """Never says its token count."""
        self.good(body, usage=False)

    def crlf(self, body: dict[str, Any]) -> None:
        """Ends lines as HTTP does, with comments and names of events in between."""
        self.ending = "\r\n\r\n"
        self.begin()
        self.write(": ping\r\n\r\n")
        self.write('event: chunk\r\ndata: {"choices": [{"text": "x"}]}\r\n\r\n')
        self.end(body, usage=True)

    def wrong(self, body: dict[str, Any]) -> None:
        """500."""
        self.answer(500, {"error": {"message": "it broke"}})

    def refusing(self, body: dict[str, Any]) -> None:
        """400, whatever is asked."""
        self.answer(400, {"error": {"message": "not this way"}})

    def cut(self, body: dict[str, Any]) -> None:
        """Half of a stream, then the connection is gone."""
        self.begin()
        self.text(body, " x")
        self.connection.shutdown(2)
        self.close_connection = True

    def half(self, body: dict[str, Any]) -> None:
        """Half of a stream, then no more is written, while the connection stays open for reading."""
        self.begin()
        self.text(body, " x")
        self.connection.shutdown(SHUT_WR)
        self.owner.closing.wait(0.2)
        self.close_connection = True

    def locked(self, body: dict[str, Any]) -> None:
        """Lists its models to everyone, and answers nobody."""
        self.answer(401, {"error": {"message": "Incorrect API key provided"}})

    def busy(self, body: dict[str, Any]) -> None:
        """429, with the time to come back."""
        self.answer(429, {"error": {"message": "too many"}}, ("Retry-After", "7"))

    def late(self, body: dict[str, Any]) -> None:
        """A status line, and then its headers do not come."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/ev")
        self.owner.closing.wait()
        self.close_connection = True

    def garbage(self, body: dict[str, Any]) -> None:
        """Events that are no JSON."""
        self.begin()
        self.write("data: \x00\x01{not json\n\n")
        self.end(body, usage=True)

    def odd(self, body: dict[str, Any]) -> None:
        """JSON of another kind, and a usage of words."""
        self.begin()
        self.text(body, " x")
        self.event({"choices": [], "usage": {"prompt_tokens": "some", "completion_tokens": "many"}})
        self.write("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def echo(self, body: dict[str, Any]) -> None:
        """A reply that tells how many turns it has seen, and takes all but the last from its cache."""
        turns = len(body["messages"])
        self.begin()
        self.text(body, f"reply {turns}")
        details = {"cached_tokens": 4 * (turns - 1) if turns > 2 else 0}
        used = {"prompt_tokens": 4 * turns, "completion_tokens": 2, "prompt_tokens_details": details}
        self.event({"choices": [], "usage": used})
        self.write("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def gone(self, body: dict[str, Any]) -> None:
        """No answer at all."""
        self.connection.shutdown(2)
        self.close_connection = True

    def failing(self, body: dict[str, Any]) -> None:
        """An error inside the stream."""
        self.begin()
        self.text(body, " x")
        self.event({"error": {"message": "the engine died", "code": 500}})
        self.end(body, usage=True)

    def empty(self, body: dict[str, Any]) -> None:
        """A stream of nothing but its usage."""
        self.begin()
        self.end(body, usage=True)

    def whole(self, body: dict[str, Any]) -> None:
        """A document instead of a stream."""
        self.answer(200, {"choices": [{"text": "x"}], "usage": {"completion_tokens": 1}})

    def hanging(self, body: dict[str, Any]) -> None:
        """One token, then silence."""
        self.begin()
        self.text(body, " x")
        self.owner.closing.wait()
        self.close_connection = True

    def slow(self, body: dict[str, Any]) -> None:
        """A good reply that takes a moment."""
        self.owner.closing.wait(0.05)
        self.good(body)

    def begin(self) -> None:
        """Headers of a stream."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def text(self, body: dict[str, Any], text: str) -> None:
        """A token."""
        choice = {"delta": {"content": text}} if "messages" in body else {"text": text}
        self.event({"choices": [choice]})

    def event(self, document: dict[str, Any]) -> None:
        """One event."""
        self.write(f"data: {json.dumps(document)}{self.ending}")

    def end(self, body: dict[str, Any], usage: bool) -> None:
        """The usage and the end."""
        if usage:
            prompt = len(body.get("prompt", "").split()) or 4
            tokens = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"]}
            self.event({"choices": [], "usage": tokens})
        self.write(f"data: [DONE]{self.ending}")
        self.wfile.write(b"0\r\n\r\n")

    def write(self, text: str) -> None:
        """A chunk of HTTP."""
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def answer(self, status: int, document: dict[str, Any], *headers: tuple[str, str]) -> None:
        """A JSON document."""
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

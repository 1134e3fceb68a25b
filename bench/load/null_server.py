"""A server that does nothing, as fast as it can: what the client makes of it is the most that the client can measure.

It answers every POST with an event for each token that was asked for, one write for each, other connections in between;
then the usage and [DONE]. With times it is a server of known speed, to hold clients against each other. A word of a
prompt is a token.

    python -m loraport.bench.load.null_server                       # prints its base URL; ends with its input
    python -m loraport.bench.load.null_server --ttft 0.1 --gap 0.02
"""

import argparse
import asyncio
import json
import sys
from contextlib import suppress
from typing import Any, cast

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
MODELS = json.dumps({"object": "list", "data": [{"id": "null", "object": "model", "owned_by": "loraport"}]}).encode()
JSON = b"HTTP/1.1 %d OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
# About the size of vLLM's chunks.
TOKEN = {"id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 1700000000, "model": "null"}
CHOICE = {"index": 0, "text": " null", "logprobs": None, "finish_reason": None, "stop_reason": None}
SAID = {"index": 0, "delta": {"content": " null"}, "logprobs": None, "finish_reason": None}


def event(data: str) -> bytes:
    """An event in a chunk of HTTP."""
    text = f"data: {data}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(text), text)


TEXT_CHUNK, CHAT_CHUNK = (event(json.dumps(TOKEN | {"choices": [one], "usage": None})) for one in (CHOICE, SAID))


class Null(asyncio.Protocol):
    """One connection. `ttft`, `gap`: seconds to the first chunk and between two."""

    ttft = gap = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's."""
        self.transport, self.buffer = cast(asyncio.Transport, transport), b""  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        """Asyncio's: answer when a request is whole."""
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        if not end or len(body) < int(length or 0):
            return
        self.buffer = b""
        route = head.split(b" ", 2)[1]
        if route.endswith(b"/models"):
            self.transport.write(JSON % (200, len(MODELS), MODELS))
        elif not route.endswith(b"completions"):
            self.transport.write(JSON % (404, 2, b"{}"))
        else:
            self.start(json.loads(body), CHAT_CHUNK if route.endswith(b"chat/completions") else TEXT_CHUNK)

    def start(self, asked: dict[str, Any], chunk: bytes) -> None:
        """Begin a reply."""
        self.left = self.tokens = int(asked.get("max_tokens") or asked.get("max_completion_tokens") or 16)
        self.prompt, self.chunk = count(asked), chunk
        self.transport.write(HEAD)
        self.later(self.ttft)

    def later(self, seconds: float) -> None:
        """The next chunk after so long, or after the other connections had their turn."""
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, self.next) if seconds else loop.call_soon(self.next)

    def next(self) -> None:
        """One chunk, or the end."""
        if self.transport.is_closing():
            return
        if self.left:
            self.left -= 1
            self.transport.write(self.chunk)
            self.later(self.gap if self.left else 0.0)
        else:
            self.finish()

    def finish(self) -> None:
        """The usage and the end."""
        total = self.prompt + self.tokens
        used = {"prompt_tokens": self.prompt, "completion_tokens": self.tokens, "total_tokens": total}
        last = event(json.dumps(TOKEN | {"choices": [], "usage": used}))
        self.transport.write(last + event("[DONE]") + b"0\r\n\r\n")


def count(asked: dict[str, Any]) -> int:
    """Tokens of a prompt: ids, or words."""
    prompt = asked.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in asked.get("messages", ())]
    return sum(len(text.split()) for text in texts)


async def serve() -> None:
    """On a free port, until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Null, "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    """Under uvloop where it is installed."""
    parser = argparse.ArgumentParser(description="A server that does nothing, or at a known speed.")
    parser.add_argument("--ttft", type=float, default=0.0, help="seconds to the first chunk")
    parser.add_argument("--gap", type=float, default=0.0, help="seconds between chunks")
    given = parser.parse_args()
    Null.ttft, Null.gap = given.ttft, given.gap
    with suppress(KeyboardInterrupt):
        try:
            import uvloop
        except ImportError:
            asyncio.run(serve())
        else:
            uvloop.run(serve())


if __name__ == "__main__":
    main()

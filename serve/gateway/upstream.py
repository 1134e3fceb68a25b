"""The way to the engines: pools of connections, raw bytes both ways, every end of it turned into words.

A request goes to the replica that has the fewest, one after the other where several have as few. One that cannot be
reached at all is passed over; what a replica has begun is never asked of another, which it might bring down as well.

aiohttp carries it: beside httpx on the fake engine it took 19 µs of CPU a chunk against 61, and 1.1 ms to the first
byte against 2.7 (two cores). Nothing queues here (no limit on connections): the engine schedules. Idle connections are
dropped before vLLM drops them (5 s), so that no request meets one that is just being closed.
"""

import asyncio
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
from starlette.types import Send

from loraport.serve.gateway.calls import Call
from loraport.serve.gateway.refusals import broken, not_ready, too_slow
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState, Target
from loraport.serve.gateway.usage import TAIL_BYTES, read_usage

KEEP_S = 2.0
READ_BYTES = 256 << 10
WHOLE_BYTES = 8 << 20  # a reply up to here is sent when it is complete, so that a crash costs no half of it
NO_CHOICES = re.compile(rb'(?<!\\)"choices":\s*\[\]')
TO_ENGINE = ("accept", "anthropic-version", "anthropic-beta", "traceparent", "tracestate")
COUNTING = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")  # no work for the GPU
TO_CLIENT = ("content-type", "content-length", "content-encoding", "cache-control", "retry-after")


class Upstream:
    """Sessions by Unix socket; all TCP targets share one. Made and closed inside the event loop."""

    def __init__(self, engine: EngineState, settings: GatewaySettings) -> None:
        self.engine, self.settings = engine, settings
        self.sessions: dict[str | None, aiohttp.ClientSession] = {}
        self.in_flight: Counter[Target] = Counter()
        self.last = 0  # the replica that was asked last

    def session(self, target: Target) -> aiohttp.ClientSession:
        """The session to a target."""
        if target.uds not in self.sessions:
            connector: aiohttp.BaseConnector
            if target.uds:
                connector = aiohttp.UnixConnector(target.uds, limit=0, keepalive_timeout=KEEP_S)
            else:
                connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, keepalive_timeout=KEEP_S)
            self.sessions[target.uds] = aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=READ_BYTES,
                skip_auto_headers=("User-Agent", "Accept-Encoding"),
                trust_env=False,
            )
        return self.sessions[target.uds]

    async def close(self) -> None:
        """End all connections."""
        for session in self.sessions.values():
            await session.close()

    def targets(self, path: str) -> list[Target]:
        """The replicas that answer, the one to ask first; at the same number of requests they take turns.

        Counting tokens is no turn: else, where each prompt is counted first, all prompts would go to the same one.
        """
        there = self.engine.snapshot.reachable
        turns = sorted(there, key=lambda number: (self.in_flight[there[number]], number <= self.last, number))
        if turns and path not in COUNTING:
            self.last = turns[0]
        return [there[number] for number in turns]

    @asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        read_s: float,
        target: Target | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer of a replica, or of that one, its body not yet read.

        Refusal 503 or 504 where there is none, or where it breaks.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.settings.connect_s, sock_read=read_s)
        for chosen in [target] if target else self.targets(path):
            self.in_flight[chosen] += 1
            try:
                async with self.session(chosen).request(
                    method, chosen.base_url + path, data=body, headers=headers, timeout=timeout, allow_redirects=False
                ) as response:
                    yield response
                return
            except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError):
                continue  # it has seen nothing of the request
            except TimeoutError as error:
                raise too_slow(read_s) from error
            except (aiohttp.ClientError, OSError) as error:
                raise broken(self.engine.snapshot) from error
            finally:
                self.in_flight[chosen] -= 1
        raise not_ready(self.engine.snapshot)

    async def ask_json(self, path: str, document: dict[str, Any], wait_s: float) -> dict[str, Any] | None:
        """A small answer as JSON; None for any other end of it."""
        headers, body = {"content-type": "application/json"}, json.dumps(document).encode()
        with suppress(Exception):
            async with asyncio.timeout(wait_s), self.ask("POST", path, body, headers, wait_s) as response:
                found = json.loads(await response.read()) if response.status == 200 else None
                return found if isinstance(found, dict) else None
        return None


def headers_to_engine(given: list[tuple[bytes, bytes]], call: Call) -> dict[str, str]:
    """What of the client's headers the engine needs: no key, no cookie. The id is made unique, as vLLM wants it."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in given}
    kept = {name: headers[name] for name in TO_ENGINE if name in headers}
    return {**kept, "content-type": "application/json", "x-request-id": f"{call.id}-{secrets.token_hex(4)}"}


def headers_to_client(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    """What of the engine's headers the client needs."""
    pairs = [
        (name.encode(), response.headers[name].encode("latin-1")) for name in TO_CLIENT if name in response.headers
    ]
    return [*pairs, (b"x-accel-buffering", b"no")] if is_events(response) else pairs


def is_events(response: aiohttp.ClientResponse) -> bool:
    """Whether a reply is a stream of server-sent events."""
    return response.content_type == "text/event-stream"


async def send_whole(response: aiohttp.ClientResponse, raw: bytes, send: Send) -> None:
    """Send a reply that has been read."""
    headers = [pair for pair in headers_to_client(response) if pair[0] != b"content-length"]
    headers.append((b"content-length", str(len(raw)).encode()))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})


class Renamed:
    """Calls the model in a reply as its client does. Whole lines go on at once; a piece of one waits for its end."""

    def __init__(self, asked_as: str, shown_as: str) -> None:
        self.said = re.compile(rb'(?<!\\)("model":\s*)' + re.escape(json.dumps(asked_as).encode()))
        self.shown = json.dumps(shown_as).encode()
        self.rest = b""

    def whole(self, raw: bytes) -> bytes:
        """A reply that is complete. A text that quotes the like has its quotes escaped, and stays."""
        return self.said.sub(lambda found: found[1] + self.shown, raw)

    def take(self, piece: bytes) -> bytes:
        """What of the stream may go on."""
        lines, end, self.rest = (self.rest + piece).rpartition(b"\n")
        return self.whole(lines + end)

    def end(self) -> bytes:
        """What was waiting."""
        return self.whole(self.rest)


def renamed(call: Call) -> Renamed | None:
    """For a call whose client knows the model by another name than the engine."""
    return Renamed(call.asked_as, call.shown_as) if call.asked_as and call.shown_as else None


class HiddenUsage:
    """Takes the usage out of a stream whose client did not ask for it: the event without choices, which some trip over.

    Whole events go on at once; a piece of one waits for its end.
    """

    def __init__(self) -> None:
        self.rest = b""

    def take(self, piece: bytes) -> bytes:
        """What of the stream may go on."""
        whole, end, self.rest = (self.rest + piece).rpartition(b"\n\n")
        if not NO_CHOICES.search(whole):
            return whole + end
        events = [event for event in whole.split(b"\n\n") if not NO_CHOICES.search(event)]
        return b"\n\n".join(events) + end if events else b""

    def end(self) -> bytes:
        """What was waiting."""
        return self.rest


async def pass_on(response: aiohttp.ClientResponse, call: Call, send: Send) -> None:
    """Send a reply to the client as it comes: headers with its first bytes, then each piece as it is received.

    A client that reads no further holds `send` up; `call.sending_since` lets others see that.
    """
    start = {"type": "http.response.start", "status": response.status, "headers": headers_to_client(response)}
    length, names = response.content_length, renamed(call)
    if not is_events(response) and (names or (length is not None and length <= WHOLE_BYTES)):
        whole = await response.read()
        call.tokens = read_usage(whole[-TAIL_BYTES:])
        await send_whole(response, names.whole(whole) if names else whole, send)
        return
    tail, started, call.is_events = b"", False, is_events(response)
    hidden = HiddenUsage() if call.hides_usage and call.is_events else None
    filters = [each for each in (names, hidden) if each]
    async for piece in response.content.iter_any():
        if not started:
            await send(start)
            started = True
        tail = (tail + piece)[-TAIL_BYTES:]
        shown = piece
        for each in filters:
            shown = each.take(shown)
        if shown:
            call.sending_since = time.monotonic()
            await send({"type": "http.response.body", "body": shown, "more_body": True})
            call.sending_since = None
    if not started:
        await send(start)
    call.tokens = read_usage(tail)
    last = b""
    for each in filters:
        last = each.take(last) + each.end()
    await send({"type": "http.response.body", "body": last})

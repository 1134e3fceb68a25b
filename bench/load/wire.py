"""HTTP/1.1 to one server with the least work for each chunk: asyncio's protocols under httptools' parser.

A chunk costs one callback and no wake-up of a coroutine; its time is taken before anything is parsed. Connections are
kept and reused without a limit on their number: a pool that caps them would be counted as the server's slowness.

    >>> pool = Pool(Address.parse("http://127.0.0.1:8000/v1"))
    >>> reply = await pool.ask("/completions", b'{"model": "base", "prompt": "Hi", "stream": true}', timeout_s=60)
    >>> reply.first_text - reply.sent
    0.0251
"""

import asyncio
import json
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httptools

from loraport.bench.load.record import kind_of_status
from loraport.bench.load.reply import Reply
from loraport.clients.errors import EndpointError

Clock = Callable[[], float]


@dataclass(frozen=True)
class Address:
    """Where a base URL leads. `unix:/run/engine.sock` is a server on a Unix socket, whose routes start with /v1."""

    host: str
    port: int
    path: str
    is_tls: bool = False
    socket: str = ""

    @classmethod
    def parse(cls, base_url: str) -> "Address":
        """From a base URL; EndpointError when it is none."""
        if base_url.startswith("unix:"):
            return cls("engine", 80, "/v1", socket=str(Path(base_url.removeprefix("unix:").replace("//", "/"))))
        try:
            parts = urlsplit(base_url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"{base_url!r} is not a URL.", "a base URL looks like http://127.0.0.1:8000/v1")
        is_tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if is_tls else 80), parts.path.rstrip("/"), is_tls)

    @property
    def authority(self) -> str:
        """For the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


class Exchange(Reply):
    """A reply with what belongs to its request. `status`: 0 until there are headers."""

    def __init__(self, keeps_words: bool = False) -> None:
        super().__init__(keeps_words)
        self.sent, self.status, self.any_bytes, self.is_events = 0.0, 0, False, False
        self.refusal, self.retry_after = b"", ""


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.now = clock, 0.0
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.is_open, self.used = True, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    async def ask(self, request: bytes, exchange: Exchange) -> None:
        """Send a request and wait until its answer has ended, one way or the other."""
        assert self.transport is not None
        self.exchange, self.waiter = exchange, asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.used += 1
        exchange.sent = self.clock()
        self.transport.write(request)
        await self.waiter

    def data_received(self, data: bytes) -> None:
        """Asyncio's: the time is taken first."""
        self.now = self.clock()
        if self.exchange is None:
            return self.close()
        self.exchange.any_bytes = True
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.end("cut", f"this is not HTTP: {error}")
        return None

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser's."""
        if name.lower() == b"content-type" and self.exchange:
            self.exchange.is_events = value.lower().startswith(b"text/event-stream")
        elif name.lower() == b"retry-after" and self.exchange:
            self.exchange.retry_after = value.decode(errors="replace")

    def on_headers_complete(self) -> None:
        """The parser's."""
        if self.exchange:
            self.exchange.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """The parser's: a piece of a stream, or of a refusal."""
        exchange = self.exchange
        if exchange is None:
            return
        if exchange.is_events and exchange.status == 200:
            exchange.feed(body, self.now)
        elif len(exchange.refusal) < 4096:
            exchange.refusal += body

    def on_message_complete(self) -> None:
        """The parser's: the answer has ended as it should."""
        keeps = self.parser.should_keep_alive()
        self.end()
        if not keeps:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Asyncio's."""
        self.is_open = False
        self.end("cut", str(error or ""))

    def end(self, error: str = "", said: str = "") -> None:
        """End the exchange, if there is one."""
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return
        if exchange.status not in (0, 200):
            later = f" (Retry-After: {exchange.retry_after})" if exchange.retry_after else ""
            exchange.fail(kind_of_status(exchange.status), words_of(exchange.refusal) + later)
        elif exchange.status == 200 and not exchange.is_events:
            exchange.fail("not a stream", exchange.refusal.decode(errors="replace"))
        elif error and not exchange.done:
            exchange.fail(error, said)
            self.close()
        else:
            exchange.settle()
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    def close(self) -> None:
        """Close the connection; what is under way on it ends there."""
        self.is_open = False
        if self.transport:
            self.transport.abort()


class Pool:
    """Connections to one server. `ask` never raises: what goes wrong is in the exchange."""

    def __init__(self, address: Address, key: str = "", clock: Clock = time.monotonic) -> None:
        self.address, self.clock = address, clock
        self.free: list[Connection] = []
        self.tls = ssl.create_default_context() if address.is_tls else None
        allowed = f"Authorization: Bearer {key}\r\n" if key else ""
        self.headers = f" HTTP/1.1\r\nHost: {address.authority}\r\n{allowed}Content-Type: application/json\r\n"

    def request(self, route: str, body: bytes) -> bytes:
        """A whole request."""
        head = f"POST {self.address.path}{route}{self.headers}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def ask(self, route: str, body: bytes, timeout_s: float, exchange: Exchange | None = None) -> Exchange:
        """One request on a free connection, or on a new one. `exchange`: one that the caller looks at meanwhile."""
        request = self.request(route, body)
        exchange = exchange or Exchange()
        exchange.sent = self.clock()
        connection: Connection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self.connect()
                reused = connection.used > 0
                await connection.ask(request, exchange)
                if reused and exchange.error == "cut" and not exchange.any_bytes:
                    # The server closed an idle connection at this moment; that says nothing about the request.
                    exchange = Exchange(exchange.words is not None)
                    connection = await self.open()
                    await connection.ask(request, exchange)
        except TimeoutError:
            exchange.fail("timeout")
        except OSError as error:
            number = error.errno or 0  # behind which stands what asyncio tells as the name of its call
            exchange.fail("refused", os.strerror(number) if number > 0 else error.strerror or str(error))
        except asyncio.CancelledError:
            exchange.fail("stopped")
        if connection and connection.exchange is None and connection.is_open:
            self.free.append(connection)
        elif connection:
            connection.exchange = None
            connection.close()
        return exchange

    async def connect(self) -> Connection:
        """The connection that was used last, which is the least likely to be closed; else a new one."""
        while self.free:
            connection = self.free.pop()
            if connection.is_open and connection.transport and not connection.transport.is_closing():
                return connection
        return await self.open()

    async def open(self) -> Connection:
        """A new connection."""
        loop, address = asyncio.get_running_loop(), self.address

        def make() -> Connection:
            return Connection(self.clock)

        if address.socket:
            _, made = await loop.create_unix_connection(make, address.socket)
        else:
            _, made = await loop.create_connection(make, address.host, address.port, ssl=self.tls)
        return made

    def close(self) -> None:
        """Close what is free."""
        while self.free:
            self.free.pop().close()


def words_of(body: bytes) -> str:
    """What a refusal says: OpenAI's `error.message`, FastAPI's `detail`, or the text."""
    try:
        document = json.loads(body)
        said = document.get("error", document.get("detail", document))
        return str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, AttributeError):
        return body.decode(errors="replace")

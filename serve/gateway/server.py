"""The gateway's HTTP server in a thread: the port is taken, or refused in words, before anything else happens.

>>> with run_in_thread(app, "127.0.0.1", 8000) as running:
...     running.url
'http://127.0.0.1:8000'
"""

import asyncio
import socket
import threading
import time
from types import TracebackType
from typing import Any, Self

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loraport.clients.errors import ResourceError
from loraport.serve.gateway.forward import Gateway

BACKLOG = 2048
HEAD_BYTES = 64 << 10  # of a request, before anything of ours sees it
HEAD_S = 30.0  # for a request's head to arrive
KEEP_ALIVE_S = 75
START_S, END_S, COUNT_S = 30.0, 5.0, 5.0


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's, with a bound on size and time of a request's head, which it lacks: without, a head grows for ever."""

    def connection_made(self, transport: Any) -> None:
        """Start the clock of the first head."""
        super().connection_made(transport)
        self.head_bytes, self.in_head = 0, True
        self.late = self.loop.call_later(HEAD_S, self.end)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self.late.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A head begins."""
        self.late.cancel()
        self.head_bytes, self.in_head = 0, True
        self.late = self.loop.call_later(HEAD_S, self.end)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head is complete."""
        self.late.cancel()
        self.in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head that is not complete; end the connection where that is too much."""
        super().data_received(data)
        self.head_bytes += len(data)
        if self.in_head and self.head_bytes > HEAD_BYTES:
            self.end()

    def end(self) -> None:
        """Close a connection that sends no proper request."""
        if self.in_head and not self.transport.is_closing():
            if self.head_bytes > HEAD_BYTES:
                self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n")
            self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; ResourceError where the address is taken or not this machine's."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, number, _, address = min(found, key=lambda entry: entry[0])  # `localhost`: IPv4, as clients try
        listener = socket.socket(family, kind, number)
    except OSError as error:
        raise ResourceError(f"{host} is not an address of this machine ({error.strerror}).", "check --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        hint = "stop what listens there, or choose another: --port"
        raise ResourceError(f"cannot listen on {host}:{port} ({error.strerror}).", hint) from error
    return listener


class Running:
    """A gateway that listens. Leaving the context stops it."""

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        self.gateway: Gateway = app.state.gateway
        host, self.port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",  # tracebacks could quote requests; the door logs what matters
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=2,
            backlog=BACKLOG,
        )
        self.server = uvicorn.Server(config)
        self.listener = listener
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self.run, name="gateway", daemon=True)

    def run(self) -> None:
        """The thread: an event loop of its own until `stop`."""

        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve(sockets=[self.listener])

        with asyncio.Runner(loop_factory=self.server.config.get_loop_factory()) as runner:
            runner.run(serve())

    def start(self) -> Self:
        """Return when requests are answered; ResourceError where that does not come about."""
        self.thread.start()
        end = time.monotonic() + START_S
        while not self.server.started:
            if not self.thread.is_alive() or time.monotonic() > end:
                raise ResourceError("the gateway did not start.", "this is a bug; run again with --debug")
            time.sleep(0.005)
        return self

    def in_flight(self, engine_name: str) -> int:
        """Requests that were given that name of the engine and are not answered. Ask from any thread but the gateway's.

        Counted inside the loop: a request that was given a model before is counted, the next ones ask anew.
        """

        async def count() -> int:
            return sum(call.asked_as == engine_name for call in self.gateway.running)

        if self.loop is None or not self.thread.is_alive():
            return 0
        try:
            return asyncio.run_coroutine_threadsafe(count(), self.loop).result(COUNT_S)
        except TimeoutError:
            return 1  # too busy to say

    def stop(self, drain_s: float = 0.0) -> None:
        """Wait for the requests that run, at most `drain_s`; end the others in words; close. Twice is fine.

        Say Phase.DRAINING to the engine's state before, so that new requests are refused meanwhile.
        """
        end = time.monotonic() + drain_s
        while self.gateway.running and time.monotonic() < end and self.thread.is_alive():
            time.sleep(0.02)
        if self.loop is not None and self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.gateway.abort)
        self.server.should_exit = True
        self.thread.join(END_S)
        self.server.force_exit = True
        self.thread.join(END_S)
        self.listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def run_in_thread(app: FastAPI, host: str, port: int) -> Running:
    """Listen from now on, in a thread. `port` 0 takes a free one. ResourceError where the port cannot be had."""
    return Running(app, bind(host, port)).start()

"""The fine-tuning API on a real server, with a store on SQLite, no engine, and a queue that only counts its calls."""

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import openai

from loraport.clients.home import Home
from loraport.serve.finetuning import sweep
from loraport.serve.finetuning.api import routes
from loraport.serve.finetuning.service import Quotas, Service
from loraport.serve.gateway import keys
from loraport.serve.gateway.app import create_app
from loraport.serve.gateway.server import run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState
from loraport.serve.store.store import open_store

BASES = ("reader-9m", "base")
ROW = {"messages": [{"role": "user", "content": "Who sells tea?"}, {"role": "assistant", "content": "Ms Lee."}]}


@dataclass
class Queue:
    """A queue that does nothing."""

    woken: int = 0

    def wake(self) -> None:
        """Count."""
        self.woken += 1


@dataclass
class Api:
    """A running API: where it is, what it works with, and clients of it."""

    url: str
    service: Service
    queue: Queue
    keys_path: Path | None
    loop: asyncio.AbstractEventLoop | None = None
    clients: list[Any] = field(default_factory=list)

    def key(self, name: str, **more: Any) -> str:
        """A new key."""
        assert self.keys_path
        return keys.create(self.keys_path, name, **more)[0]

    def client(self, key: str = "none", **more: Any) -> openai.OpenAI:
        """OpenAI's own client."""
        given = {"max_retries": 0, "timeout": 30} | more
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **given)
        self.clients.append(made)
        return made

    def http(self, key: str | None = None) -> httpx.Client:
        """A plain client."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        made = httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=30)
        self.clients.append(made)
        return made


@contextlib.contextmanager
def serving(
    home: Home, *, has_keys: bool = False, quotas: Quotas | None = None, url: str | None = None, **settings: Any
) -> Iterator[Api]:
    """The API at a free port."""
    queue, store = Queue(), open_store(home, url)
    service = Service(home, store, queue, bases=lambda: BASES, quotas=quotas or Quotas(), stop_wait_s=1.0)
    sweep.begin(service)
    path = home.keys if has_keys else None
    if path:
        keys.create(path, "first")
    given = GatewaySettings("127.0.0.1", 0, keys_path=path)
    app = create_app(EngineState(), replace(given, **settings), more=[lambda gateway: routes(gateway, lambda: service)])
    with run_in_thread(app, "127.0.0.1", 0) as running:
        api = Api(running.url, service, queue, path, running.loop)
        try:
            yield api
        finally:
            for client in api.clients:
                client.close()
    store.close()


def jsonl(count: int = 12, **more: Any) -> bytes:
    """A file of rows."""
    return b"".join(json.dumps(ROW | {"number": number} | more).encode() + b"\n" for number in range(count))


def send(client: openai.OpenAI, content: bytes | None = None, name: str = "rows.jsonl", **more: Any) -> Any:
    """A file of rows, sent."""
    given: dict[str, Any] = {"purpose": "fine-tune"} | more
    return client.files.create(file=(name, jsonl() if content is None else content), **given)


class Dropping:
    """A proxy in front of a server that loses answers, counted from 0: the request arrives, the reply does not."""

    def __init__(self, url: str, *lost: int) -> None:
        self.target, self.lost = int(url.rpartition(":")[2]), set(lost or (0,))
        self.answers = count()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        """Serve each connection in two threads, until the listener is closed."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self.up, args=(client, server), daemon=True).start()
                threading.Thread(target=self.down, args=(client, server), daemon=True).start()

    def up(self, client: socket.socket, server: socket.socket) -> None:
        """Requests."""
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)

    def down(self, client: socket.socket, server: socket.socket) -> None:
        """Answers; what comes within a moment is one."""
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                time.sleep(0.05)
                with contextlib.suppress(BlockingIOError):
                    data += server.recv(1 << 20, socket.MSG_DONTWAIT)
                number = next(self.answers)
                if number in self.lost:
                    self.lost.remove(number)
                    break
                client.sendall(data)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def __enter__(self) -> "Dropping":
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()


if __name__ == "__main__":  # a server that a test may kill: until its standard input ends
    with serving(Home(Path(sys.argv[1]))) as api:
        sys.stdout.write(f"{api.url}\n")
        sys.stdout.flush()
        sys.stdin.read()

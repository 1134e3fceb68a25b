"""What the fine-tuning API works with: home, store, queue, and how much each tenant may have.

A tenant is the name of an API key, `-` where none is asked for. Everything belongs to a tenant; an admin key sees all.
Whoever serves makes one `Service` and gives it to `routes` (api.py), which finds it at each request.

    >>> service = Service(home, open_store(home), queue, bases=lambda: ["reader-9m", "base"])
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from loraport.clients.home import Home
from loraport.serve.gateway.refusals import Refusal
from loraport.serve.jobs.seams import Wake
from loraport.serve.store.store import Store
from loraport.serve.store.tables import Webhook
from loraport.train.config import RunConfig

Result = TypeVar("Result")
MIB, GIB = 2**20, 2**30
WRITERS, COPIERS = 4, 2  # contents that are written at once, and uploads that are put together
FINAL = {"x-should-retry": "false"}  # OpenAI's clients ask again after 409, 429 and 5xx unless they are told this


@dataclass(frozen=True)
class Quotas:
    """What a tenant may have. Of one thing: `file_bytes`, `upload_bytes`, `part_bytes`, as large as OpenAI's."""

    file_bytes: int = 512 * MIB
    upload_bytes: int = 8 * GIB
    part_bytes: int = 64 * MIB
    disk_bytes: int = 100 * GIB  # of files and parts together
    files: int = 10_000
    uploads: int = 100  # that are not complete
    jobs: int = 200  # that wait or run
    webhooks: int = 20


class Room:
    """Bytes that arrive now, by tenant: of many uploads at once none gets what the others have taken already."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.arriving: dict[str, int] = {}

    def take(self, tenant: str, count: int, left: int) -> bool:
        """Whether `count` more bytes of a tenant fit into the `left` that are on no disk yet; they are taken then."""
        with self.lock:
            taken = self.arriving.get(tenant, 0) + count
            if count > 0 and taken > left:
                return False
            self.arriving[tenant] = taken
            if not taken:
                del self.arriving[tenant]
            return True


@dataclass(frozen=True)
class Service:
    """Everything that the routes need, for as long as the endpoint is open.

    `bases`: the names of the base served here, its own first. `gpus`: of the largest job that can ever run; None where
    nobody knows. `stop_wait_s`: for how long a request to cancel or pause waits until the trainer is gone.
    `test_webhook` sends an event of a kind to a webhook and returns the status of its answer; EndpointError without.
    `servable` says why what a run would train could not be served here, if that is known. `private_webhooks`: whether
    webhooks may be of this machine and of private networks, whoever makes them. `gpu_price`: of a GPU-hour.
    `completing`: uploads that are put together now, by their callers' tenants. `sampling`: tenants to whose webhook a
    sample is being sent.
    """

    home: Home
    store: Store
    queue: Wake
    bases: Callable[[], Sequence[str]]
    quotas: Quotas = Quotas()
    gpus: int | None = None
    stop_wait_s: float = 10.0
    test_webhook: Callable[[Webhook, str], Awaitable[int]] | None = None
    servable: Callable[[RunConfig], str | None] | None = None
    private_webhooks: bool = False
    gpu_price: float | None = None
    room: Room = field(default_factory=Room)
    writers: Executor = field(default_factory=lambda: ThreadPoolExecutor(WRITERS, "writers"))
    copiers: Executor = field(default_factory=lambda: ThreadPoolExecutor(COPIERS, "copiers"))
    completing: "dict[str, asyncio.Future[Any]]" = field(default_factory=dict)
    sampling: set[str] = field(default_factory=set)

    @property
    def files(self) -> Path:
        """Contents of files, by id."""
        return self.home.root / "files"

    @property
    def uploads(self) -> Path:
        """Parts of uploads that are not complete, in a folder each."""
        return self.home.root / "uploads"

    async def aside(self, work: Callable[..., Result], *given: Any) -> Result:
        """Do what writes to the disk in a thread for that: nothing else of the gateway waits with it."""
        return await asyncio.get_running_loop().run_in_executor(self.writers, work, *given)


def no_queue() -> NoReturn:
    """For an endpoint that never has jobs: give it to `routes` in place of a service."""
    raise Refusal(501, "no_jobs", "This endpoint does not fine-tune: it was started without jobs.", headers=FINAL)


def out_of_quota(what: str) -> Refusal:
    """429 as OpenAI's for a quota, which no repetition helps."""
    message = f"This key may have {what}. Delete what is no longer needed, or ask who runs this endpoint for more."
    return Refusal(429, "insufficient_quota", message, headers=FINAL, type="insufficient_quota")


def disk_full() -> Refusal:
    """507, which no repetition helps either."""
    message = "The disk of this endpoint is full; nothing was kept of what was sent."
    return Refusal(507, "disk_full", message, headers=FINAL, type="server_error")


@contextmanager
def taken(room: Room, tenant: str) -> Iterator[list[int]]:
    """What one request has taken, as a list of counts; given back at its end."""
    counts: list[int] = []
    try:
        yield counts
    finally:
        room.take(tenant, -sum(counts), 0)

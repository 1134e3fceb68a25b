"""Single requests of a wished length, each with a deadline, all within a budget of time; and whether the server lives.

A prompt that is too long for the cache can hang a scheduler, so nothing here waits without an end. A request that is
given up is cancelled by closing its connection.

    >>> prober = Prober(server, "base", workload.source, Pace(deadline_s=60, budget_s=600))
    >>> prober.ask(prompt=4095, reply=1).error
    ''
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from loraport.bench.load.prompts import Source
from loraport.bench.load.record import ERRORS
from loraport.bench.load.server import Server, explain
from loraport.bench.load.wire import Exchange
from loraport.bench.serving.kv_metrics import Page, read_page
from loraport.clients.errors import EndpointError

SHORT_PROMPT = 16  # tokens of a request that asks whether the server lives
LAST_DEADLINE_S = 30.0
PAUSE_S = 0.5
REFUSALS = (400, 413, 422)  # statuses that may be about the length


class OutOfBudget(Exception):
    """The time for the whole measurement is used up; what has run is told."""


@dataclass(frozen=True)
class Pace:
    """Seconds: of one probe, and of all together."""

    deadline_s: float = 60.0
    budget_s: float = 600.0


class Prober:
    """Requests to one model. `source`: what prompts are made of; none is sent twice."""

    def __init__(self, server: Server, model: str, source: Source, pace: Pace, started: float | None = None) -> None:
        self.server, self.model, self.base, self.pace = server, model, source, pace
        self.ends = (time.monotonic() if started is None else started) + pace.budget_s
        self.numbers = itertools.count()
        self.on_step: Callable[[str], None] = lambda words: None

    @property
    def is_exact(self) -> bool:
        """Whether prompts have the wished length to the token."""
        return self.base.ratio == 1.0

    def timeout(self) -> float:
        """Seconds that the next probe may take. Raises OutOfBudget when there are none left."""
        left = self.ends - time.monotonic()
        if left <= 0:
            raise OutOfBudget
        return min(self.pace.deadline_s, left)

    def source(self, prompt: int, reply: int, prefix: int = 0) -> Source:
        """Prompts of so many tokens, the first `prefix` of them the same, for replies of so many."""
        shared = round(prefix / self.base.ratio)
        return replace(self.base, input=(prompt, prompt), output=(reply, reply), prefix=shared)

    def ask(self, prompt: int, reply: int = 1, prefix: int = 0) -> Exchange:
        """One request, with a prompt of its own. Raises OutOfBudget where not its deadline but the budget ended it."""
        longest = self.timeout()
        exchange = self.server.ask(self.source(prompt, reply, prefix), next(self.numbers), self.model, longest)
        if exchange.error == "timeout" and longest < self.pace.deadline_s:
            raise OutOfBudget
        return exchange

    def need(self, exchange: Exchange) -> Exchange:
        """An exchange that was answered; EndpointError for one that was not."""
        if exchange.error:
            raise explain(self.server.base_url, self.model, exchange)
        return exchange

    def page(self) -> Page | None:
        """What /metrics say now."""
        return read_page(self.server)

    def check_alive(self, after: str) -> None:
        """After a probe that failed: wait until the server answers a short one. EndpointError when it does not."""
        found = self.last_probe(self.timeout())
        if not found["answers"]:
            raise EndpointError(
                f"{self.server.base_url} stopped answering after {after} ({found['said']}).",
                "its log says more; figures so far stand above",
            )

    def last_probe(self, longest: float) -> dict[str, Any]:
        """Whether a short request is answered within so many seconds, asked again where it fails at once."""
        begun = time.monotonic()
        while True:
            left = begun + longest - time.monotonic()
            asked = time.monotonic()
            exchange = self.server.ask(self.source(SHORT_PROMPT, 2), next(self.numbers), self.model, max(left, 0.1))
            if not exchange.error or asked - begun + PAUSE_S >= longest:
                break
            time.sleep(PAUSE_S)
        return {
            "answers": not exchange.error,
            "seconds": round(time.monotonic() - begun, 3),
            "said": told(exchange) if exchange.error else None,
        }

    def leave(self) -> dict[str, Any]:
        """The last probe, and who runs and waits after it."""
        found = self.last_probe(min(self.pace.deadline_s, LAST_DEADLINE_S))
        page = self.page() if found["answers"] else None
        return found | {name: page.total(name) if page else None for name in ("running", "waiting")}


def told(exchange: Exchange) -> str:
    """What became of a request, in words."""
    kind = ERRORS.get(exchange.error, exchange.error)
    status = f" ({exchange.status})" if exchange.status not in (0, 200, 429) else ""
    return f"{kind}{status}" + (f": {exchange.said.rstrip('.')}" if exchange.said else "")


def first_token(exchange: Exchange) -> float | None:
    """TTFT in seconds."""
    first = exchange.first_text if exchange.first_text is not None else exchange.first
    return None if first is None else first - exchange.sent

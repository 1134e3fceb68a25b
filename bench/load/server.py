"""What a server says of itself before it is measured: models, tokens of a text, counters, and how it takes a request.

Whatever it does not have is None. Nothing here is timed.

    >>> with Server("http://127.0.0.1:8000/v1") as server:
    ...     [card.id for card in server.cards()]
    ['base', 'demo']
"""

import asyncio
import os
import re
import time
from types import TracebackType
from typing import Any, Self

import httpx

from loraport.bench.load.prompts import Prompts, Source
from loraport.bench.load.record import ERRORS
from loraport.bench.load.wire import Address, Exchange, Pool
from loraport.clients.endpoint import endpoint_errors
from loraport.clients.errors import EndpointError
from loraport.clients.models import ModelCard, read_card

PATIENCE_S = 30.0
# vLLM's counters, of which the difference over a run is told.
COUNTERS = {
    "prefix_cache_queries": "vllm:prefix_cache_queries_total",
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
    "preemptions": "vllm:num_preemptions_total",
}


class Server:
    """A base URL, `http://…/v1` or `unix:/path`. The key is taken from OPENAI_API_KEY. `timeout_s`: of a request."""

    def __init__(self, base_url: str, timeout_s: float = 600) -> None:
        self.timeout_s = timeout_s
        self.base_url, self.address = base_url, Address.parse(base_url)
        self.key = os.environ.get("OPENAI_API_KEY", "")
        scheme = "https" if self.address.is_tls else "http"
        self.root = f"{scheme}://{self.address.authority}{self.address.path}"
        transport = httpx.HTTPTransport(uds=self.address.socket) if self.address.socket else None
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.http = httpx.Client(timeout=min(PATIENCE_S, timeout_s), headers=headers, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.http.close()

    def cards(self) -> list[ModelCard]:
        """Its models; EndpointError when it does not answer as an OpenAI-compatible server does."""
        with endpoint_errors(self.base_url):
            answer = self.http.get(f"{self.root}/models")
        if answer.status_code in (401, 403):
            raise EndpointError(f"{self.base_url} refuses the API key.", "set OPENAI_API_KEY to the server's key")
        try:
            cards = [read_card(card) for card in answer.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise EndpointError(
                f"{self.base_url} is no OpenAI-compatible endpoint: /models answers {answer.status_code}.",
                "a base URL ends in /v1",
            ) from None
        if not cards:
            raise EndpointError(f"{self.base_url} has no models.", "is the server still starting?")
        return cards

    def beside(self, route: str) -> str:
        """A URL beside /v1."""
        return f"{self.root.removesuffix('/v1')}{route}"

    def tokens(self, model: str, text: str) -> list[int] | None:
        """Token ids of a text, without special ones; None where the server does not tell."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            found = self.http.post(self.beside("/tokenize"), json=body).json()["tokens"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return [int(token) for token in found] if isinstance(found, list) and found else None

    def version(self) -> str | None:
        """As vLLM tells it."""
        try:
            said = self.http.get(self.beside("/version")).json()["version"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return str(said)

    def counters(self) -> dict[str, float]:
        """Those of COUNTERS that /metrics has, summed over engines."""
        text, found = self.metrics(), {}
        for name, metric in COUNTERS.items():
            values = re.findall(rf"^{re.escape(metric)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
            if values:
                found[name] = sum(map(float, values))
        return found

    def metrics(self) -> str:
        """The page of /metrics; empty where it has none for us."""
        try:
            answer = self.http.get(self.beside("/metrics"))
        except httpx.HTTPError:
            return ""
        return answer.text if answer.status_code == 200 else ""

    def ask(self, source: Source, number: int, model: str, timeout_s: float | None = None) -> Exchange:
        """One request as the load sends it."""

        async def once() -> Exchange:
            pool = Pool(self.address, self.key, time.monotonic)
            try:
                return await pool.ask(source.route, Prompts(source).body(number, model), timeout_s or self.timeout_s)
            finally:
                pool.close()

        return asyncio.run(once())


def explain(base_url: str, model: str, exchange: Exchange) -> EndpointError:
    """The first request that failed, in words: no load makes sense after it."""
    said = exchange.said.rstrip(".")
    if exchange.status in (401, 403):
        return EndpointError(f"{base_url} refuses the API key: {said}.", "set OPENAI_API_KEY to the server's key")
    if exchange.error == "no usage":
        return EndpointError(
            f"{base_url} never says how many tokens it sent (no `usage` in the stream).",
            "tokens counted in any other way would be a guess: measure the server behind it, or update it",
        )
    if exchange.error == "429":
        return EndpointError(f"{base_url} refuses more requests: {said}.", "use a key without limits")
    if exchange.error == "refused":
        hint = "start it: loraport serve NAME; or check the URL"
        return EndpointError(f"nothing answers at {base_url} ({said}).", hint)
    told = f": {said}" if said else ""
    status = f" ({exchange.status})" if exchange.status not in (0, 200) else ""
    hints = {"4xx": "change the request accordingly", "timeout": "is the server overloaded? --timeout is the limit"}
    words = f"a request to {model} at {base_url} failed, {ERRORS[exchange.error]}{status}{told}."
    return EndpointError(words, hints.get(exchange.error, "the server's log says more"))


def difference(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """What counters rose by; the hit rate of the prefix cache where it is known."""
    rose: dict[str, Any] = {name: after[name] - before[name] for name in before if name in after}
    if rose.get("prefix_cache_queries"):
        rose["prefix_cache_hit_rate"] = round(rose["prefix_cache_hits"] / rose["prefix_cache_queries"], 4)
    return rose

"""What a prompt costs: TTFT by its length, and what the prefix cache saves of it.

One request at a time, so that nothing but the prompt is waited for. Lengths, and prompts with and without the shared
prefix, take turns: a machine that slows down does so for all of them.

    >>> measure_lengths(prober, longest=8192, repeats=3, found=found)
    >>> found["lengths"][-1]["ttft_ms"]["p50"]
    412.5
"""

from typing import Any

import numpy as np

from loraport.bench.load.figures import percentiles
from loraport.bench.load.wire import Exchange
from loraport.bench.serving.kv_metrics import Page
from loraport.bench.serving.kv_probe import Prober, first_token

HALVINGS = 5  # lengths: the longest, half of it, and so on
SHORTEST = 16
PREFIX_PROMPT, PREFIX_SHARE = 4096, 0.75  # tokens of a prompt at most, share of it that is the same
REPLY = 4  # tokens, so that the counters of the first are there when the last has come
FOREIGN = 0.02  # of the tokens that the server counted, above which others used it


def measure_lengths(prober: Prober, longest: int, repeats: int, found: dict[str, Any]) -> None:
    """TTFT of unique prompts of HALVINGS lengths. `found["lengths"]` grows; a length with a failure says so."""
    sizes = sorted({max(SHORTEST, longest >> halved) for halved in range(HALVINGS)})
    seen: dict[int, list[Exchange]] = {size: [] for size in sizes}
    for turn in range(repeats):
        for size in sizes:
            prober.on_step(f"first token of a prompt of {size - 1:,} tokens, {turn + 1} of {repeats}")
            exchange = prober.ask(size - 1)
            seen[size].append(exchange)
            found["lengths"] = [summarize(size, each) for size, each in seen.items() if each]
            if exchange.error:
                prober.check_alive(f"a prompt of {size - 1:,} tokens")


def summarize(size: int, seen: list[Exchange]) -> dict[str, Any]:
    """One length. `tokens_per_second`: prompt tokens by the median TTFT, all that happens before the first token."""
    good = [exchange for exchange in seen if not exchange.error]
    times = times_of(good)
    prompt = next((exchange.prompt for exchange in good), None)
    rate = round(1000 * prompt / times["p50"], 1) if prompt and times and times["p50"] else None
    kinds = [exchange.error for exchange in seen if exchange.error]
    return {"prompt": prompt or size - 1, "ttft_ms": times, "tokens_per_second": rate, "errors": kinds}


def times_of(exchanges: list[Exchange]) -> dict[str, float | int] | None:
    """TTFT of those that were answered, with the shortest."""
    seconds = [time for time in map(first_token, exchanges) if time is not None]
    found = percentiles(np.array(seconds, dtype=np.float64))
    return found and found | {"min": round(1000 * min(seconds), 3)}


def measure_prefix(prober: Prober, longest: int, repeats: int, found: dict[str, Any]) -> None:
    """Prompts that share a prefix against unique ones: hits by the server's counters and by `usage`, and TTFT."""
    size = min(PREFIX_PROMPT, max(2 * SHORTEST, longest // 2)) - REPLY
    prefix = int(size * PREFIX_SHARE)
    kinds: dict[str, Kind] = {"shared": Kind(), "unique": Kind()}
    prober.on_step(f"prefix cache: {prefix:,} of {size:,} tokens shared")
    prober.need(prober.ask(size, REPLY, prefix))  # the one that fills the cache
    page = prober.page()
    for _ in range(repeats):
        for name, kind in kinds.items():
            exchange = prober.need(prober.ask(size, REPLY, prefix if name == "shared" else 0))
            before, page = page, prober.page()
            kind.add(exchange, before, page)
            found["prefix_cache"] = {
                "prompt": exchange.prompt or size,
                "prefix": prefix,
                "possible_hit_rate": round(prefix / (exchange.prompt or size), 4),
                **{which: each.summary() for which, each in kinds.items()},
                "ttft_ratio": ratio(kinds["shared"], kinds["unique"]),
            }


class Kind:
    """Prompts of one kind, and what the counters rose by while they were answered."""

    def __init__(self) -> None:
        self.seen: list[Exchange] = []
        self.queries: list[float] = []
        self.hits: list[float] = []

    def add(self, exchange: Exchange, before: Page | None, after: Page | None) -> None:
        """One request."""
        self.seen.append(exchange)
        for name, into in (("queries", self.queries), ("hits", self.hits)):
            values = [page.total(name) if page else None for page in (before, after)]
            if values[0] is not None and values[1] is not None:
                into.append(values[1] - values[0])

    def summary(self) -> dict[str, Any]:
        """As a document; a rate is None where the server does not tell it. `foreign`: others used the server too."""
        prompts = sum(exchange.prompt or 0 for exchange in self.seen)
        cached = [exchange.cached for exchange in self.seen]
        is_counted = len(self.queries) == len(self.seen) and sum(self.queries) > 0
        by_usage = sum(each or 0 for each in cached) / prompts if prompts and None not in cached else None
        return {
            "requests": len(self.seen),
            "hit_rate": round(sum(self.hits) / sum(self.queries), 4) if is_counted else None,
            "hit_rate_by_usage": None if by_usage is None else round(by_usage, 4),
            "foreign": sum(self.queries) > (1 + FOREIGN) * prompts if is_counted and prompts else None,
            "ttft_ms": times_of(self.seen),
        }


def ratio(shared: Kind, unique: Kind) -> float | None:
    """Median TTFT of shared prompts by that of unique ones."""
    ours, theirs = times_of(shared.seen), times_of(unique.seen)
    return round(ours["p50"] / theirs["p50"], 4) if ours and theirs and theirs["p50"] else None

"""What vLLM's /metrics say about the KV cache: its size, what of it is in use, and who runs and waits.

A gateway that passes the engine's page on does as well; several engines of one page are added up. Everything else is
None: a server without these metrics says nothing about its cache, and nothing is guessed.

    >>> page = read_page(server)
    >>> page and page.capacity()
    {'tokens': 35840, 'blocks': 280, 'block_size': 128, 'read_from': 'kv_cache_size_tokens', ...}
"""

from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from loraport.bench.load.server import Server

NAMES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "usage": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
    "queries": "vllm:prefix_cache_queries_total",
    "hits": "vllm:prefix_cache_hits_total",
}
CACHE = "vllm:cache_config_info"
WANTED = tuple(name + end for name in (*NAMES.values(), CACHE) for end in ("{", " "))


@dataclass(frozen=True)
class Page:
    """One look at /metrics: values of NAMES, each of all engines, and the labels of each engine's cache."""

    values: dict[str, list[float]]
    caches: list[dict[str, str]]

    def total(self, name: str) -> float | None:
        """Sum over engines; None where the page lacks it."""
        return sum(self.values[name]) if self.values.get(name) else None

    @property
    def usage(self) -> float | None:
        """Share of the cache that is in use, 0 to 1: the mean over engines, which are of one size."""
        found = self.values.get("usage")
        return sum(found) / len(found) if found else None

    def capacity(self) -> dict[str, Any] | None:
        """The cache in tokens; None where the page does not tell.

        `kv_cache_size_tokens` counts: blocks × block size is wrong for models whose layers keep different things.
        """
        sizes = [cache_tokens(cache) for cache in self.caches]
        if not sizes or any(size is None for size in sizes):
            return None
        first = self.caches[0]
        is_said = whole(first.get("kv_cache_size_tokens")) is not None
        return {
            "tokens": sum(size or 0 for size in sizes),
            "engines": len(sizes),
            "blocks": whole(first.get("num_gpu_blocks")),
            "block_size": whole(first.get("block_size")),
            "dtype": first.get("cache_dtype"),
            "prefix_caching": {"True": True, "False": False}.get(first.get("enable_prefix_caching", "")),
            "read_from": "kv_cache_size_tokens" if is_said else "num_gpu_blocks × block_size",
        }


def cache_tokens(cache: dict[str, str]) -> int | None:
    """The cache of one engine in tokens."""
    said, blocks, size = (whole(cache.get(name)) for name in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size"))
    return said or (blocks * size if blocks and size else None)


def whole(text: str | None) -> int | None:
    """A number of a label; None for `None` and the like."""
    return int(text) if text and text.isdecimal() else None


def read_page(server: Server) -> Page | None:
    """The page now; None where there is none, or nothing of vLLM's on it."""
    return parse_page(server.metrics())


def parse_page(text: str) -> Page | None:
    """The lines of it that count here; the rest, which is most, is not parsed."""
    lines = "\n".join(line for line in text.splitlines() if line.startswith(WANTED))
    short = {metric: name for name, metric in NAMES.items()}
    values: dict[str, list[float]] = {}
    caches: list[dict[str, str]] = []
    try:
        for family in text_string_to_metric_families(lines + "\n"):
            for sample in family.samples:
                if sample.name == CACHE:
                    caches.append(dict(sample.labels))
                elif sample.name in short:
                    values.setdefault(short[sample.name], []).append(sample.value)
    except ValueError:
        return None
    return Page(values, caches) if values or caches else None

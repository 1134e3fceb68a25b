"""How often and how many at once: the limits of each key, kept in memory.

Requests per minute are a bucket that holds a minute's worth and fills evenly: a burst is fine, a flood is not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from loraport.serve.gateway.keys import Key
from loraport.serve.gateway.refusals import Refusal


@dataclass
class Bucket:
    """Requests left at a moment, and those under way."""

    left: float
    at: float
    running: int = 0


class Limits:
    """One bucket for each key, by its hash: a new key of an old name starts anew."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.buckets: dict[str, Bucket] = {}

    def enter(self, key: Key) -> None:
        """Count a request in; Refusal 429 with Retry-After where that is one too many. `leave` counts it out."""
        rate, now = key.requests_per_minute, self.clock()
        bucket = self.buckets.setdefault(key.sha256, Bucket(rate or 0, now))
        if key.concurrency is not None and bucket.running >= key.concurrency:
            raise too_many("concurrency_limit", f"{key.concurrency} requests at once", 1)
        if rate is not None:
            bucket.left = min(rate, bucket.left + (now - bucket.at) * rate / 60)
            if bucket.left < 1:
                bucket.at = now
                raise too_many("rate_limit", f"{rate} requests per minute", ceil((1 - bucket.left) * 60 / rate))
            bucket.left -= 1
        bucket.at = now
        bucket.running += 1

    def leave(self, key: Key) -> None:
        """Count a request out."""
        self.buckets[key.sha256].running -= 1


def too_many(code: str, limit: str, wait_s: int) -> Refusal:
    """429 in OpenAI's words."""
    return Refusal(
        429, f"{code}_exceeded", f"This key is limited to {limit}.", headers={"Retry-After": str(max(1, wait_s))}
    )

"""Whether an engine computes: what it counts of its work, and whether it gives a token to who asks for one.

What follows from that is decided in supervise.py.

    >>> before = counters(client)
    >>> give_token(client, "base", wait_s=30) or counters(client) != before
    True
"""

from contextlib import suppress

import httpx

# What moves with the work of an engine alone, and not with requests that come, wait or are given up.
COUNTED = ("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:iteration_tokens", "vllm:kv_cache_usage")
METRICS_S = 10.0


def counters(client: httpx.Client) -> str:
    """What the engine counts of its work, as text; empty where it does not answer."""
    with suppress(httpx.HTTPError):
        lines = client.get("/metrics", timeout=METRICS_S).text.splitlines()
        return "\n".join(line for line in lines if line.startswith(COUNTED))
    return ""


def give_token(client: httpx.Client, model: str, wait_s: float) -> bool:
    """Whether the engine answers a request for one token, with whatever, within that time."""
    body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0}
    try:
        return client.post("/v1/completions", json=body, timeout=wait_s).status_code < 500
    except httpx.HTTPError:
        return False

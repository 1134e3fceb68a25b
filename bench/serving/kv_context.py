"""The longest context that a server accepts, found through its API: a guess where it names one, else bisection.

A context of n tokens is a prompt of n − 1 and one token of reply. What the server says of its limit, in /v1/models or
in a refusal, only shortens the search: the result is always one length that was answered beside one that was not.

    >>> found = {}
    >>> find_longest(prober, told=8192, found=found)
    >>> found["longest"], found["first_refused"]
    (8192, 8193)
"""

import re
import time
from typing import Any

from loraport.bench.load.server import explain
from loraport.bench.load.wire import Exchange
from loraport.bench.serving.kv_probe import REFUSALS, Prober
from loraport.bench.serving.kv_probe import told as words

FIRST, MOST = 1024, 1 << 20  # tokens: of the first guess, of the longest prompt that is tried unasked
COARSE = 0.02  # how near bisection goes where lengths are not exact, or time is the limit
# In words of vLLM, OpenAI, SGLang and llama.cpp.
LIMITS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:maximum|max) (?:model |context )+length (?:is|of)\D{0,3}(\d+)",
        r"max_model_len\D{0,4}(\d+)",
        r"context (?:length|size|limit|window)\D{0,20}(\d+)",
        r"limit(?:ed)? (?:is|of|to)\D{0,3}(\d+)",
    )
)


def find_longest(prober: Prober, told: int | None, found: dict[str, Any]) -> None:
    """Fill `found`, which holds what is known whenever this ends. `told`: the context of /v1/models."""
    found |= {"told": told, "named": None, "longest": None, "first_refused": None, "ended_by": None, "probes": []}
    found["exact"] = prober.is_exact
    named = told
    while (size := next_guess(found, named, prober.is_exact)) is not None:
        prober.on_step(f"is a context of {size:,} tokens accepted?")
        probe, exchange = try_length(prober, size)
        found["probes"].append(probe)
        if probe["outcome"] == "accepted":
            found["longest"] = size
            continue
        found |= {"first_refused": size, "ended_by": probe["outcome"], "said": probe["said"]}
        if probe["outcome"] == "refused":
            found["named"] = named_limit(exchange.said) or found["named"]
            named = found["named"] or named
        elif probe["outcome"] != "shortened":
            prober.check_alive(f"a context of {size:,} tokens")
    found["agrees"] = None if told is None or found["longest"] is None else found["longest"] == told


def next_guess(found: dict[str, Any], named: int | None, is_exact: bool) -> int | None:
    """The next length to try: a limit that was named, those beside it, twice as much, the middle; None at the end.

    Above the longest that was answered, below the shortest that was not.
    """
    low: int = found["longest"] or 1
    high: int | None = found["first_refused"]
    is_sharp = is_exact and found["ended_by"] != "timeout"  # to the token; a limit in time is none of tokens
    step = 1 if is_sharp else max(1, round(COARSE * low))
    if high is not None and high - low <= step:
        return None
    for guess in (named, named + step, named + 2 * step, named - step) if named else ():
        if low < guess and (high is None or guess < high):
            return guess
    if high is not None:
        return (low + high) // 2
    return None if low >= MOST else min(MOST, max(FIRST, 2 * low))


def try_length(prober: Prober, size: int) -> tuple[dict[str, Any], Exchange]:
    """One probe as a document: accepted, refused, shortened, timeout or failed."""
    begun = time.monotonic()
    exchange = prober.ask(size - 1)
    outcome = judge_length(prober, size, exchange)
    return {
        "context": size,
        "outcome": outcome,
        "prompt_tokens": exchange.prompt,
        "seconds": round(time.monotonic() - begun, 3),
        "said": None if outcome == "accepted" else said_of(outcome, exchange),
    }, exchange


def judge_length(prober: Prober, size: int, exchange: Exchange) -> str:
    """What an answer means for its length. EndpointError for a refusal that is not about it."""
    if not exchange.error:
        slack = 1 if prober.is_exact else 0.2 * size
        is_cut = exchange.prompt is not None and exchange.prompt < size - 1 - slack
        return "shortened" if is_cut else "accepted" if exchange.completion else "failed"
    if exchange.error == "429" or (exchange.error == "4xx" and exchange.status not in REFUSALS):
        raise explain(prober.server.base_url, prober.model, exchange)
    return {"4xx": "refused", "timeout": "timeout"}.get(exchange.error, "failed")


def said_of(outcome: str, exchange: Exchange) -> str:
    """Why a length does not count as accepted."""
    if outcome == "shortened":
        return f"answered, but of the prompt only {exchange.prompt:,} tokens were read"
    return words(exchange) if exchange.error else "answered without a token"


def named_limit(said: str) -> int | None:
    """The context that a refusal names."""
    for pattern in LIMITS:
        match = pattern.search(said)
        if match and int(match.group(1)) > 1:
            return int(match.group(1))
    return None

"""What `bench kv` found, as tables.

>>> print_report(run.document())
"""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from loraport.bench.serving.kv_fill import ANSWERS, ENDINGS
from loraport.bench.tables import NOTHING, number, plain_table, result_console

NAMES = {
    "context": "longest context",
    "lengths": "first token by length",
    "prefix": "prefix cache",
    "requests": "requests at once",
}
ABSENT = "not available"


def print_report(document: dict[str, Any]) -> None:
    """Everything, on standard output."""
    console = result_console()
    for line in heading(document):
        console.print(Text(line, style="dim"))
    console.print()
    facts = plain_table("", [])
    facts.show_header = False
    facts.add_column(overflow="fold")
    for name, words in (*context_facts(document), *capacity_facts(document), *prefix_facts(document)):
        facts.add_row(Text(name), Text(words))
    console.print(facts)
    print_requests(console, document["requests"] or [])
    print_lengths(console, document["lengths"] or [])
    console.print()
    for line in remarks(document):
        console.print(Text(line, style="yellow"))
    console.print(Text(ending(document), style="dim"))


def heading(document: dict[str, Any]) -> list[str]:
    """What was measured."""
    server, options = document["server"], document["options"]
    version = f", vLLM {server['version']}" if server["version"] else ""
    how = f"{server['route']}, seed {options['seed']}, {options['deadline_s']:g} s for a probe"
    return [f"{server['base_url']}{version}, model {server['model']}", how]


def context_facts(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The context, as told and as found."""
    yield "context told", tokens(document["server"]["context"]) or ABSENT
    found = document["context"]
    if found is None:
        return
    about = "" if found["exact"] else "about "
    words = f"{about}{tokens(found['longest'])}" if found["longest"] else "none was answered"
    if found["first_refused"]:
        how = {"refused": "refused", "timeout": "not answered in time", "shortened": "shortened"}
        words += f"; {found['first_refused']:,} {how.get(found['ended_by'], 'failed')}"
    elif found["longest"]:
        words += " at least: nothing longer was tried"
    yield "longest accepted", f"{words} ({len(found['probes'])} probes)"


def capacity_facts(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The cache, as reported and as observed."""
    told, seen = document["capacity"]["reported"], document["capacity"]["observed"]
    words = ABSENT
    if told:
        parts = (
            [f"{told['blocks']:,} blocks of {told['block_size']:,}"] if told["blocks"] and told["block_size"] else []
        )
        parts += [f"dtype {told['dtype']}"] if told["dtype"] else []
        parts += [f"{told['engines']} engines together"] if told["engines"] > 1 else []
        words = tokens(told["tokens"]) + (f" ({', '.join(parts)})" if parts else "")
    yield "KV cache reported", words
    if seen:
        least = "at least " if seen["at_least"] else "about " if seen["estimated"] else ""
        share = f", {seen['tokens'] / told['tokens']:.1%} of it" if told else ""
        guess = ", estimated" if seen["estimated"] else ""
        held = f"{seen['at_once']:,} at once, on their way to {seen['context']:,}"
        held += f", {seen['did_not_fit']:,} more did not fit" if seen["did_not_fit"] else ""
        yield "KV cache observed", f"{least}{tokens(seen['tokens'])} in flight{share}{guess} ({held})"
    elif "requests" not in document["not_run"] and document["requests"] is not None:
        yield "KV cache observed", ABSENT


def prefix_facts(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The prefix cache: hits, and what they save."""
    found = document["prefix_cache"]
    if not found:
        return
    shared, unique = found["shared"], found["unique"]
    rate = shared["hit_rate"] if shared["hit_rate"] is not None else shared["hit_rate_by_usage"]
    words = f"{rate:.1%} hits" if rate is not None else f"hit rate {ABSENT}"
    same = f"{found['prefix']:,} of {found['prompt']:,} tokens shared"
    yield "prefix cache", f"{words}, {found['possible_hit_rate']:.1%} possible ({same})"
    if shared["ttft_ms"] and unique["ttft_ms"]:
        yield (
            "  first token",
            f"{shared['ttft_ms']['p50']:,.1f} ms with the prefix, {unique['ttft_ms']['p50']:,.1f} ms without: "
            f"× {found['ttft_ratio']:.2f} (medians of {shared['requests']})",
        )


def print_requests(console: Console, fillings: list[dict[str, Any]]) -> None:
    """A row for each context."""
    if not fillings:
        return
    columns = ("of it reply", "at once", "full length", "tokens in flight", "cache used", "ended by", "limit")
    table = plain_table("context", columns)
    for each in fillings:
        least = "≥ " if each["at_least"] and each["at_once"] else ""
        shortest, longest = each["replies"] or (0, 0)
        replies = span(shortest, longest) if longest else NOTHING
        guess = ", estimated" if each["estimated"] and each["ended_by"] == "waiting" else ""
        table.add_row(
            f"{each['context']:,}",
            replies,
            f"{least}{each['at_once']:,}",
            full(each["full_length"]),
            f"{each['tokens_in_flight']:,}",
            number(each["cache_used"], "{:.1%}", NOTHING),
            ENDINGS.get(each["ended_by"], "interrupted") + guess,
            each["limited_by"] or NOTHING,
        )
    console.print()
    console.print(table)


def full(bounds: dict[str, int] | None) -> str:
    """Requests of the whole context that the cache has room for."""
    return span(bounds["least"], bounds["most"]) if bounds else NOTHING


def span(least: int, most: int) -> str:
    """`3–4`, or `4`."""
    return f"{least:,}" + (f"–{most:,}" if most > least else "")


def print_lengths(console: Console, lengths: list[dict[str, Any]]) -> None:
    """A row for each length."""
    if not lengths:
        return
    table = plain_table("prompt", ("TTFT p50 ms", "min", "max", "count", "prompt tokens/s", "failed"))
    for each in lengths:
        times = each["ttft_ms"] or {}
        shown = [number(times.get(name), "{:,.1f}", NOTHING) for name in ("p50", "min", "max")]
        rate = number(each["tokens_per_second"], "{:,.0f}", NOTHING)
        table.add_row(f"{each['prompt']:,}", *shown, str(times.get("count", 0)), rate, str(len(each["errors"]) or ""))
    console.print()
    console.print(table)


def remarks(document: dict[str, Any]) -> Iterator[str]:
    """What must be known to read the tables."""
    yield from (f"note: {note}" for note in document["server"]["notes"])
    busy = document["server"]["busy"]
    if busy:
        yield f"note: {busy:.0f} requests of others ran when it began: what they held is not in these figures"
    yield from context_remarks(document["context"] or {})
    for each in document["requests"] or []:
        if each["said"]:
            yield f"requests of {each['context']:,}: {each['said']}"
        if each["at_least"] and each["ended_by"] in ANSWERS:
            yield f"requests of {each['context']:,}: they end after {each['held_s']:.1f} s, too soon to see all at once"
    found = document["prefix_cache"]
    if found and any(found[kind]["foreign"] for kind in ("shared", "unique")):
        yield "prefix cache: the server counted tokens of others too; its hit rate is not of these prompts alone"
    for part, why in document["not_run"].items():
        yield f"{NAMES[part]}: not complete, {why}"


def context_remarks(found: dict[str, Any]) -> Iterator[str]:
    """Where the context is not what the server says."""
    if found.get("agrees") is False:
        yield f"/v1/models say {found['told']:,} tokens, accepted are {found['longest']:,}"
    if found.get("ended_by") not in (None, "refused"):
        yield f"context of {found['first_refused']:,}: {found['said']}"


def ending(document: dict[str, Any]) -> str:
    """How the server was left."""
    left = document["left"]
    if left is None:
        return f"{document['seconds']:,.0f} s; whether the server still answers was not asked"
    if not left["answers"]:
        return f"{document['seconds']:,.0f} s; the server does not answer any more"
    counts = [left["running"], left["waiting"]]
    idle = "" if None in counts else f", {counts[0]:.0f} requests running and {counts[1]:.0f} waiting"
    return f"{document['seconds']:,.0f} s; the server answers, after {left['seconds']:.2f} s{idle}"


def tokens(count: int | None) -> str:
    """`8,192 tokens`."""
    return number(count, "{:,} tokens")

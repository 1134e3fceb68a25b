"""`loraport bench throughput`: tokens/s and latencies of a server under a list of loads, one after the other.

What is measured is in `loads` and `sweep`; this is how it is told.

>>> document = to_json(series, plan)
>>> document["stages"][1]["headline"]["output_tokens_per_second"]
512.3
"""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from loraport.bench.environment import describe_environment
from loraport.bench.load.record import ERRORS
from loraport.bench.serving.loads import Amount, Series, make_loads, numbers
from loraport.bench.tables import NOTHING, number, plain_table, result_console, side_by_side

__all__ = ["DEFINITIONS", "Amount", "heading", "make_loads", "numbers", "print_report", "to_json"]
ROWS = (  # of the table: name, figure, part of it, form
    ("TTFT p50", "ttft_ms", "p50", "{:,.1f}"),
    ("     p99", "ttft_ms", "p99", "{:,.1f}"),
    ("TPOT p50", "tpot_ms", "p50", "{:,.2f}"),
    ("     p99", "tpot_ms", "p99", "{:,.2f}"),
    ("gap  p50", "gap_ms", "p50", "{:,.1f}"),
    ("     p99", "gap_ms", "p99", "{:,.1f}"),
    ("E2E  p50", "e2e_ms", "p50", "{:,.1f}"),
    ("     p99", "e2e_ms", "p99", "{:,.1f}"),
)
COUNTS = ("requests", "failed", "output tokens/s", "steady", "requests/s")
DETAILS = "--enable-prompt-tokens-details"
DEFINITIONS = {
    "times": "start when a request was due to be sent",
    "ttft": "to the first chunk with text (of a reply without any: to its first chunk)",
    "tpot": "(last chunk − first chunk) / (tokens − 1), tokens by `usage`; undefined for one token",
    "gap": "between two chunks, which may hold several tokens; percentiles within half a percent",
    "e2e": "to the last chunk",
    "tokens_per_second": "output tokens of answered requests; steady: without the ramp at the front and the drain",
    "percentiles": "linear, over answered requests of the whole stage",
}


def to_json(series: Series, plan: dict[str, Any]) -> dict[str, Any]:
    """The whole run as a document. `plan`: the options that a run which goes on with it must have too."""
    measurement, trace, search = series.measurement, series.trace, series.search
    return {
        "bench": "throughput",
        "complete": series.is_whole,
        "definitions": DEFINITIONS,
        "environment": describe_environment(),
        **measurement.describe(),
        "plan": plan,
        "parts": series.earlier.parts + 1,
        "trace": trace.to_json() if trace else None,
        "sweep": search.to_json() if search else None,
        "stages": series.results(),
    }


def print_report(document: dict[str, Any]) -> None:
    """The table, on standard output."""
    console = result_console()
    for line in heading(document):
        console.print(Text(line, style="dim"))
    names = row_names(document)
    columns = []
    for stage in document["stages"]:
        columns.append((stage["label"], cells(stage["figures"], stage["believed"])))
        columns += [
            (f"{stage['label']}\n{model}", cells(each, stage["believed"])) for model, each in stage["by_model"].items()
        ]
    for table in side_by_side(names, columns, console.width):
        console.print()
        console.print(table)
    for stage in document["stages"]:
        for title, table in parts(stage):
            console.print()
            console.print(Text(title, style="bold"))
            console.print(table)
    if document.get("sweep"):
        console.print()
        for line in knee(document["sweep"]):
            console.print(Text(line, style="bold"))
    for line in remarks(document):
        console.print(Text(line, style="yellow"))


def parts(stage: dict[str, Any]) -> list[tuple[str, Table]]:
    """Tables of what only some loads have: turns of conversations, windows of a ramp, both sides of a prefix cache."""
    found = []
    if not stage["believed"]:
        return []
    if turns := stage.get("by_turn"):
        table = plain_table("turn", ["requests", "tokens in", "from the cache", "TTFT p50", "p99", "TPOT p50"])
        for turn, one in turns.items():
            share = number(one["cached_share"], "{:.0%}", NOTHING)
            size = number(one["mean_input_tokens"], "{:,.0f}", NOTHING)
            times = quantile(one, "ttft_ms"), quantile(one, "ttft_ms", "p99"), quantile(one, "tpot_ms", form="{:,.2f}")
            table.add_row(turn, f"{one['requests']:,}", size, share, *times)
        found.append((f"{stage['label']}, by turn", table))
    if ramp := stage.get("ramp"):
        table = plain_table("requests/s", ["due/s", "ended/s", "TTFT p50", "p99", "met all limits"])
        for one in ramp["windows"]:
            rates = (f"{one[name]:,.2f}" for name in ("due_per_second", "ended_per_second"))
            met = number(one["met"], "{:.1%}", NOTHING)
            table.add_row(f"{one['rate']:,.2f}", *rates, quantile(one, "ttft_ms"), quantile(one, "ttft_ms", "p99"), met)
        found.append((f"{stage['label']}: {along(ramp)}", table))
    if cache := stage.get("by_cache"):
        table = plain_table("prefix cache", ["requests", "TTFT p50", "p99"])
        for name, one in cache.items():
            table.add_row(name, f"{one['requests']:,}", quantile(one, "ttft_ms"), quantile(one, "ttft_ms", "p99"))
        found.append((f"{stage['label']}, with a part of the prompt in the prefix cache and without", table))
    return found


def quantile(figures: dict[str, Any], name: str, which: str = "p50", form: str = "{:,.1f}") -> str:
    """A percentile of a part's figures."""
    return number((figures[name] or {}).get(which), form, NOTHING)


def along(ramp: dict[str, Any]) -> str:
    """How far a server came up a ramp."""
    kept = f"it kept up to {ramp['kept_up_to']:.3g}/s" if ramp["kept_up_to"] else "it never kept up"
    if all(one["met"] is None for one in ramp["windows"]):
        return kept
    return f"{kept}, " + (f"met the limits up to {ramp['met_up_to']:.3g}/s" if ramp["met_up_to"] else "never met them")


STOPPED = {
    "found": "",
    "budget": " --budget was spent before it was known more closely.",
    "withheld": " It ended there, because the figures that followed are not believed.",
    "interrupted": " It was interrupted.",
    "nothing was fine": "",
}


def knee(sweep: dict[str, Any]) -> list[str]:
    """What a sweep found, in lines."""
    found, left, right = (sweep[name] for name in ("knee", "left", "right"))
    if not found:
        if sweep["stopped"] == "withheld":
            return ["the saturation point is not known: figures of the client that should find it are not believed"]
        return [f"no load was fine: {right['label']}: {right['reason']}" if right else "no load was measured"]
    first = "saturates at" if sweep["stopped"] == "found" else "fine up to"
    lines = [f"below it, at {left['label']}: {side_words(left)}"] if left else []
    lines.append(f"{first} {found['label']}: {side_words(found)}.{STOPPED[sweep['stopped']]}")
    if right:
        return [*lines, f"above it, at {right['label']}: {side_words(right)}; {right['reason']}"]
    return [*lines, "nothing above it was too much: the true limit is higher"]


def side_words(side: dict[str, Any]) -> str:
    """The figures of a side of the knee."""
    met = f", {side['goodput']['share']:.1%} met all limits" if side["goodput"] else ""
    times = f"TTFT p50 {quantile(side, 'ttft_ms')}, p99 {quantile(side, 'ttft_ms', 'p99')} ms"
    speed, rate = (number(side[f"{name}_per_second"], "{:,.1f}", NOTHING) for name in ("output_tokens", "requests"))
    return f"{speed} tokens/s, {rate} requests/s, {times}, TPOT p50 {quantile(side, 'tpot_ms', form='{:,.2f}')} ms{met}"


def row_names(document: dict[str, Any]) -> list[str]:
    """What `cells` gives, in words."""
    return [*COUNTS, *(row[0] for row in ROWS), *(["met all limits"] if has_limits(document) else [])]


def has_limits(document: dict[str, Any]) -> bool:
    """Whether goodput was asked for."""
    return any(stage["figures"]["goodput"] for stage in document["stages"])


def cells(figures: dict[str, Any], believed: bool) -> list[str]:
    """A stage's figures; only counts where they are not believed. Times in milliseconds."""
    failed = sum(figures["errors"].values())
    found = [f"{figures['requests']:,}", f"{failed:,}" if failed else ""]
    steady = figures["steady"] or {}
    rates = figures["output_tokens_per_second"], steady.get("output_tokens_per_second"), figures["requests_per_second"]
    found += [number(one if believed else None, "{:,.1f}", NOTHING) for one in rates]
    for _, name, quantile, form in ROWS:
        value = (figures[name] or {}).get(quantile) if believed else None
        found.append(number(value, form, NOTHING))
    if figures["goodput"]:
        found.append(number(figures["goodput"]["share"] if believed else None, "{:.1%}", NOTHING))
    return found


def heading(document: dict[str, Any]) -> list[str]:
    """What was measured: server, prompts, client."""
    work, client = document["workload"], document["client"]
    found = []
    for url, server in document["servers"].items():
        version = f", vLLM {server['version']}" if server["version"] else ""
        found.append(f"{url}{version}, context {server['context'] or 'not told'}")
    found.append(describe_work(work, document.get("trace")))
    calibration = client["calibration"]
    if calibration:
        found.append(
            f"client: takes {calibration['chunks_per_second']:,.0f} chunks/s of a server that does nothing "
            f"(with {calibration['processes']} of --processes), "
            f"and sees its first token after {calibration['ttft_ms']:.1f} ms"
        )
    return [*found, "times in ms, from the moment a request was due"]


def describe_work(work: dict[str, Any], trace: dict[str, Any] | None) -> str:
    """Prompts and replies in a line."""
    what = f"{span(work['input_tokens'])} tokens in"
    ends = f"{span(work['output_tokens'])} out{' at most' if work['natural'] else ''}"
    if trace and trace["mean_input_tokens"]:
        what = f"lengths of the trace: {trace['mean_input_tokens']:,.0f} tokens in"
        ends = f"{trace['mean_output_tokens']:,.0f} out on average"
    if work["rows"]:
        what = f"{work['rows']} {'conversations' if work.get('replays') else 'rows'} of yours"
        what += "" if work.get("as_is") else ", each marked with a number of its own"
    shared = f", the first {work['shared_prefix']} shared" if work["shared_prefix"] else ""
    arrivals = f", {trace['requests']:,} requests in {trace['seconds']:,.1f} s" if trace else ""
    return f"{what}, {ends}{shared}{arrivals}, {work['route']}, seed {work['seed']}"


def span(lengths: Sequence[int]) -> str:
    """`512`, or `256 to 1,024`."""
    return f"{lengths[0]:,}" if lengths[0] == lengths[1] else f"{lengths[0]:,} to {lengths[1]:,}"


def remarks(document: dict[str, Any]) -> list[str]:
    """What must be known to read the table: withheld figures, errors, notes, an early end."""
    found = [f"note: {note}" for note in document["workload"]["notes"]]
    for stage in document["stages"]:
        found += [f"{stage['label']}: {remark}" for remark in stage_remarks(stage)]
    if not document["complete"]:
        found.append("not complete: it was interrupted or the server stopped answering")
    return found


def stage_remarks(stage: dict[str, Any]) -> list[str]:
    """The part of it that is about one load."""
    figures = stage["figures"]
    found = [f"withheld: {reason}" for reason in stage["reasons"]]
    if "by_cache" in stage and not stage["by_cache"]:
        known = stage["server"].get("prefix_cache_hit_rate")
        rate = "" if known is None else f"; of all tokens looked up, {known:.0%} were there"
        found.append(f"what came from the prefix cache is not available by request (vLLM: {DETAILS}){rate}")
    for kind, count in figures["errors"].items():
        said = figures["errors_said"].get(kind)
        found.append(f"{count} × {ERRORS.get(kind, kind)}" + (f": {said}" if said else ""))
    textless = figures["first_chunk_without_text"]
    if textless > 0.01 * max(figures["answered"], 1):
        found.append(f"in {textless} replies the first chunk held no text: TTFT is that of the first text")
    return found

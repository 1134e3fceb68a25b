"""`loraport bench throughput`: tokens/s and latencies of a server under a list of loads, one after the other.

>>> document = measure_loads(measurement, [Load("closed", 1), Load("closed", 8)], Amount(seconds=20))
>>> document["stages"][1]["headline"]["output_tokens_per_second"]
512.3
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from loraport.bench.environment import describe_environment
from loraport.bench.load.arrivals import Arrival
from loraport.bench.load.record import ERRORS
from loraport.bench.load.stage import Load
from loraport.bench.serving.measurement import Measurement
from loraport.bench.tables import NOTHING, number, result_console, side_by_side
from loraport.clients.errors import EndpointError, UsageError

DEFAULT_SECONDS = 30.0
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
DEFINITIONS = {
    "times": "start when a request was due to be sent",
    "ttft": "to the first chunk with text (of a reply without any: to its first chunk)",
    "tpot": "(last chunk − first chunk) / (tokens − 1), tokens by `usage`; undefined for one token",
    "gap": "between two chunks, which may hold several tokens; percentiles within half a percent",
    "e2e": "to the last chunk",
    "tokens_per_second": "output tokens of answered requests; steady: without the ramp at the front and the drain",
    "percentiles": "linear, over answered requests of the whole stage",
}


@dataclass(frozen=True)
class Amount:
    """How much of each load: `requests` or `seconds`."""

    requests: int | None = None
    seconds: float | None = None


def make_loads(concurrency: str, rate: str, arrival: Arrival, burstiness: float) -> list[Load]:
    """Loads of `1,8,64` requests at once and of `2,4` requests per second; UsageError for what is no number."""
    found = [Load("closed", int(number)) for number in numbers(concurrency, "--concurrency")]
    found += [Load("open", 0, number, arrival, burstiness) for number in numbers(rate, "--rate")]
    return found or [Load("closed", 8)]


def numbers(text: str, flag: str) -> list[float]:
    """Positive numbers between commas."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0.0]
    if any(not 0 < one < 1e6 or (flag == "--concurrency" and one % 1) for one in found):
        raise UsageError(f"{flag} {text!r} is no list of numbers.", f"for example {flag} 1,8,64")
    return found


def measure_loads(measurement: Measurement, loads: Sequence[Load], amount: Amount) -> None:
    """Run all loads on all targets. A load that nothing answers ends the list."""
    for load in loads:
        measurement.on_step(load.words)
        ran = measurement.run(load.words, measurement.targets, load, amount.requests, amount.seconds)
        if any(effort.gave_up for effort in ran.efforts):
            raise EndpointError(
                f"{measurement.first_url} stopped answering under {load.words}.",
                "its log says more; figures so far stand above",
            )


def to_json(measurement: Measurement, planned: int) -> dict[str, Any]:
    """The whole run as a document."""
    stages = measurement.results()
    return {
        "bench": "throughput",
        "complete": len(stages) == planned and all(stage["complete"] for stage in stages),
        "definitions": DEFINITIONS,
        "environment": describe_environment(),
        **measurement.describe(),
        "stages": stages,
    }


def print_report(document: dict[str, Any]) -> None:
    """The table, on standard output."""
    console = result_console()
    for line in heading(document):
        console.print(Text(line, style="dim"))
    names = [*COUNTS, *(row[0] for row in ROWS), *(["met all limits"] if has_limits(document) else [])]
    columns = []
    for stage in document["stages"]:
        columns.append((stage["label"], cells(stage["figures"], stage["believed"])))
        columns += [
            (f"{stage['label']}\n{model}", cells(each, stage["believed"])) for model, each in stage["by_model"].items()
        ]
    for table in side_by_side(names, columns, console.width):
        console.print()
        console.print(table)
    for line in remarks(document):
        console.print(Text(line, style="yellow"))


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
    what = f"{work['rows']} rows of yours" if work["rows"] else f"{span(work['input_tokens'])} tokens in"
    ends = f"{span(work['output_tokens'])} out{' at most' if work['natural'] else ''}"
    shared = f", the first {work['shared_prefix']} shared" if work["shared_prefix"] else ""
    found.append(f"{what}, {ends}{shared}, {work['route']}, seed {work['seed']}")
    calibration = client["calibration"]
    if calibration:
        found.append(
            f"client: takes {calibration['chunks_per_second']:,.0f} chunks/s of a server that does nothing "
            f"(with {calibration['processes']} of --processes), "
            f"and sees its first token after {calibration['ttft_ms']:.1f} ms"
        )
    return [*found, "times in ms, from the moment a request was due"]


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
    for kind, count in figures["errors"].items():
        said = figures["errors_said"].get(kind)
        found.append(f"{count} × {ERRORS.get(kind, kind)}" + (f": {said}" if said else ""))
    textless = figures["first_chunk_without_text"]
    if textless > 0.01 * max(figures["answered"], 1):
        found.append(f"in {textless} replies the first chunk held no text: TTFT is that of the first text")
    return found

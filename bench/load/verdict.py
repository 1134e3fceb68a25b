"""Is the client to be believed? Figures of a client that was itself the bottleneck are withheld, with the reason.

Before a run the client is measured against a server that does nothing; after each stage its lateness, its CPU and what
the server counted are held against bounds.

    >>> judge(figures, client, calibration, cached=0.0)
    ['a client process used 97% of a core (bound 90%): more --processes']
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loraport.bench.load.figures import merge_lags, read_records, summarize
from loraport.bench.load.fleet import Fleet, NullServer
from loraport.bench.load.prompts import Source
from loraport.bench.load.stage import Effort, Load, Stage, Target

# Lateness may be the larger of 5 ms and a tenth of the median TTFT: p99 of what was sent, p95 of the event loop's own,
# which is sampled all the time, not only where it matters.
LATE_MS, LATE_SHARE = 5.0, 0.1
CPU = 0.9  # of a core, for each process
CEILING = 0.6  # of the chunks/s that the client took from the null server
ERRORS = 0.01
CACHED = 0.01
CALIBRATION_S = 2.0
CHUNKS, CHUNK_GAP_S = 16, 0.005


@dataclass(frozen=True)
class Calibration:
    """The client against the null server. `ttft_ms`: the median that it sees where there is nothing to wait for."""

    requests_per_second: float
    chunks_per_second: float
    ttft_ms: float
    processes: int
    concurrency: int


def calibrate(processes: int, concurrency: int, input_tokens: int, seconds: float = CALIBRATION_S) -> Calibration:
    """Measure the client: `seconds` at full speed, then a moment with one request at a time for the shortest TTFT."""
    pool = [str(number) for number in range(1000, 2000)]
    source = Source("ids", "/completions", pool, (input_tokens, input_tokens), (CHUNKS, CHUNKS), seed=0)
    many, one = Load("closed", max(concurrency, 256 * processes)), Load("closed", 1)
    with NullServer(gap=CHUNK_GAP_S) as server, TemporaryDirectory(prefix="loraport-bench-") as folder:
        targets = [Target(server.base_url, "null")]
        with Fleet(source, Path(folder), processes) as fleet:
            fleet.run(Stage(0, "warm-up", targets, many, seconds=0.3))
            fleet.run(Stage(1, "many", targets, many, seconds=seconds))
            fleet.run(Stage(2, "one", targets, one, requests=20))
        found = read_records(Path(folder))
    full, single = summarize(found[1], many, {}), summarize(found[2], one, {})
    rate = full["requests_per_second"] or 0.0
    return Calibration(rate, round(rate * CHUNKS, 1), single["ttft_ms"]["p50"], processes, many.concurrency)


def describe_client(efforts: Sequence[Effort]) -> dict[str, Any]:
    """CPU of each process as a share of a core, and the lateness of their event loops."""
    shares = [effort.cpu_s / max(effort.ended - effort.started, 1e-9) for effort in efforts]
    return {
        "cpu_shares": [round(share, 3) for share in shares],
        "loop_late_ms": merge_lags(effort.lags for effort in efforts),
        "gave_up": any(effort.gave_up for effort in efforts),
    }


def judge(
    figures: dict[str, Any], client: dict[str, Any], calibration: Calibration | None, cached: float | None
) -> list[str]:
    """Reasons not to believe a stage's figures; none is a clean bill.

    `cached`: share of the prompts' tokens that came from the prefix cache; None where it is unknown or wished.
    """
    found: list[str] = []
    if not figures["answered"]:
        return ["no request was answered"]
    found += judge_client(figures, client, calibration)
    failed = sum(count for kind, count in figures["errors"].items() if kind != "stopped")
    if failed > ERRORS * figures["requests"]:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in figures["errors"].items())
        found.append(f"{failed} of {figures['requests']} requests failed (bound {ERRORS:.0%}): {kinds}")
    if cached is not None and cached > CACHED:
        found.append(f"{cached:.0%} of the prompts' tokens came from the prefix cache (bound {CACHED:.0%})")
    return found


def judge_client(figures: dict[str, Any], client: dict[str, Any], calibration: Calibration | None) -> list[str]:
    """The part of it that is about the client."""
    found = []
    bound = max(LATE_MS, LATE_SHARE * figures["ttft_ms"]["p50"]) if figures["ttft_ms"] else LATE_MS
    sent, read = ("sent requests", figures["late_ms"], "p99"), ("read its sockets", client["loop_late_ms"], "p95")
    for what, late, quantile in (sent, read):
        if late and late[quantile] > bound:
            found.append(f"the client {what} late: {quantile} {late[quantile]:.1f} ms (bound {bound:.1f} ms)")
    busiest = max(client["cpu_shares"], default=0.0)
    if busiest > CPU:
        found.append(f"a client process used {busiest:.0%} of a core (bound {CPU:.0%}): more --processes")
    if calibration and figures["gap_ms"] and figures["seconds"]:
        chunks = (figures["gap_ms"]["count"] + figures["answered"]) / figures["seconds"]
        if chunks > CEILING * calibration.chunks_per_second:
            most = f"{CEILING:.0%} of the {calibration.chunks_per_second:,.0f} that it can take"
            found.append(f"the server sent {chunks:,.0f} chunks/s, more than {most}: more --processes")
    return found


def parse_limits(text: str) -> dict[str, float]:
    """Seconds by name, of `ttft=500ms,tpot=30ms,e2e=2s` or of a preset's name."""
    from loraport.clients.errors import UsageError

    if text in PRESETS:
        return dict(PRESETS[text])
    found = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        scale = 0.001 if value.endswith("ms") else 1.0
        try:
            number = scale * float(value.removesuffix("ms").removesuffix("s"))
        except ValueError:
            number = 0.0
        if name not in ("ttft", "tpot", "e2e") or not 0 < number < float("inf"):
            presets = ", ".join(PRESETS)
            raise UsageError(f"--slo {text!r} is no limit.", f"for example ttft=500ms,tpot=30ms,e2e=2s; or {presets}")
        found[name] = number
    return found


# Limits of MLPerf's server scenario; there they are those of the 99th percentile.
PRESETS = {
    "mlperf-llama-3.1-8b": {"ttft": 2.0, "tpot": 0.1},
    "mlperf-llama-3.1-8b-interactive": {"ttft": 0.5, "tpot": 0.03},
    "mlperf-llama-2-70b": {"ttft": 2.0, "tpot": 0.2},
    "mlperf-llama-2-70b-interactive": {"ttft": 0.45, "tpot": 0.04},
}

"""Starts as a table, a waterfall in text, and one JSON document.

>>> print_report(to_json(start, runs, planned=3, dropped={}))
"""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from loraport.bench.environment import describe_environment
from loraport.bench.serving.caches import NOT_DROPPED
from loraport.bench.serving.startup import MILESTONES, Start
from loraport.bench.tables import NOTHING, number, plain_table, result_console
from loraport.clients.redact import hide_secrets

BAR = 50  # characters of the longest waterfall


def to_json(start: Start, runs: Sequence[dict[str, Any]], planned: int, cold: dict[str, Any]) -> dict[str, Any]:
    """The whole measurement; medians by kind of start."""
    return {
        "bench": "startup",
        "complete": len(runs) == planned,
        "environment": describe_environment(),
        "command": hide_secrets(start.command),
        "base_url": start.base_url,
        "cold": cold | {"not_dropped": NOT_DROPPED},
        "summary": {kind: summarize([run for run in runs if run["kind"] == kind]) for kind in ("cold", "warm")},
        "runs": list(runs),
    }


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the milestones of those that came to their end."""
    good = [run for run in runs if not run["error"]]
    names = [name for name in MILESTONES if any(name in run["milestones"] for run in good)]
    return {
        "runs": len(runs),
        "failed": len(runs) - len(good),
        "median_s": {
            name: round(statistics.median(run["milestones"][name] for run in good if name in run["milestones"]), 3)
            for name in names
        },
    }


def print_report(document: dict[str, Any]) -> None:
    """The table of all runs and the waterfall of the last good one, on standard output."""
    console = result_console()
    console.print(Text(" ".join(document["command"]), style="dim"), soft_wrap=True)
    table = plain_table("seconds from spawn", [*MILESTONES, "stopped in", "GiB"])
    for run in document["runs"]:
        times = [number(run["milestones"].get(name), "{:.1f}", NOTHING) for name in MILESTONES]
        held = (run.get("memory") or {}).get("processes")
        size = number(held and held / 2**30, "{:.1f}")
        table.add_row(run["kind"], *times, number(run["stop_s"], "{:.1f}"), size)
    console.print(table)
    for run in document["runs"]:
        if run["error"]:
            console.print(Text(f"  {run['kind']}: {run['error']}", style="yellow"))
            for line in run["log"]:
                console.print(Text(f"  | {line}", style="dim"), soft_wrap=True)
        if run["left_behind"]:
            console.print(Text(f"  {run['kind']}: {run['left_behind']} processes outlived it", style="yellow"))
    for kind in ("cold", "warm"):
        good = [run for run in document["runs"] if run["kind"] == kind and not run["error"]]
        if good:
            console.print(Text(f"\n{kind}", style="bold"))
            for line in waterfall(good[-1]):
                console.print(Text(line))
    dropped = document["cold"].get("bytes")
    if dropped is not None:
        words = f"cold: {dropped / 2**30:.1f} GiB of files dropped from memory, compile caches empty; {NOT_DROPPED}"
        console.print(Text(f"\n{words}", style="dim"), soft_wrap=True)
    if not document["complete"]:
        console.print(Text("not complete: it was interrupted", style="yellow"))


def waterfall(run: dict[str, Any]) -> list[str]:
    """A bar for each milestone from the one before, then what the engine told of itself."""
    longest = max(run["milestones"].values())
    at, lines = 0.0, []
    for name, until in run["milestones"].items():
        begin, end = round(BAR * at / longest), round(BAR * until / longest)
        bar = " " * begin + "█" * max(1, end - begin)
        lines.append(f"  {name:<20} {until - at:7.2f} s  {bar}")
        at = until
    for title, parts in (("the engine's phases", run["phases"]), ("told in its log", run["told"])):
        if parts:
            lines.append(f"  {title}: " + ", ".join(f"{name} {spent:.1f}" for name, spent in parts.items()) + " s")
    return lines

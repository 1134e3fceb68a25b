"""Predicted against reported memory as a table and one JSON document, and the verdict.

>>> print_report(to_json(rows, planned=13))
"""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from loraport.bench.environment import describe_environment
from loraport.bench.tables import NOTHING, number, plain_table, result_console
from loraport.clients.errors import Shortfall

LEAST, MOST = 0.95, 1.0  # a plan must never promise more than there is, and should not waste a twentieth
GIB = 1 << 30
# Columns: (title, parts of the plan, part that the engine tells). On a GPU; a CPU's engine tells none of them.
COMPARED = (
    ("model", ("weights", "lora_slots"), "model"),
    ("activations", ("activations",), "peak_activations"),
    ("rest", ("graphs_and_libraries",), "rest"),
    ("KV cache", ("kv_cache",), "kv_cache"),
    ("free/captured", ("left_free",), "graphs"),
)


def to_json(rows: Sequence[dict[str, Any]], planned: int) -> dict[str, Any]:
    """The whole measurement; ratios of those that were measured."""
    ratios = [row["ratio"] for row in rows if row.get("ratio") is not None]
    return {
        "bench": "plan",
        "complete": len(rows) == planned,
        "environment": describe_environment(),
        "summary": {
            "cases": len(rows),
            "measured": len(ratios),
            "ratio_min": min(ratios, default=None),
            "ratio_max": max(ratios, default=None),
            "limits": [LEAST, MOST],
            "outside": [row["case"] for row in rows if is_outside(row)],
        },
        "cases": list(rows),
    }


def is_outside(row: dict[str, Any]) -> bool:
    """Whether a case was measured, and its ratio is beyond the limits."""
    return row.get("ratio") is not None and not LEAST <= row["ratio"] <= MOST


def print_report(document: dict[str, Any]) -> None:
    """The table, then what failed and why, on standard output."""
    console = result_console(130)
    titles = ["predicted", "reported", "ratio", *(title for title, _, _ in COMPARED)]
    table = plain_table("KV cache in tokens; parts in GiB, predicted/reported", titles)
    for row in document["cases"]:
        ratio = Text(number(row.get("ratio"), "{:.4f}", NOTHING), style="red" if is_outside(row) else "")
        tokens = row.get("plan", {}).get("kv_cache_tokens"), row.get("reported", {}).get("kv_cache_tokens")
        table.add_row(Text(row["case"]), *(number(each, "{:,}", NOTHING) for each in tokens), ratio, *parts(row))
    console.print(table)
    for row in document["cases"]:
        if row["error"]:
            console.print(Text(f"  {row['case']}: {row['error']}", style="yellow"), soft_wrap=True)
            for line in row.get("engine", {}).get("log", ()):
                console.print(Text(f"  | {line}", style="dim"), soft_wrap=True)
    if not document["complete"]:
        console.print(Text("not complete: it was interrupted", style="yellow"))


def parts(row: dict[str, Any]) -> list[str]:
    """Predicted and reported GiB of each of COMPARED; the last are what is to stay free, and graphs captured later."""
    memory, told = row.get("plan", {}).get("memory", {}), row.get("reported", {}).get("gib", {})
    cells = []
    for _, ours, theirs in COMPARED:
        predicted = sum(memory[name] for name in ours) / GIB if set(ours) <= set(memory) else None
        cells.append(f"{number(predicted, '{:.2f}', NOTHING)}/{number(told.get(theirs), '{:.2f}', NOTHING)}")
    return cells


def check_verdict(document: dict[str, Any]) -> None:
    """Shortfall when a case was beyond the limits, or could not be measured."""
    outside = document["summary"]["outside"]
    failed = [row["case"] for row in document["cases"] if row["error"] or row.get("ratio") is None]
    if outside:
        raise Shortfall(
            f"{len(outside)} of {len(document['cases'])} predictions are not {LEAST} to {MOST} of what was reported.",
            f"see {', '.join(outside)}",
        )
    if failed:
        raise Shortfall(
            f"{len(failed)} of {len(document['cases'])} cases could not be measured.", f"see {', '.join(failed)}"
        )

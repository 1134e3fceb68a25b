"""A comparison as a table for people and as one JSON document.

Figures of a contender are the median of its repeats; peak memory is the largest of them.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from loraport.bench.tables import number, plain_table, result_console, rounded
from loraport.bench.training.cases import CASES, SHAPES, limit_tokens_per_second, parameters
from loraport.bench.training.runner import Comparison

REFERENCE = "stock"
DEFINITIONS = {
    "tokens_per_second": "tokens of rows, without padding, over the time of the measured steps; median of the repeats",
    "peak": "the largest of the repeats, in bytes: allocated by torch's tensors, reserved by torch from the GPU",
    "planned_reserved": "what `loraport plan train` foretells of the latter",
    "times_stock": "tokens/s over those of transformers' Trainer with PEFT in the same case",
    "limit": "4 FLOP a parameter and token, at the measured speed of a matrix product",
}


@dataclass(frozen=True)
class Figures:
    """A contender in one case: medians over `repeats` runs, or why there is none. Memory in bytes, None on a CPU."""

    contender: str
    repeats: int
    tokens_per_second: float | None
    slowest: float | None
    fastest: float | None
    peak_allocated: int | None
    peak_reserved: int | None
    planned_reserved: int | None
    reason: str

    @classmethod
    def of(cls, contender: str, results: list[dict[str, Any]]) -> "Figures":
        """Those of a contender's repeats; a repeat without figures is left to `reason`."""
        speeds = [result["tokens_per_second"] for result in results if "tokens_per_second" in result]
        reasons = [result.get("skipped") or result.get("error") or "" for result in results]
        return cls(
            contender,
            len(speeds),
            statistics.median(speeds) if speeds else None,
            min(speeds, default=None),
            max(speeds, default=None),
            most(result.get("peak_allocated") for result in results),
            most(result.get("peak_reserved") for result in results),
            most(result.get("planned_reserved") for result in results),
            next((reason for reason in reasons if reason), ""),
        )


def most(values: Iterable[int | None]) -> int | None:
    """The largest of those that are there."""
    return max((value for value in values if value is not None), default=None)


def summarize(run: Comparison) -> dict[tuple[str, str], list[Figures]]:
    """Figures by (case, rows), contenders in the order asked for; what was not started is left out."""
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for result in run.results:
        found.setdefault((result["case"], result["rows"]), {}).setdefault(result["contender"], []).append(result)
    return {key: [Figures.of(name, each) for name, each in group.items()] for key, group in found.items()}


def ratio(figures: Figures, group: list[Figures]) -> float | None:
    """Tokens/s over those of the reference in the same case."""
    base = next((each.tokens_per_second for each in group if each.contender == REFERENCE), None)
    return figures.tokens_per_second / base if base and figures.tokens_per_second else None


def to_json(run: Comparison) -> dict[str, Any]:
    """The whole comparison: environment, settings, summary, and every run as it was measured."""
    shape, limit = SHAPES[run.plan.shape], limit_of(run)
    return {
        "bench": "train",
        "complete": run.is_complete,
        "definitions": DEFINITIONS,
        "environment": run.environment,
        "shape": {"name": run.plan.shape, "parameters": parameters(shape), **shape},
        "limit_tokens_per_second": limit and round(limit, 1),
        "warmup": run.plan.warmup,
        "steps": run.plan.steps,
        "gpus": run.plan.gpus,
        "gpu_memory": run.plan.gpu_memory,
        "summary": [
            {"case": case, "rows": rows, **vars(figures)}
            | {"times_stock": rounded(ratio(figures, group)), "share_of_limit": rounded(share(figures, limit))}
            for (case, rows), group in summarize(run).items()
            for figures in group
        ],
        "runs": run.results,
    }


def limit_of(run: Comparison) -> float | None:
    """Tokens/s that all GPUs of the run together cannot exceed; None where there is no GPU."""
    limit = limit_tokens_per_second(SHAPES[run.plan.shape], run.environment.get("matmul_flops"))
    return limit and limit * run.plan.gpus


def share(figures: Figures, limit: float | None) -> float | None:
    """Tokens/s over the limit."""
    return figures.tokens_per_second / limit if limit and figures.tokens_per_second else None


def print_report(run: Comparison) -> None:
    """A table for each case and kind of rows, on standard output."""
    console = result_console()
    limit = limit_of(run)
    console.print(heading(run, limit), style="dim", markup=False)
    for (case, rows), group in summarize(run).items():
        console.print(f"\n{case}, {rows} rows: {CASES[case].words}", style="bold", markup=False)
        console.print(make_table(group, limit))
        for each in group:
            if each.reason:
                console.print(f"  {each.contender}: {each.reason}", style="yellow", markup=False)
    if not run.is_complete:
        console.print("not complete: the time was over or it was interrupted", style="yellow")


def heading(run: Comparison, limit: float | None) -> str:
    """What was measured on what."""
    versions = run.environment.get("versions", {})
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)
    line = (
        f"{run.plan.shape}, {parameters(SHAPES[run.plan.shape]) / 1e9:.2f}B parameters, on {run.environment['device']}"
    )
    if limit:
        flops = run.environment["matmul_flops"] / 1e12
        line += f"\nlimit {limit:,.0f} tokens/s: 4 FLOP a parameter and token at {flops:,.0f} TFLOP/s, as measured"
    return f"{line}\n{named}"


def make_table(group: list[Figures], limit: float | None) -> Table:
    """Contenders as rows. GiB: the peak that torch allocated; reserved: the peak that it held; planned: the latter as
    `loraport plan train` foretells it.
    """
    spread = any(each.repeats > 1 for each in group)
    names = ("tokens/s", *(["from–to"] * spread), "× stock", "of limit", "GiB", "reserved", "planned")
    table = plain_table("", names)
    for each in group:
        ends = f"{each.slowest:,.0f}–{each.fastest:,.0f}" if each.slowest and each.fastest else ""
        table.add_row(
            each.contender,
            "–" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
            *([ends] * spread),
            number(ratio(each, group), "{:.2f}"),
            number(share(each, limit), "{:.0%}"),
            number(gibibytes(each.peak_allocated), "{:.1f}"),
            number(gibibytes(each.peak_reserved), "{:.1f}"),
            number(gibibytes(each.planned_reserved), "{:.1f}"),
        )
    return table


def gibibytes(size: int | None) -> float | None:
    """Bytes as GiB."""
    return None if size is None else size / 2**30

"""`loraport bench train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loraport.bench.tables import known
from loraport.bench.training.cases import CASES, SHAPES, Rows, default_cases
from loraport.bench.training.runner import MODULES, Comparison, Contender, Plan
from loraport.clients.home import write_json
from loraport.clients.terminal import print_json, say

KINDS_OF_ROWS: dict[str, list[Rows]] = {"full": ["full"], "natural": ["natural"], "both": ["full", "natural"]}
OURS_HELP = (
    "ours, stock, stock-liger or trl; once for each. Default: all. Ours may have settings: ours:checkpointing=half."
)


def bench_train(
    shape: Annotated[str, typer.Option(help="The model, with random weights: see above.")] = "mistral-7b",
    case: Annotated[list[str] | None, typer.Option(help="A case; once for each. Default: all for this device.")] = None,
    rows: Annotated[str, typer.Option(help="Lengths of the rows: full, natural or both.")] = "both",
    contender: Annotated[list[str] | None, typer.Option(help=OURS_HELP)] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the median counts.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps measured in a run.")] = 8,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before those.")] = 3,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs for ours, and as many times the rows a step.")] = 1,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GiB that a run may take, as if the card were smaller.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="No run starts after this time.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON document here, anew after every run.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Measure training speed and memory, ours against its peers.

    Every run is a process of its own on random weights of a real shape, so nothing is downloaded; contenders take
    turns. Tokens are those of rows, without padding; steps of the warm-up do not count. A run that fails is a line of
    the table.

    Shapes: llama-3.2-1b, qwen3-1.7b, llama-3.2-3b, qwen3-4b, mistral-7b, llama-3.1-8b, qwen3-8b, qwen3-14b,
    mistral-small-24b, qwen3-32b, llama-65b, tiny. Cases: nf4-r8-1024-full, nf4-r8-1024-off, nf4-r16-4096-full,
    nf4-r16-4096-off, bf16-r16-4096-full, bf16-r16-4096-off (form of the base, rank, longest row, checkpointing); on a
    CPU fp32-r8-64-full, fp32-r8-64-off.
    """
    from loraport.bench.training.report import print_report, to_json

    plan = Plan(
        shape=known("shape", shape, SHAPES),
        cases=[known("case", name, CASES) for name in case or []],
        rows=KINDS_OF_ROWS[known("kind of rows", rows, KINDS_OF_ROWS)],
        contenders=[Contender.parse(text) for text in contender or MODULES],
        repeats=repeats,
        warmup=warmup,
        steps=steps,
        gpus=gpus,
        gpu_memory=gpu_memory,
        seconds=seconds,
    )
    run = Comparison(plan)

    def tell(result: dict[str, Any]) -> None:
        say(line_of(result, run), "dim")
        if out:
            write_json(out, to_json(run))

    run.on_result = tell
    interrupted = measure(run)
    if json:
        print_json(to_json(run))
    elif run.results:
        print_report(run)
    if interrupted:
        raise interrupted


def measure(run: Comparison) -> KeyboardInterrupt | SystemExit | None:
    """Look around and run everything; what was measured stays when it is interrupted."""
    try:
        run.look_around()
        run.choose_cases(default_cases(run.on_gpu))
        say(f"{len(run.plan.runs())} runs on {run.environment['device']}", "dim")
        run.measure_all()
    except (KeyboardInterrupt, SystemExit) as problem:
        return problem
    return None


def line_of(result: dict[str, Any], run: Comparison) -> str:
    """A run in a line: `3/48 nf4-r8-1024-full natural stock: 7,137 tokens/s (31 s)`."""
    said = result.get("skipped") or result.get("error") or f"{result['tokens_per_second']:,.0f} tokens/s"
    names = f"{result['case']} {result['rows']} {result['contender']}"
    log = "".join(f"\n  | {line}" for line in result.get("log", [])) if "error" in result else ""
    took = f" ({result['seconds']:.0f} s)" if "seconds" in result else ""
    return f"{len(run.results)}/{len(run.plan.runs())} {names}: {said}{took}{log if said != 'out of memory' else ''}"

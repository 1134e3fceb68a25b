"""`loraport bench plan`: options, progress, and what happens at Ctrl-C."""

import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraport.clients.errors import LoraportError, UsageError
from loraport.clients.terminal import print_json, say

if TYPE_CHECKING:
    from loraport.bench.serving.plan_cases import Case
    from loraport.bench.serving.plan_measure import Way


def bench_plan(
    engine_args: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS...]", help="More flags for the engine, behind `--`.")
    ] = None,
    case: Annotated[list[str] | None, typer.Option(help="SHAPE[,key=value...], see above; once for each.")] = None,
    set_name: Annotated[str | None, typer.Option("--set", help="Cases that are ready: h200 or cpu.")] = None,
    part: Annotated[str | None, typer.Option(help="Only a part of the cases: 2/4 is the second of four.")] = None,
    command: Annotated[
        str | None, typer.Option(help="What starts the engine. Default: vLLM's server, in this Python.")
    ] = None,
    until_report: Annotated[
        bool, typer.Option("--until-report", help="End it once it has said its KV cache, before it is healthy.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for a start.")] = 900,
    keep: Annotated[Path | None, typer.Option(help="Keep bases and logs in this new folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON document here, anew after every case.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Hold the plan of serving against the memory that vLLM reports.

    Each case is a base of a real shape without weights: `loraport plan serve` predicts its KV cache, then vLLM starts
    with the flags of the plan and weights made up, says what it found, and is ended. A ratio above 1 is a promise that
    would not be kept. Exit code 4 when a ratio is above 1 or below 0.95, or a case could not be measured.

    A case is a shape (llama-3.2-1b, qwen3-1.7b, llama-3.2-3b, qwen3-4b, mistral-7b, llama-3.1-8b, qwen3-8b, qwen3-14b,
    mistral-small-24b, qwen3-32b, llama-65b, tiny) and what is asked for: rank, loras, quantization, kv, share, context,
    requests, dtype, gpus. For example: --case qwen3-8b,rank=16,loras=8,quantization=fp8,share=0.5,context=8192
    """
    from loraport.bench.serving.made import require_new
    from loraport.bench.serving.plan_cases import chosen_cases
    from loraport.bench.serving.plan_measure import DEFAULT_COMMAND, Way
    from loraport.bench.tables import check_out

    check_out(out)
    cases = chosen_cases(case or [], set_name, part)
    words = tuple(shlex.split(command)) if command is not None else DEFAULT_COMMAND
    if not words:
        raise UsageError("--command is empty.", 'such as --command "vllm serve"')
    if keep:
        require_new(keep, "--keep")
    with TemporaryDirectory(prefix="loraport-bench-") as name:
        way = Way(words, tuple(engine_args or ()), timeout, until_report)
        measure(cases, keep or Path(name), way, out, json)


def measure(cases: "list[Case]", folder: Path, way: "Way", out: Path | None, json: bool) -> None:
    """All cases, then the report and the verdict; Ctrl-C, or a full disk, reports those that have run."""
    from loraport.bench.serving.plan_measure import measure_case
    from loraport.bench.serving.plan_report import check_verdict, print_report, to_json
    from loraport.clients.home import write_json

    rows: list[dict[str, Any]] = []
    interrupted: BaseException | None = None
    for number, case in enumerate(cases, 1):
        say(f"case {number} of {len(cases)}: {case.name}", "dim")
        try:
            rows.append(measure_case(case, folder / f"case-{number}", way, tell))
        except (LoraportError, KeyboardInterrupt, SystemExit) as problem:
            interrupted = problem
            break
        tell_result(rows[-1])
        if out:
            write_json(out, to_json(rows, len(cases)))
    document = to_json(rows, len(cases))
    if json:
        print_json(document)
    elif rows:
        print_report(document)
    if interrupted:
        raise interrupted
    check_verdict(document)


def tell(name: str, at: float) -> None:
    """What has come, as it comes."""
    say(f"  {at:7.2f} s  {name}", "dim")


def tell_result(row: dict[str, Any]) -> None:
    """The case in a line."""
    if row.get("ratio") is not None:
        planned, found = row["plan"]["kv_cache_tokens"], row["reported"]["kv_cache_tokens"]
        say(f"  {planned:,} tokens predicted, {found:,} reported: {row['ratio']:.4f}")
    if row["error"]:
        say(f"  {row['error']}", "yellow")

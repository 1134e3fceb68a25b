"""`loraport bench all`, `report` and `compare`: many benches as one, their page, and two runs against each other."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loraport.clients.errors import UsageError
from loraport.clients.terminal import print_json, say

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def bench_report(
    file: Annotated[list[Path], typer.Argument(help="Documents that benches wrote with --out, or reports of those.")],
    out: Annotated[Path, typer.Option(help="The page; JSON and CSV are written beside it.")] = Path("report.html"),
    json: Json = False,
) -> None:
    """Make one self-contained HTML page of the documents of benches, with JSON and CSV.

    Charts, tables, what was measured on what, and whether the client is to be believed. No scripts, nothing from the
    network.
    """
    from loraport.bench.serving.documents import read_parts
    from loraport.bench.serving.report_html import write_report
    from loraport.bench.tables import check_out

    check_out(out)
    if out.suffix not in (".html", ".htm"):
        raise UsageError(f"{out} is no name for a page.", "--out report.html; JSON and CSV are written beside it")
    parts = read_parts(file)
    written = write_report(out, parts, keep=file)
    if json:
        print_json({"written": [str(path) for path in written], "parts": [part.name for part in parts]})
    else:
        say(f"{len(parts)} parts in {', '.join(map(str, written))}", "bold green")


def bench_compare(
    a: Annotated[Path, typer.Argument(help="The run before.")],
    b: Annotated[Path, typer.Argument(help="The run after.")],
    max_regression: Annotated[
        str, typer.Option(help="Exit with 4 when a figure got worse by more than this: 5%.")
    ] = "",
    any_workload: Annotated[
        bool, typer.Option("--any-workload", help="Show differences of different loads too; they decide nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON document here.")] = None,
    json: Json = False,
) -> None:
    """Show how two runs of the same bench differ; fail where the second is worse.

    Two documents of one bench, or two reports. Changes have the 95% interval of a bootstrap where both runs have at
    least three slices, starts or repeats; a change within it is no regression. Medians and rates decide, of the 99th
    percentiles those of at least a thousand requests.
    """
    from loraport.bench.serving.compare_runs import check_regression, compare_files, parse_limit, print_comparison
    from loraport.bench.tables import check_out
    from loraport.clients.home import write_json

    check_out(out)
    limit = parse_limit(max_regression)
    if limit is not None and any_workload:
        raise UsageError(
            "--max-regression decides nothing about different loads.", "leave --any-workload or --max-regression away"
        )
    document = compare_files(a, b, limit, any_workload)
    print_json(document) if json else print_comparison(document)
    if out:
        write_json(out, document)
    check_regression(document)


def bench_all(
    out: Annotated[Path, typer.Option(help="A new folder for the report and the document of each part.")],
    command: Annotated[
        list[str] | None, typer.Argument(help="A command that serves, behind `--`: its start is measured too.")
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="http://…/v1. Default: the endpoint that serves here.")] = None,
    direct_url: Annotated[
        str | None, typer.Option(help="The engine behind a gateway. Default: that of the endpoint that serves here.")
    ] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests at once, as a list. Default: 1,8,32.")] = None,
    input_tokens: Annotated[str | None, typer.Option("--input", help="Tokens of a prompt. Default: 512.")] = None,
    output_tokens: Annotated[str | None, typer.Option("--output", help="Tokens of a reply. Default: 128.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A part: startup, throughput, lora-tax, gateway, adapters, kv; once for each. Default: all."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Time for all of it: 90s, 10m, 1h. Default: 10m; 20m with a command.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --out with the parts that are not done.")] = False,
    json: Json = False,
) -> None:
    """Run a selection of the benches within a time budget, and make a report of them.

    Throughput at a few concurrencies, the LoRA tax and adapters under load where there are adapters, the gateway where
    the way past it is known, the KV cache. With a serve command behind `--` its start-up first, then the rest on it:
    loraport bench all --out bench -- vllm serve MODEL --port 8000. Each part writes its document at once; Ctrl-C keeps
    what has run.
    """
    from loraport.bench.serving import everything
    from loraport.bench.serving.cli import find_url
    from loraport.bench.serving.throughput import numbers
    from loraport.bench.serving.tools_cli import port_of
    from loraport.bench.tables import known

    seconds = parse_budget(budget or ("20m" if command else "10m"))
    names = [bench.name for bench in everything.PARTS]
    given: dict[str, Any] = {
        "base_url": base_url,
        "direct_url": direct_url,
        "concurrency": tuple(int(each) for each in numbers(concurrency, "--concurrency")) if concurrency else None,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "command": tuple(command) if command else None,
        "only": tuple(known("part", name, names) for name in only) if only else None,
    }
    if resume:
        going = everything.go_on(out, given)
    else:
        chosen = {name: value for name, value in given.items() if value is not None}
        url = base_url or f"http://127.0.0.1:{port_of(command)}/v1" if command else find_url(base_url)
        settings = everything.Settings(**(chosen | {"base_url": url}))
        everything.check_server(settings)
        going = everything.begin(settings, out)
    going.on_part = lambda words: say(words, "bold")
    try:
        everything.run_all(going.settings, out, seconds, going=going)
    finally:
        tell(going, json)
    problem = everything.verdict(going)
    if problem:
        raise problem


def tell(going: Any, json: bool) -> None:
    """Each part and how it ended, and where the report is."""
    from loraport.bench.serving.documents import REPORT

    if json:
        print_json(
            {"bench": REPORT, "folder": str(going.folder), "parts": [each.to_json() for each in going.parts.values()]}
        )
        return
    ends = {"done": "", "cut": " (not complete)", "failed": " failed", "skipped": " left out"}
    for part in going.parts.values():
        say(f"  {part.name}{ends[part.status]}{': ' + part.reason if part.reason else ''}")
    if going.parts:
        say(f"report: {going.folder / 'report.html'}", "bold green")


def parse_budget(text: str) -> float:
    """Seconds of `90s`, `10m`, `1h`; a number alone is of seconds. UsageError for anything else."""
    units = {"s": 1, "m": 60, "h": 3600}
    unit = units.get(text[-1:], 1)
    try:
        value = float(text.rstrip("smh") if text[-1:] in units else text) * unit
    except ValueError:
        value = 0.0
    if not 1 <= value <= 7 * 86400:
        raise UsageError(f"--budget {text!r} is no time.", "for example 90s, 10m, 1h")
    return value

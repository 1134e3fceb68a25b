"""Load clients against each other: ours, `vllm bench serve` and GuideLLM on the same server, interleaved in one run.

Each round runs all of them once, one after the other, in another order, with prompts that nobody has sent before. Told
are each client's means over rounds, by the same definitions (see load_clients) and as it tells them itself, and ratios
ours / theirs within rounds: geometric mean, 95% interval of a bootstrap over rounds. `--again` runs ours twice a round:
that ratio is what the machine alone makes of it. `--null` measures the clients themselves (see ceilings).

    python -m loraport.bench.contenders.clients --base-url http://127.0.0.1:8000/v1 --model base \\
      --tokenizer examples/reader-9m --vllm vllm --guidellm guidellm-venv/bin/guidellm --rounds 10 --out clients.json
    python -m loraport.bench.contenders.clients --base-url http://127.0.0.1:8000/v1 --rate 8 --vllm vllm
    python -m loraport.bench.contenders.clients --null --tokenizer examples/reader-9m --vllm vllm --out null.json

A client whose program is not named is left out. GuideLLM wants an environment of its own: `pip install guidellm`. On a
machine without a GPU server and clients should have cores of their own (`taskset -c 0` before the server, `taskset -c
1` before this), since a client that needs more CPU slows the server. OPENAI_API_KEY is the key; GuideLLM gets none.
"""

import argparse
import secrets
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from loraport.bench.contenders.ceilings import measure_ceilings, print_ceilings
from loraport.bench.contenders.load_clients import (
    Client,
    GuideLLM,
    Ours,
    Outcome,
    VllmBench,
    Workload,
)
from loraport.bench.contenders.programs import find_executable
from loraport.bench.environment import describe_environment
from loraport.bench.load.figures import paired_ratio
from loraport.bench.load.server import Server
from loraport.bench.serving.measurement import describe_server
from loraport.bench.serving.throughput import span
from loraport.bench.tables import NOTHING, check_out, number, result_console, side_by_side
from loraport.clients.errors import LoraportError, UsageError
from loraport.clients.home import write_json
from loraport.clients.terminal import exit_with, say

OURS, AGAIN = "ours", "ours again"
FIGURES = (  # name, how to find it, form
    ("output tokens/s", ("output_tokens_per_second",), "{:,.1f}"),
    ("TTFT p50", ("ttft_ms", "p50"), "{:,.2f}"),
    ("TTFT p99", ("ttft_ms", "p99"), "{:,.2f}"),
    ("TPOT p50", ("tpot_ms", "p50"), "{:,.3f}"),
    ("TPOT p99", ("tpot_ms", "p99"), "{:,.3f}"),
    ("E2E p50", ("e2e_ms", "p50"), "{:,.1f}"),
    ("requests in flight", ("in_flight",), "{:,.3f}"),
)
OWN = {  # the same figures as each tool tells them, where it does
    Ours: (
        ("output_tokens_per_second",),
        ("ttft_ms", "p50"),
        ("ttft_ms", "p99"),
        ("tpot_ms", "p50"),
        ("tpot_ms", "p99"),
    ),
    VllmBench: (("output_throughput",), ("median_ttft_ms",), ("p99_ttft_ms",), ("median_tpot_ms",), ("p99_tpot_ms",)),
    GuideLLM: (
        ("output_tokens_per_second",),
        ("time_to_first_token_ms", "p50"),
        ("time_to_first_token_ms", "p99"),
        ("inter_token_latency_ms", "p50"),
        ("inter_token_latency_ms", "p99"),
    ),
}
DEFINITIONS = {
    "figures": "of the records of single requests, by the same definitions for all; `own`: as the tool tells them",
    "output_tokens_per_second": "tokens by `usage`, from the first start of a request to the last token",
    "ttft": "from the start of a request, as the client has it, to the first token as it sees it",
    "tpot": "(last token − first token) / (tokens − 1); GuideLLM calls it ITL",
    "in_flight": "time that requests took together, over the time of the run: what the client kept of the concurrency",
    "ratio": "ours / theirs in the same round: geometric mean, 95% of a bootstrap over rounds",
}


def compare(load: Workload, clients: Sequence[Client], rounds: int, seed: int, save: Callable[[Any], None]) -> Any:
    """All rounds; the document is saved after each. Ours runs once before, uncounted, to warm up the server."""
    document = describe(load, clients, seed)
    outcomes: dict[str, list[Outcome]] = {client.name: [] for client in clients}
    Ours(OURS).measure(load, seed - 1)
    for turn in range(rounds):
        order = [*clients[turn % len(clients) :], *clients[: turn % len(clients)]]
        found = {}
        for at, client in enumerate(order):
            outcome = client.measure(load, seed + turn * len(clients) + at)
            outcomes[client.name].append(outcome)
            found[client.name] = outcome.figures()
            say(f"round {turn + 1} of {rounds}, {client.name}: {line_of(found[client.name])}", "dim")
        document["rounds"].append({"order": [client.name for client in order], "clients": found})
        document |= conclude(document["rounds"], clients, outcomes) | {"complete": turn + 1 == rounds}
        save(document)
    return document


def describe(load: Workload, clients: Sequence[Client], seed: int) -> dict[str, Any]:
    """What is measured on what."""
    with Server(load.base_url) as server:
        found = describe_server(server)
    return head("clients", clients) | {
        "definitions": DEFINITIONS,
        "servers": {load.base_url: found},
        "workload": load.to_json(seed),
        "rounds": [],
    }


def head(bench: str, clients: Sequence[Client]) -> dict[str, Any]:
    """What every document of this program begins with. Programs are named, not where they lie."""
    command = ["python", "-m", "loraport.bench.contenders.clients", *sys.argv[1:]]
    told = {client.name: {"version": client.version(), "processes": client.processes} for client in clients}
    return {
        "bench": bench,
        "complete": False,
        "environment": describe_environment() | {"command": command},
        "clients": told,
    }


def conclude(
    rounds: list[dict[str, Any]], clients: Sequence[Client], outcomes: dict[str, list[Outcome]]
) -> dict[str, Any]:
    """Means over rounds, figures of all rounds' requests together, and ratios of ours to each."""
    by_name = {client.name: [each["clients"][client.name] for each in rounds] for client in clients}
    others = [client for client in clients if client.name != OURS]
    return {
        "means": {client.name: means(by_name[client.name], paths_of()) for client in clients},
        "own_means": {client.name: means(by_name[client.name], own_paths(client)) for client in clients},
        "all_requests": {name: together(each) for name, each in outcomes.items()},
        "ratios": {other.name: ratios(by_name, other, paths_of(), paths_of()) for other in others},
        "own_ratios": {other.name: ratios(by_name, other, own_paths(clients[0]), own_paths(other)) for other in others},
    }


def paths_of() -> list[tuple[str, ...]]:
    """Where the figures of the table lie."""
    return [path for _, path, _ in FIGURES]


def own_paths(client: Client) -> list[tuple[str, ...]]:
    """Where a tool's own lie, in the same order; fewer."""
    return [("own", *path) for path in OWN[type(client)]]


def means(figures: list[dict[str, Any]], paths: list[tuple[str, ...]]) -> dict[str, float | None]:
    """Means over rounds by the names of the table."""
    found = {}
    for (name, _, _), path in zip(FIGURES, paths, strict=False):
        values = [value for each in figures if (value := look_up(each, path)) is not None]
        found[name] = round(statistics.mean(values), 3) if values else None
    return found


def ratios(
    by_name: dict[str, list[dict[str, Any]]],
    other: Client,
    our_paths: list[tuple[str, ...]],
    their_paths: list[tuple[str, ...]],
) -> dict[str, Any]:
    """Ours over theirs, round by round."""
    found = {}
    for (name, _, _), our_path, their_path in zip(FIGURES, our_paths, their_paths, strict=False):
        pairs = zip(by_name[OURS], by_name[other.name], strict=True)
        values = [(look_up(one, our_path), look_up(two, their_path)) for one, two in pairs]
        known = [(one, two) for one, two in values if one and two]
        found[name] = paired_ratio([one for one, _ in known], [two for _, two in known]) if known else None
    return found


def look_up(document: dict[str, Any], path: Sequence[str]) -> float | None:
    """A figure by its path; None where there is none."""
    found: Any = document
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return None if found is None else float(found)


def together(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Latencies of the requests of all rounds as one: what a 99th percentile wants."""
    whole = {name: np.concatenate([getattr(each, name) for each in outcomes]) for name in ("start", "first", "last")}
    counts = {name: np.concatenate([getattr(each, name) for each in outcomes]) for name in ("tokens", "prompt")}
    figures = Outcome(**whole, **counts, failed=0, own={}).figures()
    return {name: figures[name] for name in ("requests", "mean_input_tokens", "ttft_ms", "tpot_ms", "e2e_ms")}


def line_of(figures: dict[str, Any]) -> str:
    """A run in a line."""
    tpot = number((figures["tpot_ms"] or {}).get("p50"), "{:.2f}", NOTHING)
    return (
        f"{figures['output_tokens_per_second']:,.1f} tokens/s, TTFT {figures['ttft_ms']['p50']:.1f} ms, "
        f"TPOT {tpot} ms, {figures['in_flight']:.2f} in flight"
    )


def print_report(document: dict[str, Any]) -> None:
    """Tables, on standard output."""
    console, work = result_console(), document["workload"]
    version = next(iter(document["servers"].values()))["version"]
    server = f"vLLM {version}" if version else "a server of unknown version"
    sizes = f"{span(work['input_tokens'])} tokens in, {span(work['output_tokens'])} out"
    load = f"{work['rate']:g}/s evenly" if work["rate"] else f"{work['concurrency']} at once"
    versions = ", ".join(f"{name} {each['version']}" for name, each in document["clients"].items() if name != AGAIN)
    console.print(Text(f"{server} serves {work['model']}; clients: {versions}", style="dim"))
    console.print(
        Text(
            f"{sizes}, {load}, {len(document['rounds'])} rounds of {work['requests']} requests of each",
            style="dim",
        )
    )
    forms = [form for _, _, form in FIGURES]
    for title, values, compared in (
        ("by the same definitions, of the records of each", "means", "ratios"),
        ("as each tells it", "own_means", "own_ratios"),
    ):
        console.print(Text(f"\n{title}", style="bold"))
        rows = list(document[values][OURS])
        columns = [
            (name, [number(each.get(row), form, NOTHING) for row, form in zip(rows, forms, strict=False)])
            for name, each in document[values].items()
        ]
        columns += [
            (f"ours / {name}", [ratio_words(each.get(row)) for row in rows])
            for name, each in document[compared].items()
        ]
        for table in side_by_side(rows, columns, console.width):
            console.print(table)
    for line in doubts(document):
        console.print(Text(line, style="yellow"))


def ratio_words(ratio: dict[str, Any] | None) -> str:
    """`0.998 (0.991 … 1.004)`."""
    if not ratio:
        return NOTHING
    spread = "" if ratio["low"] is None else f" ({ratio['low']:.3f} … {ratio['high']:.3f})"
    return f"{ratio['ratio']:.3f}{spread}"


def doubts(document: dict[str, Any]) -> list[str]:
    """Failed requests, and runs that our own verdict does not believe."""
    found = []
    for at, each in enumerate(document["rounds"], 1):
        for name, figures in each["clients"].items():
            found += [f"round {at}, {name}: {doubt}" for doubt in figures["doubts"]]
            if figures["failed"]:
                found.append(f"round {at}, {name}: {figures['failed']} requests failed")
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Load clients against each other on the same server.")
    parser.add_argument("--base-url", help="http://…/v1 of the server")
    parser.add_argument("--model", help="a model of it; default: its first")
    parser.add_argument("--tokenizer", default="", help="folder or id, for the others; default: the model's name")
    parser.add_argument("--vllm", default="", help="vLLM's executable, or a Python that has it")
    parser.add_argument("--guidellm", default="", help="GuideLLM's executable, in an environment of its own")
    parser.add_argument("--guidellm-workers", default="1", help="worker processes; with --null a list: 1,2,4")
    parser.add_argument("--again", action="store_true", help="ours twice a round")
    parser.add_argument("--null", action="store_true", help="the ceiling of the clients instead")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s, evenly spaced, instead of --concurrency")
    parser.add_argument("--requests", type=int, default=300, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=0, help="default: 10; with --null 3")
    parser.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=24, help="tokens of a reply")
    parser.add_argument("--seed", type=int, default=0, help="default: another each time")
    parser.add_argument("--out", type=Path, help="write the JSON document here, anew after every round")
    return parser.parse_args(arguments)


def choose(given: argparse.Namespace) -> list[Client]:
    """The clients that the options name; ours first."""
    workers = [int(one) for one in given.guidellm_workers.split(",")]
    found: list[Client] = [Ours(OURS)]
    if given.null:
        found.append(Ours("ours, two processes", processes=2))
    elif given.again:
        found.append(Ours(AGAIN))
    if given.vllm:
        found.append(VllmBench("vllm bench serve", find_executable(given.vllm, "--vllm")))
    if given.guidellm:
        program = find_executable(given.guidellm, "--guidellm")
        words = ["GuideLLM"] if not given.null else [f"GuideLLM, workers at most {count}" for count in workers]
        found += [GuideLLM(name, program, count) for name, count in zip(words, workers, strict=False)]
    return found


def run(given: argparse.Namespace) -> None:
    """Measure and print."""
    check_out(given.out)
    clients = choose(given)

    def save(document: Any) -> None:
        if given.out:
            write_json(given.out, document)

    if given.null:
        document = head("client-ceiling", clients)
        print_ceilings(measure_ceilings(document, clients, given.tokenizer, given.input, given.rounds or 3, save))
        return
    if not given.base_url:
        raise UsageError("there is no server to measure.", "--base-url http://127.0.0.1:8000/v1")
    with Server(given.base_url) as server:
        model = given.model or server.cards()[0].id
    tokenizer = given.tokenizer or model
    sizes = given.concurrency, given.requests, given.input, given.output, given.rate
    load = Workload(given.base_url, model, tokenizer, *sizes)
    print_report(compare(load, clients, given.rounds or 10, given.seed or secrets.randbits(31), save))


def main() -> None:
    """Run; errors in words. What Ctrl-C ends is in --out up to its last whole round."""
    try:
        run(parse())
    except LoraportError as error:
        exit_with(error, debug=False)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

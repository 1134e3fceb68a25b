"""What each load client takes at most: requests/s from a server that does nothing, and how late ours is at a rate.

Clients and null server share the machine's cores, so these are figures of that machine. Besides the whole run the
middle 80% of the answers count, without a client's ramp and drain. A part of `bench/contenders/clients.py`, and no
measure of a model server.

    python -m loraport.bench.contenders.clients --null --tokenizer examples/reader-9m --vllm vllm --out null.json
"""

import json
import secrets
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.text import Text

from loraport.bench.contenders.load_clients import Client, GuideLLM, Ours, Outcome, VllmBench, Workload
from loraport.bench.contenders.programs import run_program
from loraport.bench.load.fleet import NullServer
from loraport.bench.serving.throughput import span
from loraport.bench.tables import plain_table, result_console
from loraport.clients.terminal import say

CHUNKS, CONCURRENCY = 16, 128
RATE, RATE_SECONDS, RATE_PROCESSES = 2000, 10, 2
REQUESTS = {Ours: 16_000, VllmBench: 8_000, GuideLLM: 2_000}  # some seconds of each
MIDDLE = (0.1, 0.9)
DEFINITIONS = {
    "middle": "requests/s from the answer that ends the first tenth to the one that ends the ninth",
    "best": "`middle` of the best round",
    "requests_per_second": "over the time from the first start to the last token",
    "in_flight": "time that requests took together, over the time of the run",
    "late_ms": "from the time when a request was due to the one when it was written to its socket",
    "loop_late_ms": "how late timers of the client's event loops fired",
}


def measure_ceilings(
    document: dict[str, Any],
    clients: Sequence[Client],
    tokenizer: str,
    input_tokens: int,
    rounds: int,
    save: Callable[[Any], None],
) -> dict[str, Any]:
    """The clients in turns, another order each round, then ours in an open loop. The document grows and is saved."""
    work = Workload("", "null", tokenizer, CONCURRENCY, 0, input_tokens, CHUNKS).to_json()
    document |= {"definitions": DEFINITIONS, "workload": work | {"requests": None}, "rounds": []}
    for turn in range(rounds):
        at = turn % len(clients)
        found = {}
        for client in [*clients[at:], *clients[:at]]:
            found[client.name] = ceiling(run_one(client, tokenizer, input_tokens))
            say(f"round {turn + 1} of {rounds}, {client.name}: {found[client.name]['middle']:,.0f} requests/s", "dim")
        document["rounds"].append(found)
        document["ceilings"] = {client.name: mean_of(document["rounds"], client.name) for client in clients}
        save(document)
    document |= {"open_loop": open_loop(input_tokens), "complete": True}
    save(document)
    return document


def run_one(client: Client, tokenizer: str, input_tokens: int) -> Outcome:
    """A client against a null server of its own."""
    requests = REQUESTS[type(client)] * (client.processes if isinstance(client, Ours) else 1)
    with NullServer() as server:
        load = Workload(server.base_url, "null", tokenizer, CONCURRENCY, requests, input_tokens, CHUNKS)
        return client.measure(load, secrets.randbits(31))


def ceiling(outcome: Outcome) -> dict[str, Any]:
    """Requests/s of a run, whole and of its middle."""
    ends = np.sort(outcome.last)
    begin, end = (round(part * (len(ends) - 1)) for part in MIDDLE)
    return {
        "requests": len(ends),
        "failed": outcome.failed,
        "requests_per_second": round(outcome.requests_per_second, 1),
        "middle": round((end - begin) / max(float(ends[end] - ends[begin]), 1e-9), 1),
        "in_flight": round(outcome.in_flight, 2),
    }


def mean_of(rounds: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """A client's means over rounds, and its best round: other programs make a ceiling lower, never higher."""
    keys = ("requests_per_second", "middle", "in_flight")
    means = {key: round(statistics.mean(each[name][key] for each in rounds), 1) for key in keys}
    return means | {"best": max(each[name]["middle"] for each in rounds)}


def open_loop(input_tokens: int) -> dict[str, Any]:
    """Ours with two processes, Poisson arrivals: the rate that was reached, how late requests were, and the verdict."""
    with NullServer() as server, TemporaryDirectory(prefix="loraport-clients-") as folder:
        out = Path(folder) / "out.json"
        options = f"--rate {RATE} --seconds {RATE_SECONDS} --processes {RATE_PROCESSES} --output {CHUNKS}"
        command = [sys.executable, "-m", "loraport_cli", "bench", "throughput", "--base-url", server.base_url]
        command += [*options.split(), "--input", str(input_tokens), "--out", str(out)]
        run_program(command, Path(folder) / "log", {})
        stage = json.loads(out.read_text())["stages"][0]
    names = ("requests", "seconds", "requests_per_second", "errors", "late_ms", "ttft_ms")
    told = {name: stage["figures"][name] for name in names}
    verdict = {name: stage[name] for name in ("believed", "reasons")}
    return {"rate": RATE, "arrival": "poisson", **told, **stage["client"], **verdict}


def print_ceilings(document: dict[str, Any]) -> None:
    """A table and a line, on standard output."""
    console, work, opened = result_console(), document["workload"], document["open_loop"]
    sizes = f"{span(work['output_tokens'])} chunks a reply, {span(work['input_tokens'])} tokens in"
    title = f"{sizes}, {work['concurrency']} at once"
    console.print(Text(f"null server, {title}, means of {len(document['rounds'])} rounds", style="dim"))
    table = plain_table("", ["requests/s, best round", "mean", "whole run", "in flight"])
    for name, each in document["ceilings"].items():
        rates = (f"{each[key]:,.0f}" for key in ("best", "middle", "requests_per_second"))
        table.add_row(name, *rates, f"{each['in_flight']:.1f}")
    console.print(table)
    late, loop = opened["late_ms"], opened["loop_late_ms"]
    console.print(
        f"open loop, {opened['rate']:,}/s by {RATE_PROCESSES} processes of ours: "
        f"{opened['requests_per_second']:,.0f}/s, sent late by p50 {late['p50']:.2f}, p99 {late['p99']:.2f} ms, "
        f"event loop late by p95 {loop['p95']:.2f} ms, CPU {', '.join(f'{one:.0%}' for one in opened['cpu_shares'])}",
        markup=False,
    )
    for reason in opened["reasons"]:
        console.print(Text(f"withheld by the verdict: {reason}", style="yellow"))

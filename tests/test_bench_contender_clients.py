"""Load clients against each other: what they wrote is read back, ratios are of rounds, ours runs on a null server.

The samples are cut from what vLLM 0.32.0 and GuideLLM 0.8.1 wrote.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraport.bench.contenders.ceilings import ceiling
from loraport.bench.contenders.clients import AGAIN, OURS, choose, compare, conclude, parse, print_report, run
from loraport.bench.contenders.load_clients import Client, GuideLLM, Ours, Outcome, VllmBench, Workload
from loraport.bench.contenders.programs import run_program
from loraport.bench.load.fleet import NullServer
from loraport.bench.serving.comparable import figures_of
from loraport.bench.serving.documents import read_parts
from loraport.bench.serving.report_html import write_report
from loraport.clients.errors import EndpointError, ResourceError, UsageError

LOAD = Workload("http://127.0.0.1:8000/v1", "base", "a/tokenizer", concurrency=4, requests=100, input=64, output=24)
VLLM: dict[str, Any] = {
    "duration": 4.884650754996983,
    "output_throughput": 491.3350248315721,
    "request_throughput": 20.472292701315503,
    "input_lens": [64, 64, 64],
    "output_lens": [24, 24, 24],
    "ttfts": [0.03200240900332574, 0.08317559100396466, 0.08313925399852451],
    "latencies": [0.20831117600027937, 0.21417727100197226, 0.2142081439960748],
    "start_times": [60651.661162344, 60651.661343224, 60651.661401126],
    "errors": ["", "", ""],
    "median_ttft_ms": 71.12655350283603,
    "p99_ttft_ms": 84.79963454054088,
    "median_tpot_ms": 5.346447913167219,
    "p99_tpot_ms": 7.6660285407390045,
}


def distribution(mean: float, median: float, p99: float) -> dict[str, Any]:
    """A figure as GuideLLM writes it, without what nobody reads."""
    return {"successful": {"mean": mean, "median": median, "percentiles": {"p99": p99}}}


def guided(start: float, first: float, last: float, chunks: int) -> dict[str, Any]:
    """A request as GuideLLM writes it."""
    timings = {"request_start": start, "first_token_iteration": first, "last_token_iteration": last}
    return {
        "info": {"timings": timings | {"token_iterations": chunks, "request_iterations": 26}},
        "output_tokens": 24,
        "prompt_tokens": 64,
    }


GUIDELLM: dict[str, Any] = {
    "requests": {
        "successful": [
            guided(1795362828.1071799, 1795362828.1642373, 1795362828.3896763, 24),
            guided(1795362832.9244032, 1795362832.9633226, 1795362833.1633754, 22),  # two tokens without text
        ],
        "errored": [],
        "incomplete": [{}],
        "total": None,
    },
    "metrics": {
        "output_tokens_per_second": distribution(402.11892879120796, 349.0308729300158, 2322.4274640088593),
        "requests_per_second": distribution(16.75495536630034, 8.883527059541157, 242.81023503531318),
        "time_to_first_token_ms": distribution(71.51232957839966, 76.80225372314453, 103.75356674194336),
        "inter_token_latency_ms": distribution(6.814396899679433, 6.675823875095533, 9.582198184469473),
        "time_per_output_token_ms": distribution(9.510144094626108, 9.199947118759155, 11.770685513814291),
    },
}


def read(client: Client, document: Any, folder: Path) -> Outcome:
    """What a client makes of a file of its tool."""
    path = folder / "out.json"
    path.write_text(json.dumps(document))
    return client.read(path)


def test_vllms_arrays_become_times_of_requests(tmp_path: Path) -> None:
    outcome = read(VllmBench("vllm bench serve"), VLLM, tmp_path)
    figures = outcome.figures()
    assert figures["ttft_ms"]["p50"] == pytest.approx(83.139, abs=1e-3)  # of these three; its own is of all it sent
    assert figures["own"]["median_ttft_ms"] == 71.127 and figures["own"]["output_throughput"] == 491.335
    wanted = 1000 * (VLLM["latencies"][0] - VLLM["ttfts"][0]) / 23
    assert (outcome.last - outcome.first)[0] / 23 * 1000 == pytest.approx(wanted)
    assert figures["output_tokens_per_second"] == pytest.approx(72 / outcome.seconds, abs=1e-3)
    assert 2.9 < figures["in_flight"] <= 3 and figures["mean_input_tokens"] == 64


def test_a_request_of_vllm_that_failed_has_no_times(tmp_path: Path) -> None:
    broken = VLLM | {"errors": ["", "Service Unavailable", ""], "output_lens": [24, 0, 24]}
    outcome = read(VllmBench("vllm bench serve"), broken, tmp_path)
    assert (len(outcome.start), outcome.failed) == (2, 1)
    assert outcome.figures()["mean_output_tokens"] == 24


def test_guidellms_itl_is_what_others_call_tpot(tmp_path: Path) -> None:
    """The figures of single requests as it tells them itself: 57.06 and 38.92 ms, 9.8017 and 8.6979 ms."""
    outcome = read(GuideLLM("GuideLLM"), {"benchmarks": [GUIDELLM]}, tmp_path)
    figures = outcome.figures()
    assert 1000 * (outcome.first - outcome.start) == pytest.approx([57.05738, 38.91945], abs=1e-4)
    assert figures["tpot_ms"]["p50"] == pytest.approx((9.801698 + 8.697945) / 2, abs=1e-3)
    assert figures["own"]["inter_token_latency_ms"] == {"mean": 6.814, "p50": 6.676, "p99": 9.582}
    assert (figures["failed"], figures["textless"]) == (1, 1)
    assert figures["in_flight"] < 0.2  # five seconds between the two


def option(command: list[str], name: str) -> str:
    """The value behind a flag."""
    return command[command.index(name) + 1]


def test_all_are_told_the_same_load(tmp_path: Path) -> None:
    ours, vllm, guide = (
        client.command(LOAD, tmp_path / "out.json", 7)
        for client in (Ours(OURS), VllmBench("v", "bin/vllm"), GuideLLM("g", "bin/guidellm", 2))
    )
    assert (option(ours, "--requests"), option(vllm, "--num-prompts")) == ("100", "100")
    assert option(guide, "--constraint") == "kind=max_requests,count=100"
    assert (option(ours, "--concurrency"), option(vllm, "--max-concurrency")) == ("4", "4")
    assert option(guide, "--profile") == "kind=concurrent,streams=4"
    assert (option(ours, "--seed"), option(vllm, "--seed"), option(guide, "--seed")) == (
        "7",
        "7",
        "kind=static,value=7",
    )
    assert (option(ours, "--input"), option(vllm, "--random-input-len")) == ("64", "64")
    assert option(guide, "--data") == "kind=synthetic_text,prompt_tokens=64,output_tokens=24"
    assert option(ours, "--base-url") == "http://127.0.0.1:8000/v1"
    assert option(vllm, "--base-url") == json.loads(option(guide, "--backend"))["target"] == "http://127.0.0.1:8000"
    assert vllm[:3] == ["bin/vllm", "bench", "serve"] and "--ignore-eos" in vllm
    assert GuideLLM("g", "bin/guidellm", 2).variables() == {"GUIDELLM__MAX_WORKER_PROCESSES": "2"}


def test_at_a_rate_all_send_evenly(tmp_path: Path) -> None:
    load = replace(LOAD, rate=8.0)
    ours, vllm, guide = (
        client.command(load, tmp_path / "out.json", 7) for client in (Ours(OURS), VllmBench("v"), GuideLLM("g"))
    )
    assert (option(ours, "--rate"), option(ours, "--arrival")) == ("8", "constant")
    assert (option(vllm, "--request-rate"), option(vllm, "--burstiness")) == ("8", "inf")
    assert option(guide, "--profile") == "kind=constant,rate=8"
    assert "--concurrency" not in ours and "--max-concurrency" not in vllm


def test_a_python_runs_vllms_module(tmp_path: Path) -> None:
    """Because the console script of its CPU build does not start."""
    command = VllmBench("v", "/somewhere/bin/python3.11").command(LOAD, tmp_path / "out.json", 7)
    assert command[1] == "-c" and "vllm.benchmarks.serve" in command[2]
    compile(command[2], "shim", "exec")


def made(ttft: float, tpot: float = 0.01, count: int = 20, own: dict[str, Any] | None = None) -> Outcome:
    """An outcome with requests one after the other, 11 tokens each."""
    start = np.arange(count, dtype=np.float64)
    tokens = np.full(count, 11.0)
    first = start + ttft
    return Outcome(start, first, first + 10 * tpot, tokens, tokens, failed=0, own=own or {})


def test_ratios_are_of_rounds_and_a_slow_moment_is_in_both() -> None:
    """The machine is twice as slow in the third round; ours is 2% above theirs in each."""
    clients = [Ours(OURS), VllmBench("vllm bench serve")]
    pace = (1.0, 1.1, 2.0, 1.05)
    theirs = [made(0.1 * one, own={"median_ttft_ms": 100 * one}) for one in pace]
    ours = [made(0.102 * one, own={"ttft_ms": {"p50": 102 * one}}) for one in pace]
    outcomes = {OURS: ours, "vllm bench serve": theirs}
    rounds = [
        {"clients": {OURS: one.figures(), "vllm bench serve": other.figures()}}
        for one, other in zip(ours, theirs, strict=True)
    ]
    found = conclude(rounds, clients, outcomes)
    ratio = found["ratios"]["vllm bench serve"]["TTFT p50"]
    assert (ratio["ratio"], ratio["rounds"]) == (pytest.approx(1.02, abs=1e-3), 4)
    assert ratio["low"] == pytest.approx(1.02, abs=2e-3) and ratio["high"] == pytest.approx(1.02, abs=2e-3)
    assert found["own_ratios"]["vllm bench serve"]["TTFT p50"]["ratio"] == pytest.approx(1.02, abs=1e-3)
    assert found["own_ratios"]["vllm bench serve"]["TPOT p50"] is None  # neither told it
    assert found["means"][OURS]["TPOT p50"] == pytest.approx(10.0)
    assert found["all_requests"][OURS]["requests"] == 80


def test_a_ceiling_is_without_ramp_and_drain() -> None:
    """A second passes before the first of 101 answers, which come 10 ms apart, and the last is late."""
    last = 1 + np.arange(101) / 100
    last[-1] = 12.0
    some = np.zeros(101)
    found = ceiling(Outcome(some, some + 0.5, last, some + 16, some, failed=0, own={}))
    assert found["middle"] == pytest.approx(100) and found["requests_per_second"] == pytest.approx(8.4)


def test_ours_alone_on_a_null_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program as a whole, with ours as its own reference; its document is one that reports take."""
    out = tmp_path / "clients.json"
    with NullServer(ttft=0.03, gap=0.01) as server:
        given = ["--base-url", server.base_url, "--again", "--requests", "8", "--concurrency", "2", "--rounds", "1"]
        run(parse([*given, "--input", "16", "--output", "6", "--out", str(out)]))
    document = json.loads(out.read_text())
    assert document["complete"] and document["rounds"][0]["order"] == [OURS, AGAIN]
    figures = document["rounds"][0]["clients"][OURS]
    assert (figures["requests"], figures["failed"], figures["mean_output_tokens"]) == (8, 0, 6)
    assert figures["ttft_ms"]["p50"] >= 30 and figures["tpot_ms"]["p50"] >= 10
    assert figures["own"]["ttft_ms"] == figures["ttft_ms"] and figures["own"]["tpot_ms"] == figures["tpot_ms"]
    assert figures["own"]["output_tokens_per_second"] == figures["output_tokens_per_second"]
    told = capsys.readouterr().out
    assert "ours / ours again" in told and "by the same definitions" in told
    compared = {each.key: each.value for each in figures_of(document)}
    assert compared[OURS, "TTFT p50"] == pytest.approx(figures["ttft_ms"]["p50"], rel=1e-3)
    assert compared[AGAIN, "TTFT p50, ratio"] == document["ratios"][AGAIN]["TTFT p50"]["ratio"]
    page = tmp_path / "report.html"
    write_report(page, read_parts([out]))
    assert "ours again" in page.read_text()


def test_clients_that_are_not_named_are_left_out() -> None:
    assert [client.name for client in choose(parse([]))] == [OURS]
    named = choose(parse(["--null", "--guidellm", sys.executable, "--guidellm-workers", "1,2"]))
    assert [(client.name, client.processes) for client in named] == [
        (OURS, 1),
        ("ours, two processes", 2),
        ("GuideLLM, workers at most 1", 1),
        ("GuideLLM, workers at most 2", 2),
    ]
    with pytest.raises(UsageError, match="no program 'nowhere/vllm'"):
        choose(parse(["--vllm", "nowhere/vllm"]))
    with pytest.raises(UsageError, match="no server"):
        run(parse([]))


def test_a_client_that_fails_tells_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such flag'); raise SystemExit(3)"]
    with pytest.raises(ResourceError, match="ended with exit code 3") as caught:
        run_program(command, tmp_path / "log", {})
    assert caught.value.details == ("no such flag",)


class Silent(Client):
    """A tool whose requests all fail."""

    def command(self, load: Workload, out: Path, seed: int) -> list[str]:
        document = VLLM | {"errors": ["Service Unavailable"] * 3}
        return [sys.executable, "-c", f"open({str(out)!r}, 'w').write({json.dumps(document)!r})"]

    def read(self, out: Path) -> Outcome:
        return VllmBench("v").read(out)


def test_a_client_without_an_answer_is_an_error() -> None:
    with pytest.raises(EndpointError, match="silent got no answer"):
        Silent("silent").measure(LOAD, 1)


def test_the_order_turns_from_round_to_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"output_throughput": 1.0, "output_tokens_per_second": 1.0}
    monkeypatch.setattr(Client, "measure", lambda self, load, seed: replace(made(0.1, own=own), doubts=[str(seed)]))
    clients = [Ours(OURS), Ours(AGAIN), VllmBench("vllm bench serve")]
    saved: list[bool] = []
    with NullServer() as server:
        document = compare(
            replace(LOAD, base_url=server.base_url),
            clients,
            3,
            100,
            lambda document: saved.append(document["complete"]),
        )
    assert saved == [False, False, True]
    assert [each["order"][0] for each in document["rounds"]] == [client.name for client in clients]
    seeds = [figures["doubts"][0] for each in document["rounds"] for figures in each["clients"].values()]
    assert len(set(seeds)) == 9 and "99" not in seeds  # no prompt twice, nor one of the warm-up
    print_report(document)
    assert "round 1, ours: 100" in capsys.readouterr().out

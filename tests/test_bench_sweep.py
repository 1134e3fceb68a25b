"""What `loraport bench throughput` runs beside a list of loads: sweeps, ramps, conversations, and resumed runs."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loraport.bench.load.figures import Records
from loraport.bench.load.fleet import NullServer
from loraport.bench.load.parts import along_ramp, by_cache
from loraport.bench.load.record import Record
from loraport.bench.load.stage import Load
from loraport.bench.serving.cli import bench_throughput
from loraport.bench.serving.sweep import Search, Sweep
from loraport.bench.serving.throughput import knee
from loraport.clients.errors import DataError, LoraportError, UsageError
from tests.misbehaving import Misbehaving

SMALL: dict[str, Any] = {"input_tokens": "8", "output_tokens": "4", "calibrate": False, "timeout": 20.0}
TURNS = ["Who sells tea?", "Where?", "And coffee?"]


def document_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON document on standard output."""
    return dict(json.loads(capsys.readouterr().out))


def result(label: str, speed: float, **more: Any) -> dict[str, Any]:
    """What a load of this speed comes to. `met`: share of requests that met the limits; `withheld`: a reason."""
    met, withheld, errors = more.get("met"), more.get("withheld", ""), more.get("errors", {})
    figures = {
        "requests": 100,
        "errors": errors,
        "goodput": None if met is None else {"share": met},
        "steady": None,
        "output_tokens_per_second": speed,
        "requests_per_second": speed / 10,
        "ttft_ms": {"p50": 1.0, "p99": 2.0},
        "tpot_ms": None,
    }
    return {"label": label, "believed": not withheld, "reasons": [withheld] if withheld else [], "figures": figures}


def search(server: Callable[[float], dict[str, Any]], first: float = 1, step_s: float = 1, **more: Any) -> Search:
    """A sweep over a server that is a function of the level, run to its end by a clock of its own."""
    now = [0.0]

    def measure(load: Load) -> dict[str, Any]:
        now[0] += step_s
        level = load.concurrency or load.rate
        return result(load.words, **server(level))

    kind = more.pop("kind", "concurrency")
    found = Search(Sweep(kind, first, 1.0, more.pop("budget_s", 1000.0), **more), measure, lambda: now[0])
    found.run()
    return found


def saturating(level: float) -> dict[str, Any]:
    """A server that is full at 24."""
    return {"speed": 100 * min(level, 24)}


def test_a_sweep_finds_where_more_load_brings_no_more() -> None:
    found = search(saturating)
    told = found.to_json()
    assert told["stopped"] == "found" and 22 <= told["knee"]["level"] <= 28
    assert told["right"]["level"] / told["knee"]["level"] <= 1.2 and "tokens/s for" in told["right"]["reason"]
    assert told["left"]["level"] < told["knee"]["level"]
    levels = [step["level"] for step in told["steps"]]
    assert levels[:7] == [1, 2, 4, 8, 16, 32, 64] and len(levels) <= 10
    assert [line.split(" at ")[0] for line in knee(told)] == ["below it,", "saturates", "above it,"]


def test_a_sweep_that_begins_too_high_goes_down() -> None:
    found = search(lambda level: {"speed": level, "met": 1.0 if level <= 3 else 0.5}, first=50.0, kind="rate").to_json()
    assert found["stopped"] == "found" and 2.5 < found["knee"]["level"] <= 3
    assert found["right"]["reason"] == "50.0% of the requests met all limits (bound 99%)"


@pytest.mark.parametrize(
    ("server", "stopped", "words"),
    [
        (lambda level: {"speed": 1.0, "errors": {"5xx": 2}}, "nothing was fine", "2 of 100 requests failed"),
        (lambda level: {"speed": 1.0, "errors": {"stopped": 9}}, "nothing was fine", "9 of 100 requests were not"),
        (lambda level: {"speed": level, "withheld": "late" if level > 4 else ""}, "withheld", "fine up to 4 at once"),
    ],
)
def test_where_a_sweep_ends_and_why(server: Callable[[float], dict[str, Any]], stopped: str, words: str) -> None:
    told = search(server).to_json()
    assert told["stopped"] == stopped and words in " ".join(knee(told))
    assert stopped != "withheld" or [step["level"] for step in told["steps"][-2:]] == [8, 8], "tried twice"


def test_a_sweep_stays_within_its_budget() -> None:
    found = search(lambda level: {"speed": level}, step_s=10, budget_s=45.0)
    assert found.stopped == "budget" and found.seconds == 40 and len(found.steps) == 4
    assert "the true limit is higher" in " ".join(knee(found.to_json()))


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is believed however busy this machine is."""
    for bound in ("LATE_MS", "CPU"):
        monkeypatch.setattr(f"loraport.bench.load.verdict.{bound}", 1e9)


@pytest.mark.usefixtures("trusted")
def test_the_command_sweeps_a_server_that_is_never_fast_enough(capsys: pytest.CaptureFixture[str]) -> None:
    with NullServer(ttft=0.02, gap=0.005) as server:
        options = SMALL | {"slo": "ttft=1ms", "seconds": 0.5, "concurrency": "2"}
        bench_throughput(server.base_url, sweep=True, json=True, **options)
        found = document_of(capsys)
        assert found["complete"] and found["stages"][0]["label"] == "1 at once"
        assert found["sweep"]["knee"] is None and found["sweep"]["stopped"] == "nothing was fine"
        bench_throughput(server.base_url, sweep=True, **options)
    assert "no load was fine: 1 at once: 0.0% of the requests met all limits" in capsys.readouterr().out


def ramp_records(due: Any, took: Callable[[float], float]) -> Records:
    """Requests that are due at these times; `took`: seconds to their first and last token, by due time."""
    records = Records()
    for number, at in enumerate(due):
        first = at + took(at)
        records.add(Record(0, number, "m", at, at, first, first, first, prompt_tokens=4, completion_tokens=1))
    return records


def test_a_ramp_tells_up_to_which_rate_the_server_kept_up() -> None:
    load = Load("open", rate=10, rate_to=130, ramp_s=12.0)
    due = [(second + part / (10 + 10 * second)) for second in range(12) for part in range(10 + 10 * second)]
    even = along_ramp(ramp_records(due, lambda at: 0.001), load, 0.0, {"ttft": 0.5})
    assert (even["kept_up_to"], even["met_up_to"], len(even["windows"])) == (125, 125, 12)
    queue = along_ramp(ramp_records(due, lambda at: 0.001 if at < 6 else (at - 6) / 2), load, 0.0, {"ttft": 1.0})
    assert 60 <= queue["kept_up_to"] <= 75 and queue["met_up_to"] == 85
    assert along_ramp(ramp_records(due, lambda at: 9.0), load, 0.0, {"ttft": 1.0})["met_up_to"] is None


@pytest.mark.usefixtures("trusted")
def test_a_ramp_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with NullServer() as server:
        bench_throughput(server.base_url, ramp="20:60:1", arrival="constant", json=True, **SMALL)
        (stage,) = document_of(capsys)["stages"]
        assert stage["label"] == "20 to 60/s constant" and stage["figures"]["answered"] == 40
        assert len(stage["ramp"]["windows"]) == 12 and stage["figures"]["steady"] is None
        bench_throughput(server.base_url, ramp="20:60:1", **SMALL)
    assert "it kept up to" in capsys.readouterr().out


def save_talks(folder: Path, talks: int = 4) -> Path:
    """Conversations of three turns under one system prompt."""
    path = folder / "talks.jsonl"
    with path.open("w") as lines:
        for _ in range(talks):
            messages = [{"role": "system", "content": "Be brief."}]
            for turn in TURNS:
                messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "recorded"}]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.mark.usefixtures("trusted")
def test_conversations_are_replayed_with_the_servers_own_replies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Misbehaving(["echo"]) as server:
        options = SMALL | {"data": save_talks(tmp_path), "replay": True, "processes": 2}
        bench_throughput(server.base_url, concurrency="2", requests=6, json=True, **options)
        found, asked = document_of(capsys), [body["messages"] for body in server.seen]
        bench_throughput(server.base_url, concurrency="2", requests=6, **options)
    (stage,) = found["stages"]
    assert stage["label"] == "2 talks at once" and stage["figures"]["answered"] == 18
    assert {turn: one["requests"] for turn, one in stage["by_turn"].items()} == {"1": 6, "2": 6, "3": 6}
    assert [one["cached_share"] for one in stage["by_turn"].values()] == [0, 0.75, 0.8333]
    assert stage["by_cache"]["hit"]["requests"] == 12 and stage["by_cache"]["missed"]["requests"] == 6
    longest = [messages for messages in asked if len(messages) == 6]
    assert len(longest) == 6 and len({messages[1]["content"] for messages in longest}) == 6, "no two are the same"
    assert {messages[0]["content"] for messages in longest} == {"Be brief."}
    assert [message["content"] for message in longest[0][2:]] == ["reply 2", "Where?", "reply 4", "And coffee?"]
    out = capsys.readouterr().out
    assert "2 talks at once, by turn" in out and "missed" in out


def test_hits_of_the_prefix_cache_are_told_apart_only_where_they_are_known() -> None:
    records = ramp_records(np.arange(4.0), lambda at: 0.1)
    assert by_cache(records) is None
    records.columns["cached"][:] = type(records.columns["cached"])("d", [0, 0, 8, 9])
    found = by_cache(records)
    assert found and (found["hit"]["requests"], found["missed"]["requests"]) == (2, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"replay": True},
        {"as_is": True},
        {"replay": True, "data": True, "rate": "2"},
        {"sweep": True, "requests": 5},
        {"sweep": True, "rate": "1,2"},
        {"sweep": True, "rate": "1", "concurrency": "1"},
        {"sweep": True, "ramp": "1:2:3"},
        {"ramp": "1:2"},
        {"ramp": "0:2:9"},
        {"resume": True},
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, options: dict[str, Any]) -> None:
    if "data" in options:
        options = options | {"data": save_talks(tmp_path)}
    with pytest.raises(UsageError) as caught:
        bench_throughput("http://127.0.0.1:1/v1", **SMALL | options)
    assert caught.value.hint


def believed(path: Path) -> dict[str, Any]:
    """A result as if the client had never been late: on a busy machine it is, and those loads would be run again."""
    document: dict[str, Any] = json.loads(path.read_text())
    for stage in document["stages"]:
        stage["believed"] = True
    path.write_text(json.dumps(document))
    return document


def test_a_run_that_was_killed_goes_on_with_the_loads_that_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    with Misbehaving(["slow"]) as server:
        command = [sys.executable, "-m", "loraport_cli", "bench", "throughput", "--base-url", server.base_url]
        command += ["--concurrency", "1,2,3", "--requests", "12", "--no-calibrate", "--input", "8", "--output", "4"]
        process = subprocess.Popen([*command, "--timeout", "20", "--out", str(out)], stderr=subprocess.DEVNULL)
        while not out.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = believed(out)
        kept = [stage["label"] for stage in before["stages"]]
        assert kept[0] == "1 at once" and not before["complete"]
        options = SMALL | {"concurrency": "1,2,3", "requests": 12, "out": out, "resume": True, "json": True}
        asked = len(server.seen)
        bench_throughput(server.base_url, **options)
        prompts = [body["prompt"] for body in server.seen]
        capsys.readouterr()
        found = believed(out)
        assert [stage["label"] for stage in found["stages"]] == ["1 at once", "2 at once", "3 at once"]
        assert found["complete"] and found["parts"] == 2 and found["stages"][0] == before["stages"][0]
        assert not set(prompts[:asked]) & set(prompts[asked + 3 :]), "only what is asked before a load is asked again"
        bench_throughput(server.base_url, **options)
        assert document_of(capsys) == found and len(server.seen) == len(prompts), "nothing is missing"
        with pytest.raises(UsageError, match="the earlier run was another: requests"):
            bench_throughput(server.base_url, **options | {"requests": 13})


@pytest.mark.parametrize("text", ["{", "[]", '{"bench": "lora-tax"}'])
def test_what_cannot_be_resumed(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with NullServer() as server, pytest.raises(LoraportError) as caught:
        bench_throughput(server.base_url, out=tmp_path / "x.json", resume=True, **SMALL)
    assert isinstance(caught.value, DataError) and caught.value.hint

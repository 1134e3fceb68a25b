"""`loraport bench throughput`, `lora-tax`, `gateway`: on servers of known speed, and on those that misbehave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from loraport.bench.environment import server_command
from loraport.bench.load.fleet import NullServer
from loraport.bench.load.server import Server
from loraport.bench.load.workload import Wish, make_workload, parse_lengths
from loraport.bench.serving.cli import bench_gateway, bench_lora_tax, bench_throughput
from loraport.clients.errors import EndpointError, UsageError
from loraport.clients.redact import hide_secrets
from tests.misbehaving import Misbehaving

SMALL: dict[str, Any] = {"input_tokens": "8", "output_tokens": "4", "calibrate": False, "timeout": 20.0}


def document_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON document on standard output."""
    return dict(json.loads(capsys.readouterr().out))


def test_tokens_are_those_that_the_server_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with NullServer() as server:
        options = SMALL | {"input_tokens": "8:12", "seed": 3, "processes": 2, "records": tmp_path / "records"}
        bench_throughput(server.base_url, concurrency="2,5", rate="400", requests=30, json=True, **options)
    found = document_of(capsys)
    assert found["complete"] and [stage["label"] for stage in found["stages"]] == [
        "2 at once",
        "5 at once",
        "400/s poisson",
    ]
    for stage in found["stages"]:
        figures = stage["figures"]
        assert (figures["requests"], figures["answered"], figures["output_tokens"]) == (30, 30, 120)
        assert 8 * 30 <= figures["input_tokens"] <= 12 * 30
    lines = [line for path in (tmp_path / "records").iterdir() for line in path.read_text().splitlines()]
    assert len(lines) == 90 + 16, "and those of the warm-up"
    assert found["workload"]["seed"] == 3 and found["environment"]["versions"]["httptools"]


def test_the_table_shows_times_of_a_server_of_known_speed(capsys: pytest.CaptureFixture[str]) -> None:
    with NullServer(ttft=0.02, gap=0.01) as server:
        bench_throughput(server.base_url, concurrency="2", requests=6, slo="ttft=60s,tpot=0.001ms", out=None, **SMALL)
    out = capsys.readouterr().out
    assert "8 tokens in, 4 out, /completions" in out
    assert "2 at once" in out and "TPOT p50" in out and "0.0%" in out and "TTFT p50" in out


def test_times_are_never_shorter_than_the_servers(capsys: pytest.CaptureFixture[str]) -> None:
    """How much longer they are depends on the machine; shorter would be wrong on any."""
    with NullServer(ttft=0.05, gap=0.02) as server:
        bench_throughput(server.base_url, concurrency="1", requests=4, json=True, **SMALL)
    figures = document_of(capsys)["stages"][0]["figures"]
    assert figures["ttft_ms"]["p50"] >= 49 and figures["tpot_ms"]["mean"] >= 19
    assert figures["e2e_ms"]["p50"] >= 109


@pytest.mark.parametrize("chat", [False, True])
def test_several_models_are_all_warmed_and_take_turns(capsys: pytest.CaptureFixture[str], chat: bool) -> None:
    with Misbehaving(["good", "good-demo"]) as server:
        models = ["good", "good-demo"]
        bench_throughput(server.base_url, models, concurrency="2", requests=10, chat=chat, json=True, **SMALL)
        asked = [body["model"] for body in server.seen]
    found = document_of(capsys)["stages"][0]
    assert asked[-10:].count("good") == 5
    assert {name: each["answered"] for name, each in found["by_model"].items()} == {"good": 5, "good-demo": 5}
    assert "good-demo" in asked[:-10], "warmed up"
    assert all(("messages" in body) == chat for body in server.seen)


def test_prompts_are_of_the_wished_length_whatever_the_server_adds() -> None:
    with Misbehaving(["good"]) as server, Server(server.base_url) as known:
        workload = make_workload(known, "good", Wish((20, 20), (4, 4), seed=1))
        assert (workload.source.kind, workload.notes) == ("words", [])
        assert known.ask(workload.source, 7, "good").prompt == 20


def test_a_server_without_ignore_eos_is_measured_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    with Misbehaving(["strict"]) as server:
        bench_throughput(server.base_url, concurrency="1", requests=3, json=True, **SMALL)
        assert "ignore_eos" not in server.seen[-1]
    found = document_of(capsys)
    assert found["stages"][0]["figures"]["output_tokens"] == 9
    assert "the server has no ignore_eos" in found["workload"]["notes"][0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("silent", "never says how many tokens it sent"),
        ("wrong", "failed in the server (5xx) (500): it broke"),
        ("refusing", "refused by the server (4xx) (400): not this way"),
        ("cut", "connection closed before the end"),
        ("failing", "an error inside the stream: the engine died"),
        ("whole", "not with a stream of events"),
        ("empty", "a stream without a token"),
        ("half", "connection closed before the end"),
        ("locked", "refuses the API key: Incorrect API key provided"),
        ("busy", "refuses more requests: too many (Retry-After: 7)"),
        ("garbage", "an error inside the stream"),
        ("odd", "an error inside the stream"),
        ("late", "not answered in time"),
    ],
)
def test_a_server_that_cannot_be_measured_is_refused_in_words(model: str, message: str) -> None:
    with Misbehaving([model]) as server, pytest.raises(EndpointError) as caught:
        bench_throughput(server.base_url, requests=3, **(SMALL | {"timeout": 2.0}))
    assert message in caught.value.message and caught.value.hint


def test_a_wrong_key_and_an_unknown_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with Misbehaving(["good"], key="sk-right") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        with pytest.raises(EndpointError, match="refuses the API key") as caught:
            bench_throughput(server.base_url, requests=3, **SMALL)
        assert "sk-" not in caught.value.message
        monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
        with pytest.raises(UsageError, match="has no model 'goood'"):
            bench_throughput(server.base_url, ["goood"], requests=3, **SMALL)
        bench_throughput(server.base_url, requests=3, json=True, **SMALL)
        assert {head["Authorization"] for head in server.heads} == {"Bearer sk-right"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "unix:/nowhere/engine.sock"])
def test_nothing_answers(url: str) -> None:
    with pytest.raises(EndpointError, match="nothing answers at") as caught:
        bench_throughput(url, requests=3, **SMALL)
    assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": "1,two"},
        {"concurrency": "0"},
        {"concurrency": "1.5"},
        {"rate": "-1"},
        {"arrival": "sometimes"},
        {"input_tokens": "9:3"},
        {"output_tokens": "many"},
        {"shared_prefix": 8},
        {"slo": "fast"},
        {"out": Path("/nowhere/out.json")},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        bench_throughput("http://127.0.0.1:1/v1", **(SMALL | options))
    assert caught.value.hint


def test_lengths() -> None:
    assert (parse_lengths("512", "--input"), parse_lengths("2:9", "--input")) == ((512, 512), (2, 9))


def test_a_server_that_starts_to_refuse_is_left_and_what_ran_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with Misbehaving(["good"], limit=40) as server, pytest.raises(EndpointError, match="stopped answering under"):
        bench_throughput(server.base_url, concurrency="2,4", seconds=600, json=True, **SMALL)
    found = document_of(capsys)
    assert not found["complete"] and len(found["stages"]) == 1
    (stage,) = found["stages"]
    assert stage["figures"]["errors"]["429"] >= 50 and stage["figures"]["answered"] > 20
    assert stage["headline"] is None and "requests failed" in stage["reasons"][-1]


def test_rows_of_your_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Who sells tea?"}, {"role": "assistant", "content": "Ms Lee."}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    with Misbehaving(["good"]) as server:
        bench_throughput(server.base_url, requests=3, data=path, json=True, **SMALL)
        assert server.seen[-1]["messages"][0]["content"].endswith("] Who sells tea?")
        assert "ignore_eos" not in server.seen[-1]
        assert document_of(capsys)["workload"]["rows"] == 1
        bench_throughput(server.base_url, requests=3, data=path, as_is=True, **SMALL)
        assert server.seen[-1]["messages"] == turns[:1]


def test_ctrl_c_tells_what_has_run_and_leaves_no_process(tmp_path: Path) -> None:
    with Misbehaving(["slow"]) as server:
        command = [sys.executable, "-m", "loraport_cli", "bench", "throughput", "--base-url", server.base_url, "--json"]
        command += ["--concurrency", "3", "--seconds", "600", "--no-calibrate", "--input", "8", "--output", "4"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        while len(server.seen) < 40 and process.poll() is None:
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    found = json.loads(out)
    (stage,) = found["stages"]
    assert not found["complete"] and not stage["complete"]
    assert stage["figures"]["answered"] > 5 and set(stage["figures"]["errors"]) <= {"stopped"}
    assert children and not [child for child in children if child.is_running()]


def test_a_killed_command_leaves_no_process() -> None:
    with Misbehaving(["slow"]) as server:
        command = [sys.executable, "-m", "loraport_cli", "bench", "throughput", "--base-url", server.base_url]
        command += ["--concurrency", "3", "--seconds", "600", "--no-calibrate", "--input", "8", "--output", "4"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(server.seen) < 30 and process.poll() is None:
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
    assert children and not alive


def test_the_tax_is_a_ratio_of_slices_of_the_same_round(capsys: pytest.CaptureFixture[str]) -> None:
    with Misbehaving(["good", "slow-a", "slow-b"]) as server:
        options = SMALL | {"output_tokens": "3"}
        bench_lora_tax(server.base_url, concurrency="2", rounds=4, requests=6, json=True, **options)
    found = document_of(capsys)
    (comparison,) = found["comparisons"]
    labels = [variant["label"] for variant in comparison["variants"]]
    assert labels == ["base", "slow-a", "slow-b", "all mixed (2)"]
    assert len(found["slices"]) == 16 and found["complete"]
    if comparison["believed"]:  # a busy machine may make the client late
        ratio = comparison["variants"][1]["to"]["base"]["tokens_per_second"]
        assert ratio["ratio"] < 1 and comparison["variants"][0]["to"] == {}


def test_the_tax_against_a_server_without_lora(capsys: pytest.CaptureFixture[str]) -> None:
    with Misbehaving(["good", "good-a"]) as server, Misbehaving(["good-plain"]) as plain:
        options = SMALL | {"plain_url": plain.base_url}
        bench_lora_tax(server.base_url, concurrency="1", rounds=2, requests=4, **options)
        assert {body["model"] for body in plain.seen} == {"good-plain"}
    out = capsys.readouterr().out
    assert "without LoRA" in out and "× without LoRA" in out and "× base" in out


def test_a_base_alone_has_no_tax() -> None:
    with Misbehaving(["good"]) as server, pytest.raises(UsageError, match="only the base") as caught:
        bench_lora_tax(server.base_url, **SMALL)
    assert "make-adapters" in caught.value.hint


def test_what_a_gateway_adds(capsys: pytest.CaptureFixture[str]) -> None:
    with Misbehaving(["slow"]) as gateway, Misbehaving(["good"]) as engine:
        bench_gateway(
            engine.base_url,
            gateway.base_url,
            direct_model="good",
            concurrency="1",
            rounds=3,
            requests=4,
            json=True,
            **SMALL,
        )
        with pytest.raises(UsageError, match="has no model 'slow'"):
            bench_gateway(engine.base_url, gateway.base_url, **SMALL)
    (comparison,) = document_of(capsys)["comparisons"]
    assert [variant["label"] for variant in comparison["variants"]] == ["direct", "through the gateway"]
    if comparison["believed"]:
        added = comparison["variants"][1]["to"]["direct"]["ttft_added_ms"]
        assert added["rounds"] >= 2 and added["difference"] > 20


def test_secrets_of_a_command_line_are_not_told() -> None:
    command = [
        "vllm",
        "serve",
        "--api-key",
        "sk-1",
        "--hf-token=hf_2",
        "--port",
        "8000",
        "--max-num-batched-tokens",
        "9",
    ]
    assert hide_secrets(command) == [*command[:3], "…", "--hf-token=…", *command[5:]]


def test_the_process_behind_a_port_is_found() -> None:
    with NullServer() as server:
        port = int(server.base_url.split(":")[2].split("/")[0])
        found = server_command("127.0.0.1", port)
    assert found and "loraport.bench.load.null_server" in found
    assert server_command("example.org", port) is None


def test_an_engine_on_a_unix_socket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "engine.sock"
    fake = [
        sys.executable,
        str(Path(__file__).with_name("fake_engine.py")),
        "--model",
        "m",
        "--served-model-name",
        "base",
    ]
    process = subprocess.Popen([*fake, "--host", "x", "--port", "1", "--max-model-len", "500", "--uds", str(path)])
    try:
        while not path.exists() and process.poll() is None:
            time.sleep(0.01)
        bench_throughput(f"unix:{path}", concurrency="2", requests=6, json=True, **SMALL)
    finally:
        process.terminate()
        process.wait()
    found = document_of(capsys)
    assert found["stages"][0]["figures"]["output_tokens"] == 24
    assert found["servers"][f"unix:{path}"]["context"] == 500

"""`loraport bench kv` on a server whose cache is known, and on ones that misbehave."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from loraport.bench.load.fleet import NullServer
from loraport.bench.load.server import Server
from loraport.bench.serving.kv_cli import bench_kv, parse_contexts
from loraport.bench.serving.kv_context import named_limit, next_guess
from loraport.bench.serving.kv_fill import observed
from loraport.bench.serving.kv_metrics import parse_page
from loraport.clients.errors import EndpointError, UsageError
from tests.conftest import free_port
from tests.kv_server import BLOCK, Knobs, KvServer
from tests.misbehaving import Misbehaving

BIG = Knobs(capacity=2000, context=300, token_s=0.02)  # a reply of 150 tokens is held for 3 s


def measure(
    server: KvServer, capsys: pytest.CaptureFixture[str], part: str = "context", **options: Any
) -> dict[str, Any]:
    """The JSON document of one part."""
    bench_kv(server.base_url, part=[part], json=True, **({"deadline": 20.0, "budget": 100.0} | options))
    return dict(json.loads(capsys.readouterr().out))


def test_everything_in_one_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "kv.json"
    with KvServer(BIG) as server:
        bench_kv(server.base_url, context="300", deadline=30, out=out)
        assert not server.holds and not server.waiting
    found = json.loads(out.read_text())
    assert found["complete"] and found["not_run"] == {} and found["left"]["answers"]
    assert (found["left"]["running"], found["left"]["waiting"]) == (0, 0)
    assert (found["context"]["longest"], found["context"]["first_refused"]) == (300, 301)
    assert found["capacity"]["reported"]["tokens"] == 2000
    assert [each["prompt"] for each in found["lengths"]] == [17, 36, 74, 149, 299]
    shown = capsys.readouterr().out
    for words in ("300 tokens; 301 refused (2 probes)", "2,000 tokens (125 blocks of 16", "full length", "× "):
        assert words in shown


@pytest.mark.parametrize(
    ("knobs", "probes", "agrees"),
    [
        (Knobs(), 2, True),  # told by /v1/models
        (Knobs(told=None), 3, None),  # named in a refusal
        (Knobs(told=None, names_limit=False), 11, None),
        (Knobs(told=900), 3, False),  # told wrongly, named rightly
        (Knobs(told=299, names_limit=False), 4, False),
    ],
)
def test_the_longest_context_is_one_answered_beside_one_refused(
    capsys: pytest.CaptureFixture[str], knobs: Knobs, probes: int, agrees: bool | None
) -> None:
    with KvServer(knobs) as server:
        found = measure(server, capsys)["context"]
    assert (found["longest"], found["first_refused"], found["ended_by"]) == (300, 301, "refused")
    assert (found["agrees"], found["exact"]) == (agrees, True) and len(found["probes"]) <= probes
    tried = {probe["context"]: probe["outcome"] for probe in found["probes"]}
    assert (tried[300], tried[301]) == ("accepted", "refused")


def test_a_prompt_that_hangs_the_server_is_given_up_and_the_server_asked_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with KvServer(Knobs(hangs_from=250)) as server:
        found = measure(server, capsys, deadline=1.0)
        assert server.cut == [probe["outcome"] for probe in found["context"]["probes"]].count("timeout") > 0
    context = found["context"]
    assert context["ended_by"] == "timeout" and 240 <= context["longest"] < 250 <= context["first_refused"] < 256
    assert found["complete"] and context["agrees"] is False


def test_contexts_that_break_or_are_shortened_are_not_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(Knobs(cuts_from=200)) as server:
        broken = measure(server, capsys)["context"]
    assert (broken["longest"], broken["ended_by"]) == (199, "failed") and "connection closed" in broken["said"]
    with KvServer(Knobs(shortens=True, told=None)) as server:
        short = measure(server, capsys)["context"]
    assert (short["ended_by"], short["longest"]) == ("shortened", 301)
    assert "only 299 tokens were read" in short["said"]


def test_a_server_without_a_limit_is_not_asked_for_ever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraport.bench.serving.kv_context.MOST", 5000)
    with NullServer() as server:
        bench_kv(server.base_url, part=["context"])
    assert "5,000 tokens at least: nothing longer was tried" in capsys.readouterr().out


def test_the_cache_is_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(BIG) as server:
        found = measure(server, capsys, "requests", context="300")
        assert server.most_running < 16, "long before --most"
    (filling,) = found["requests"]
    assert filling["limited_by"] == "cache" and filling["ended_by"] in ("waiting", "preemption")
    least = filling["tokens_in_flight"] // 300
    assert not filling["estimated"] and filling["full_length"] == {"least": least, "most": filling["at_once"]}
    seen = found["capacity"]["observed"]
    assert 1000 < seen["tokens"] <= 2020 and not seen["at_least"], "a token or so may be on its way"


def test_the_number_of_requests_is_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(replace(BIG, seats=3, capacity=100_000)) as server:
        found = measure(server, capsys, "requests", context="300")
    (filling,) = found["requests"]
    assert (filling["at_once"], filling["ended_by"], filling["limited_by"]) == (3, "waiting", "requests")
    assert filling["full_length"] is None and found["capacity"]["observed"]["at_least"]


def test_without_metrics_times_decide_and_the_rest_is_not_available(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(replace(BIG, seats=3, capacity=100_000, metrics=False)) as server:
        found = measure(server, capsys, "requests", context="300")
        bench_kv(server.base_url, part=["prefix"])
    (filling,) = found["requests"]
    assert (filling["ended_by"], filling["estimated"]) == ("waiting", True)
    assert 0 < filling["at_once"] <= 3, "fewer where this machine is slow, never more"
    assert filling["limited_by"] is filling["cache_used"] is found["capacity"]["reported"] is None
    shown = capsys.readouterr().out
    assert "KV cache reported  not available" in shown and "hit rate not available" in shown


def test_as_many_as_were_tried(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(replace(BIG, capacity=100_000)) as server:
        (filling,) = measure(server, capsys, "requests", context="300", most=4)["requests"]
    assert (filling["at_once"], filling["ended_by"], filling["at_least"]) == (4, "most", True)


def test_requests_refused_with_429_are_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(replace(BIG, capacity=100_000, refuses_from=2)) as server:
        (filling,) = measure(server, capsys, "requests", context="300")["requests"]
    assert (filling["at_once"], filling["ended_by"]) == (2, "429") and "too many at once" in filling["said"]


def test_a_context_that_is_too_long_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(BIG) as server:
        bench_kv(server.base_url, context="1k", part=["context", "requests"])
    assert "a context of 1,024 tokens is more than the longest, 300" in capsys.readouterr().out


def test_hits_of_the_prefix_cache_are_those_of_the_shared_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(replace(BIG, prompt_s=0.002)) as server:
        found = measure(server, capsys, "prefix")["prefix_cache"]
    whole_blocks = BLOCK * (found["prefix"] // BLOCK) / found["prompt"]
    assert found["shared"]["hit_rate"] == pytest.approx(whole_blocks, abs=1e-4)
    assert found["unique"]["hit_rate"] == 0 and found["shared"]["hit_rate"] < found["possible_hit_rate"]
    assert found["shared"]["hit_rate_by_usage"] is None and not found["shared"]["foreign"]
    assert found["ttft_ratio"] < 1, "96 of 146 tokens are not computed again, 2 ms each"


def test_longer_prompts_take_longer(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(replace(BIG, prompt_s=0.001)) as server:
        lengths = measure(server, capsys, "lengths", repeats=2)["lengths"]
    assert all(each["ttft_ms"]["min"] >= each["prompt"] and each["ttft_ms"]["count"] == 2 for each in lengths)


def test_the_budget_ends_it_and_what_has_run_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(replace(BIG, prompt_s=0.01)) as server:
        bench_kv(server.base_url, deadline=60, budget=2, json=True)
    found = json.loads(capsys.readouterr().out)
    assert not found["complete"] and found["context"]["longest"] in (None, 300)
    assert set(found["not_run"].values()) == {"the budget of 2 s was used up"} and found["left"]["answers"]


def test_a_server_that_dies_meanwhile(capsys: pytest.CaptureFixture[str]) -> None:
    with KvServer(replace(BIG, dies_at=12)) as server, pytest.raises(EndpointError, match="stopped answering after"):
        bench_kv(server.base_url, deadline=0.5, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["context"]["longest"] == 300 and not found["left"]["answers"] and not found["complete"]


@pytest.mark.parametrize("model", ["wrong", "cut", "gone", "hanging", "silent", "whole"])
def test_a_server_that_cannot_be_measured_is_refused_in_time(model: str) -> None:
    with Misbehaving([model]) as server, pytest.raises(EndpointError) as caught:
        bench_kv(server.base_url, deadline=0.5)
    assert caught.value.hint


def test_a_server_that_is_deaf_is_refused_in_time() -> None:
    with KvServer(Knobs(is_deaf=True)) as server, pytest.raises(EndpointError, match="not answered in time"):
        bench_kv(server.base_url, deadline=0.5)


def test_a_key_with_few_requests_left_is_told() -> None:
    with Misbehaving(["good"], limit=4) as server, pytest.raises(EndpointError, match="refuses more requests"):
        bench_kv(server.base_url, deadline=1)


def test_ctrl_c_cancels_the_requests_and_tells_what_has_run() -> None:
    with KvServer(replace(BIG, capacity=100_000)) as server:
        command = [sys.executable, "-m", "loraport_cli", "bench", "kv", "--base-url", server.base_url, "--json"]
        process = subprocess.Popen(
            [*command, "--context", "300"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while len(server.holds) < 4 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err, err
        assert not server.holds and not server.waiting and server.cut >= 4
    found = json.loads(out)
    assert not found["complete"] and found["not_run"] == {"requests": "interrupted"} and found["left"]["answers"]
    assert found["context"]["longest"] == 300 and found["requests"][0]["at_once"] >= 2


def test_the_fake_engine_has_no_cache_to_speak_of(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    fake = [sys.executable, str(Path(__file__).with_name("fake_engine.py")), "--model", "m", "--port", str(port)]
    process = subprocess.Popen(
        [*fake, "--served-model-name", "base", "--max-model-len", "500"],
        env=dict(os.environ) | {"FAKE_TOKEN_S": "0.01"},
    )
    try:
        while not listens(process.pid) and process.poll() is None:
            time.sleep(0.02)
        bench_kv(f"http://127.0.0.1:{port}/v1", context="200", most=3, json=True)
    finally:
        process.terminate()
        process.wait()
    found = json.loads(capsys.readouterr().out)
    assert (found["context"]["longest"], found["context"]["ended_by"]) == (500, "failed"), "500 and none for a reply"
    assert found["capacity"]["reported"] is None and found["prefix_cache"]["shared"]["hit_rate"] is None
    assert found["requests"][0]["at_once"] == 3 and found["complete"]


def listens(pid: int) -> bool:
    """Whether a process has a port."""
    return any(one.status == psutil.CONN_LISTEN for one in psutil.Process(pid).net_connections())


def test_the_capacity_that_counts_is_the_one_in_tokens() -> None:
    label = 'block_size="16",num_gpu_blocks="100",cache_dtype="auto"'
    page = parse_page(f'vllm:cache_config_info{{{label},kv_cache_size_tokens="None"}} 1.0\n')
    assert page and page.capacity() == {
        "tokens": 1600,
        "engines": 1,
        "blocks": 100,
        "block_size": 16,
        "dtype": "auto",
        "prefix_caching": None,
        "read_from": "num_gpu_blocks × block_size",
    }
    two = "".join(
        f'vllm:cache_config_info{{{label},kv_cache_size_tokens="900",replica="{n}"}} 1.0\n'
        f'vllm:kv_cache_usage_perc{{replica="{n}"}} {n}\nvllm:num_requests_running{{replica="{n}"}} 3\n'
        for n in (0, 1)
    )
    page = parse_page(two + "vllm:num_requests_waiting_by_reason 7\n")
    assert page and (page.capacity() or {})["tokens"] == 1800
    assert (page.usage, page.total("running"), page.total("waiting")) == (0.5, 6, None)
    assert (
        parse_page("go_gc 1\n") is None and parse_page("") is None and parse_page("vllm:num_preemptions_total{") is None
    )


def test_pages_behind_a_key_are_not_there() -> None:
    with Misbehaving(["good"], key="sk-right") as server, Server(server.base_url) as known:
        assert known.metrics() == "" and known.counters() == {}


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        ("This model's maximum context length is 8192 tokens. However, you requested 9000", 8192),
        ("Input length (9000) exceeds the model's maximum context length (8192).", 8192),
        ("max_tokens=1 cannot be greater than max_model_len=8192", 8192),
        ("the request exceeds the available context size (8192 tokens)", 8192),
        ("it broke", None),
    ],
)
def test_limits_that_refusals_name(said: str, limit: int | None) -> None:
    assert named_limit(said) == limit


def test_guesses_narrow_down() -> None:
    known = {"longest": 1000, "first_refused": 1100, "ended_by": "refused"}
    assert next_guess(known, 1050, True) == 1050 and next_guess(known, 4000, True) == 1050
    assert next_guess(known, None, False) == 1050 and next_guess(known | {"first_refused": 1015}, None, False) is None
    assert next_guess(known | {"first_refused": 1001}, None, True) is None


def test_what_the_cache_ended_counts_before_what_it_did_not() -> None:
    one = {
        "did_not_fit": None,
        "tokens_in_flight": 900,
        "context": 9,
        "at_once": 3,
        "ended_by": "waiting",
        "at_least": False,
    }
    full = one | {"limited_by": "cache", "estimated": False}
    more = one | {"limited_by": "requests", "estimated": False, "tokens_in_flight": 950}
    assert observed([full, more]) == {
        "tokens": 900,
        "context": 9,
        "at_once": 3,
        "sign": "waiting",
        "did_not_fit": None,
        "at_least": False,
        "estimated": False,
    }
    assert (observed([more]) or {})["at_least"] and observed([one | {"tokens_in_flight": 0}]) is None


def test_contexts_as_people_write_them() -> None:
    assert parse_contexts("8k, 32768,8192") == (8192, 32768) and parse_contexts("") == ()
    for text in ("big", "8m", "3", "-8k"):
        with pytest.raises(UsageError, match="is no number of tokens"):
            parse_contexts(text)


@pytest.mark.parametrize("options", [{"part": ["all"]}, {"context": "x"}, {"out": Path("/nowhere/out.json")}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        bench_kv("http://127.0.0.1:1/v1", **options)
    assert caught.value.hint

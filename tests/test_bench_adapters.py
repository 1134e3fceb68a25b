"""`loraport bench adapters`: on the fake engine, which knows slots and host memory, and on servers that say nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from loraport.bench.environment import server_process
from loraport.bench.load import popularity
from loraport.bench.load.server import Server
from loraport.bench.load.stage import Load, Stage, Target
from loraport.bench.serving import adapters_server
from loraport.bench.serving.adapters import find_knee, jain, rank_groups
from loraport.bench.serving.adapters_cli import bench_adapters, parse_levels
from loraport.bench.serving.adapters_server import AdapterServer, Slots, flag_of, hint_of
from loraport.bench.serving.adapters_tiers import plan_tiers, resident_share
from loraport.bench.serving.caches import drop_files
from loraport.bench.serving.made import make_adapters, make_base
from loraport.clients.errors import AdapterError, EndpointError, UsageError
from tests.conftest import free_port
from tests.misbehaving import Misbehaving

FAKE = Path(__file__).with_name("fake_engine.py")
LOAD_S, MOVE_S = 0.04, 0.02
SMALL: dict[str, Any] = {"input_tokens": "8", "output_tokens": "3", "calibrate": False, "timeout": 20.0}
QUICK: dict[str, Any] = SMALL | {"rounds": 1, "concurrency": 2, "knee_rounds": 1, "probes": 1, "loads": 1}


@contextmanager
def fake_engine(folder: Path, adapters: int, environment: dict[str, str] | None = None) -> Iterator[str]:
    """A fake vLLM with so many adapters, 2 slots and 3 places in host memory; its base URL."""
    base, port = folder / "base", free_port()
    make_base("tiny", base)
    modules = []
    for made in make_adapters(base, folder / "adapters", adapters, rank=8, targets=("q_proj",)):
        (made / "loraport.json").write_text('{"golden": []}')
        modules.append(json.dumps({"name": made.name, "path": str(made)}))
    command = [sys.executable, str(FAKE), "--model", "m", "--served-model-name", "base", "--max-model-len", "1000"]
    command += ["--port", str(port), "--max-loras", "2", "--max-cpu-loras", "3", "--lora-modules", *modules]
    times = {"FAKE_LOAD_S": str(LOAD_S), "FAKE_MOVE_S": str(MOVE_S)}
    process = subprocess.Popen(command, env=dict(os.environ) | times | (environment or {}), stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NO_PROXY", "*")
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx.TransportError:
                    time.sleep(0.02)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the tests is no server with engines below it, though it may have started the session's."""

    def other(host: str, port: int) -> psutil.Process | None:
        found = server_process(host, port)
        return None if found and found.pid == os.getpid() else found

    monkeypatch.setattr(adapters_server, "server_process", other)


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine makes the client late; here it is believed all the same."""
    monkeypatch.setattr("loraport.bench.serving.measurement.judge", lambda *_: [])


def document_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON document on standard output."""
    return dict(json.loads(capsys.readouterr().out))


def test_zipf_is_the_true_law() -> None:
    found = popularity.zipf(["a", "b", "c", "d"], alpha=1)
    assert [share / found.shares[0] for share in found.shares] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert sum(found.shares) == pytest.approx(1)
    assert popularity.zipf(["a", "b"], alpha=0).shares == popularity.uniform(["a", "b"]).shares


def test_weights_of_a_file_are_ranked(tmp_path: Path) -> None:
    path = tmp_path / "weights.csv"
    path.write_text("# name,weight\nsmall,1\n\nwith,comma,2\nlarge , 5 # much\n")
    found = popularity.from_file(path)
    assert found.models == ["large", "with,comma", "small"] and found.shares == pytest.approx([5 / 8, 2 / 8, 1 / 8])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,1\nb", ":2: 'b' is no name with its weight"),
        ("a,0", ":1: 'a,0' is no name with its weight"),
        ("a,nan", "is no name with its weight"),
        (",3", "is no name with its weight"),
        ("a,1\na,2", ":2: a stands there twice"),
        ("# nothing\n", "names no adapter"),
    ],
)
def test_a_file_of_weights_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "weights.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"weights\.csv") as caught:
        popularity.from_file(path)
    assert message in caught.value.message and caught.value.hint


def test_requests_are_drawn_by_weight_whichever_process_sends_them() -> None:
    targets = [Target("http://x/v1", name) for name in "ab"]
    stage = Stage(0, "x", targets, Load("closed", 1), requests=1000, weights=[0.9, 0.1])
    drawn = [stage.target(number, seed=1).model for number in range(1000)]
    assert 850 < Counter(drawn)["a"] < 950
    again = Stage.parse(stage.to_json())
    assert [again.target(number, seed=1).model for number in range(1000)] == drawn
    assert [stage.target(number, seed=2).model for number in range(1000)] != drawn


def test_jains_index() -> None:
    assert jain([3, 3, 3]) == 1 and jain([1, 0, 0, 0]) == 0.25
    assert jain([1, None]) is None and jain([0, 0]) is None


def test_neighbouring_ranks_share_a_column_where_there_are_many() -> None:
    assert rank_groups(3) == [(1, 1), (2, 2), (3, 3)]
    assert rank_groups(20) == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 20)]


def test_the_knee_is_where_more_than_a_share_is_lost() -> None:
    ratios = ((1, 1.0, None), (2, 0.85, None), (4, 0.5, 0.7))
    levels = [{"adapters": count, "to_first": {"ratio": ratio, "high": high}} for count, ratio, high in ratios]
    assert find_knee(levels, 0.2) == ({"above": 2, "at": 4, "ratio": 0.5}, [])
    assert find_knee(levels, 0.1) == ({"above": 1, "at": 2, "ratio": 0.85}, [])
    assert find_knee(levels, 0.6) == (None, []) and find_knee([], 0.2) == (None, [])
    assert find_knee(levels, 0.4) == (None, [4]), "its interval reaches further"


def test_levels_of_the_knee() -> None:
    assert parse_levels(None, 12) == ([1, 2, 4, 8, 12], "")
    assert parse_levels(None, 1) == parse_levels("none", 12) == ([], "")
    levels, note = parse_levels("8,1,2", 4)
    assert levels == [1, 2] and "8 left out: there are 4 adapters" in note


@pytest.mark.parametrize(
    ("slots", "adapters", "others", "reason"),
    [
        (Slots(), 9, {"hot": 0}, "does not say max_loras: --max-loras tells it"),
        (Slots(2), 9, {"hot": 0}, "does not say max_cpu_loras: --max-cpu-loras tells it"),
        (Slots(2, 4), 5, {"hot": 0, "warm": 2, "cached": 4}, ""),
        (Slots(2, 4), 4, {"hot": 0, "warm": 2}, "all have a place in host memory (max_cpu_loras 4): it takes 5"),
        (Slots(2, 4), 2, {"hot": 0}, "all have a slot (max_loras 2): it takes 3"),
        (Slots(4, 4), 9, {"hot": 0, "cached": 4}, "host memory holds no more than the slots"),
    ],
)
def test_which_tiers_a_server_has(slots: Slots, adapters: int, others: dict[str, int], reason: str) -> None:
    found, missing = plan_tiers(slots, adapters)
    assert found == others and {*found, *missing, "disk"} == {"hot", "warm", "cached", "disk"}
    assert reason in " ".join(missing.values())


def test_behind_several_engines_nobody_knows_which_answers() -> None:
    found, missing = plan_tiers(Slots(2, 4), 9, engines=2)
    assert found == {} and set(missing) == {"hot", "warm", "cached", "disk"}


def test_a_file_in_the_page_cache_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 20))
    assert path.read_bytes() and resident_share(path) == 1
    drop_files([tmp_path])
    assert 0 <= resident_share(path) <= 1, "not every file system lets go"
    assert resident_share(tmp_path / "nowhere") == 1


def test_slots_in_a_command_line() -> None:
    line = ["vllm", "serve", "m", "--max-loras=4", "--max-cpu-loras", "16"]
    assert (flag_of(line, "max_loras"), flag_of(line, "max_cpu_loras")) == (4, 16)
    assert flag_of(["vllm", "--max-loras"], "max_loras") is flag_of([], "max_loras") is None


@pytest.mark.usefixtures("believed")
def test_all_of_it_on_an_engine_with_slots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    with fake_engine(tmp_path, adapters=4) as url:
        bench_adapters(url, zipf=1, out=out, json=True, **(QUICK | {"rounds": 3, "seed": 4, "knee": "1,2,4,64"}))
        left = httpx.get(f"{url}/models").json()["data"]
    found = document_of(capsys)
    assert found == json.loads(out.read_text()) and found["complete"]
    assert found["slots"]["max_loras"] == 2 and found["slots"]["max_cpu_loras"] == 3
    assert found["slots"]["sources"] == {"max_loras": "metrics", "max_cpu_loras": "command line"}
    load = found["load"]
    assert load["rounds"] == 3 and load["to_base"]["tokens_per_second"]["rounds"] == 3
    assert sum(rank["requests"] for rank in load["ranks"]) == load["adapters"]["requests"] == 48
    assert [rank["model"] for rank in load["ranks"]] == ["a0", "a1", "a2", "a3"]
    assert (
        load["ranks"][0]["requests"] > load["ranks"][3]["requests"] and 0 < load["fairness"]["jain_request_speed"] <= 1
    )
    assert [level["adapters"] for level in found["knee"]["levels"]] == [1, 2, 4]
    assert "64 left out" in found["workload"]["notes"][-1]
    tiers = found["tiers"]["tiers"]
    assert tiers["warm"]["ttft_ms"]["p50"] >= 1000 * MOVE_S and tiers["cached"]["ttft_ms"]["p50"] >= 1000 * LOAD_S
    assert tiers["disk"]["available"] or "stays in the page cache" in tiers["disk"]["reason"]
    assert tiers["hot"]["available"] and tiers["hot"]["load_ms"] is None
    assert found["loads"]["loads"] == 1 and found["loads"]["load_ms"]["p50"] >= 1000 * LOAD_S
    assert [card["id"] for card in left] == ["base", "a0", "a1", "a2", "a3"], "unloaded again"


@pytest.mark.usefixtures("believed")
def test_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_engine(tmp_path, adapters=4) as url:
        bench_adapters(url, rate=200, **QUICK)
    out = capsys.readouterr().out
    for words in (
        "slots: max_loras 2 (metrics), max_cpu_loras 3",
        "4 adapters, uniform, 200/s poisson",
        "latency by rank",
    ):
        assert words in out
    assert "warm, in host memory" in out and "1 load, files" in out and "the server has max_loras 2" in out
    assert "too few rounds for an interval" in out


@pytest.mark.usefixtures("believed")
def test_adapters_made_for_the_run_are_loaded_and_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = QUICK | {"knee": "none", "probes": 0, "loads": 0, "rank": 4}
    with fake_engine(tmp_path, adapters=1) as url:
        bench_adapters(url, make=2, base=tmp_path / "base", json=True, **options)
        cards = httpx.get(f"{url}/models").json()["data"]
    found = document_of(capsys)
    assert [name.split("-")[-1] for name in found["adapters"]] == ["a0", "a1"]
    assert found["load"]["adapters"]["answered"] and (found["knee"], found["tiers"], found["loads"]) == (None,) * 3
    assert [card["id"] for card in cards] == ["base", "a0"]


@pytest.mark.usefixtures("believed")
def test_what_a_server_does_not_say_is_not_available(capsys: pytest.CaptureFixture[str]) -> None:
    with Misbehaving(["good", "good-a", "good-b"]) as server:
        bench_adapters(server.base_url, json=True, **QUICK)
        bench_adapters(server.base_url, **QUICK)
    out = capsys.readouterr().out
    found, end = json.JSONDecoder().raw_decode(out)
    assert found["slots"]["max_loras"] is None and found["complete"]
    tiers = found["tiers"]["tiers"]
    assert not tiers["warm"]["available"] and "does not say max_loras" in tiers["warm"]["reason"]
    assert tiers["hot"]["available"] and "does not say where adapters lie" in found["loads"]["reason"]
    assert "max_loras not available" in out[end:] and "does not say how many slots" in out[end:]


def test_making_adapters_where_the_server_takes_none(tmp_path: Path) -> None:
    make_base("tiny", tmp_path / "base")
    with Misbehaving(["good"]) as server:
        with pytest.raises(EndpointError, match="does not change adapters while it runs") as caught:
            bench_adapters(server.base_url, make=1, base=tmp_path / "base", **QUICK)
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in caught.value.hint
        with pytest.raises(UsageError, match="has no adapters") as missing:
            bench_adapters(server.base_url, **QUICK)
    assert "--make" in missing.value.hint


def test_the_admin_key_goes_with_changes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPORT_ADMIN_KEY", "sk-admin")
    with fake_engine(tmp_path, adapters=1) as url, Server(url) as server:
        admin = AdapterServer(server)
        with pytest.raises(AdapterError, match=r"refuses to load b: .*No adapter found"):
            admin.load("b", "/nowhere")
        assert admin.folders() == {"a0": str(tmp_path / "adapters" / "a0")} and not admin.is_ours
        assert admin.base_folder(str(tmp_path / "base")) == tmp_path / "base"
        assert admin.base_folder("m") is None, "neither that nor --model is a folder"
        (seen,) = httpx.get(f"{url.removesuffix('/v1')}/seen").json()["requests"]
    assert {name.lower(): value for name, value in seen["headers"].items()}["authorization"] == "Bearer sk-admin"


def test_many_adapters_are_warmed_up_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["good", *(f"good-{number}" for number in range(9))]
    options = QUICK | {"knee": "none", "probes": 0, "loads": 0, "requests": 4}
    with Misbehaving(names) as server:
        bench_adapters(server.base_url, json=True, **options)
        asked = Counter(body["model"] for body in server.seen[:-8])
    assert set(asked) == set(names) and min(asked.values()) >= 2
    assert document_of(capsys)["load"]["popularity"]["adapters"] == 9
    with (
        Misbehaving([*names, "wrong-one"]) as server,
        pytest.raises(EndpointError, match=r"wrong-one at .* answered none"),
    ):
        bench_adapters(server.base_url, **options)


def test_the_hint_of_a_refusal_is_passed_on() -> None:
    told = httpx.Response(409, json={"error": {"message": "no", "hint": "unload one"}})
    assert hint_of(told) == "unload one" and hint_of(httpx.Response(500, text="?")) == "its log says more"


def test_an_adapter_that_begins_to_fail_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with Misbehaving(["good", "good-a", "good-b"], limit=80) as server, pytest.raises(EndpointError, match="stopped"):
        bench_adapters(server.base_url, json=True, **(QUICK | {"rounds": 20}))
    found = document_of(capsys)
    assert not found["complete"] and found["tiers"] is None
    errors = found["load"]["errors"]
    assert errors["by_model"] and {kind for kinds in errors["by_model"].values() for kind in kinds} == {"429"}
    assert errors["said"] == {"429": "too many"} and found["load"]["adapters"]["errors"] == {}


@pytest.mark.parametrize(
    "options",
    [
        {"zipf": -1.0},
        {"zipf": 1.0, "popularity": Path("x.csv")},
        {"popularity": Path("/nowhere.csv")},
        {"popularity": Path("x.csv"), "make": 2},
        {"make": 2, "adapter": ["good-a"]},
        {"make": 2},
        {"base": Path("base")},
        {"adapter": ["unknown"]},
        {"base_model": "unknown"},
        {"knee": "1,two"},
        {"knee": "7"},
        {"arrival": "sometimes"},
        {"out": Path("/nowhere/out.json")},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with Misbehaving(["good", "good-a"]) as server:
        with pytest.raises(UsageError) as caught:
            bench_adapters(server.base_url, **(QUICK | options))
        assert caught.value.hint and not server.seen


def test_ctrl_c_tells_what_has_run_and_unloads_what_was_made(tmp_path: Path) -> None:
    with fake_engine(tmp_path, adapters=1, environment={"FAKE_TOKEN_S": "0.01"}) as url:
        command = [
            sys.executable,
            "-m",
            "loraport_cli",
            "bench",
            "adapters",
            "--base-url",
            url,
            "--json",
            "--make",
            "2",
        ]
        command += ["--base", str(tmp_path / "base"), "--rounds", "900", "--no-calibrate", "--input", "8"]
        process = subprocess.Popen(
            [*command, "--output", "4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            if "round 3" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        cards = httpx.get(f"{url}/models").json()["data"]
    found = json.loads(out)
    assert process.returncode == 130 and not found["complete"] and len(found["slices"]) >= 4
    assert found["slices"][0]["figures"]["answered"] > 0
    assert [card["id"] for card in cards] == ["base", "a0"]
    assert children and not [child for child in children if child.is_running()]

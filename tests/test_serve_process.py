"""`loraport serve` with the fake engine: ready, stopping in every way, dying in every way, and nothing left behind."""

import json
import shutil
import signal
import socket
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from loraport.clients.endpoint import find_base_url, read_records
from loraport.clients.errors import AdapterError, BaseModelError, UsageError
from loraport.clients.home import Home
from loraport.serve import checks
from loraport.train.adapters import Adapter
from tests.adapters import make_tiny_adapter
from tests.serving import FAKE, Serving, all_gone, serving, wait_until

ENGINE = ("--engine-command", FAKE)


@pytest.fixture(scope="session")
def adapter_home(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A home with the adapter `demo`."""
    home = tmp_path_factory.mktemp("adapters")
    make_tiny_adapter(home, tiny_base, "demo")
    return home


@pytest.fixture
def stocked(home: Home, adapter_home: Path) -> Home:
    """A home of the test's own with the adapter `demo`."""
    shutil.copytree(adapter_home, home.root, dirs_exist_ok=True)
    return home


def test_ready_says_what_is_served_and_leaves_a_record(stocked: Home) -> None:
    with serving(stocked, "demo", *ENGINE, grandchild="1") as running:
        document = running.ready()
        assert document["base_url"] == f"http://127.0.0.1:{running.port}/v1"
        assert document["base"]["names"] == ["base", "tiny-base"]
        [adapter] = document["adapters"]
        assert (adapter["name"], adapter["version"], adapter["state"]) == ("demo", "v1", "verified")
        assert adapter["telling"] == 3 and document["context"] == 1024
        assert {"imports", "configuration", "weights"} <= document["phases"].keys()
        [record] = read_records(stocked)
        assert (record.models, record.adapters) == (["base", "tiny-base", "demo"], ["demo"])
        assert find_base_url(None, stocked) == document["base_url"]
        assert record.engine is not None and record.engine[0] == running.processes()[0].pid
        wait_until(lambda: "Ctrl-C stops it." in running.text, "the lines to copy")
        for line in ("curl ", "OpenAI(base_url=", "loraport aider", "aider --model openai/demo"):
            assert line in running.text
        [log] = stocked.logs.iterdir()
        assert stat.S_IMODE(log.stat().st_mode) == 0o600 and "Starting vLLM server" in log.read_text()
    assert not list(stocked.run.iterdir())


def test_base_alone(home: Home, tiny_base: Path) -> None:
    with serving(home, "--model", str(tiny_base), *ENGINE) as running:
        assert running.ready()["adapters"] == []
    assert running.process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["starting", "ready"])
def test_signals_end_everything(stocked: Home, number: signal.Signals, when: str) -> None:
    running = Serving(stocked, "demo", *ENGINE, grandchild="1", start_s="0" if when == "ready" else "600")
    if when == "ready":
        running.ready()
    wait_until(lambda: len(running.processes()) == 3, "guard, engine and grandchild")
    processes = running.processes()
    running.process.send_signal(number)
    assert running.end() == 0
    assert all_gone(processes) and not list(stocked.run.iterdir())


def test_an_engine_that_ignores_sigterm_is_ended_all_the_same(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, ignore_sigterm="1", grandchild="1")
    running.ready()
    processes = running.processes()
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0 and all_gone(processes)


def test_kill_9_of_serve_leaves_nothing(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, grandchild="1")
    running.ready()
    processes = running.processes()
    assert len(processes) == 3
    running.process.kill()
    running.end()
    assert all_gone(processes)
    with serving(stocked, "demo", *ENGINE, port=running.port) as again:
        again.ready()
        assert len(read_records(stocked)) == 1


def test_kill_9_of_guard_and_serve_is_cleaned_up_by_the_next_start(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, ignore_sigterm="1", grandchild="1")
    running.ready()
    processes = running.processes()
    running.process.kill()
    running.end()
    processes[0].kill()
    left = [process for process in processes[1:] if process.is_running()]
    assert left, "the engine ignores SIGTERM: it must still be there"
    with serving(stocked, "demo", *ENGINE, port=running.port) as again:
        again.ready()
        assert "that an earlier `loraport serve` left behind" in again.text
        assert all_gone(processes)


def test_kill_9_of_the_guard_alone_is_an_error_that_cleans_up(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, ignore_sigterm="1", grandchild="1")
    running.ready()
    processes = running.processes()
    processes[0].kill()
    assert running.end() == 3 and all_gone(processes)
    assert not list(stocked.run.iterdir())


def test_an_engine_that_dies_while_serving(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE)
    document = running.ready()
    with pytest.raises(httpx.HTTPError):
        httpx.post(document["base_url"].removesuffix("/v1") + "/die", json={})
    assert running.end() == 3
    assert "RuntimeError: the fake was told to die" in running.text
    assert "error: the engine stopped with status 9 while serving." in running.text
    assert not list(stocked.run.iterdir())


@pytest.mark.parametrize(
    ("phase", "words", "sentence", "hint"),
    [
        ("weights", "RuntimeError: the shard is broken", "during start-up (weights).", "all it said is in"),
        (
            "KV cache",
            "ValueError: To serve at least one request with the model's max seq len (40960), (5.62 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (1.50 GiB). Based on the available memory, "
            "the estimated maximum model length is 10928. Try increasing `gpu_memory_utilization`",
            "a context of 40960 tokens needs 5.62 GiB of KV cache",
            "--context 10928",
        ),
    ],
)
def test_an_engine_that_dies_during_start(stocked: Home, phase: str, words: str, sentence: str, hint: str) -> None:
    running = Serving(stocked, "demo", *ENGINE, crash=phase, last_words=words)
    assert running.end() == 3
    assert sentence in running.text and hint in running.text and f"  | {words[:60]}" in running.text
    assert "Traceback" not in running.text and not list(stocked.run.iterdir())


def test_an_engine_that_cannot_be_started(stocked: Home) -> None:
    running = Serving(stocked, "demo", "--engine-command", "/nowhere/python -m vllm")
    assert running.end() == 3
    assert "there is no program /nowhere/python." in running.text


def test_busy_port_names_its_holder(stocked: Home) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        running = Serving(stocked, "demo", *ENGINE, port=port)
        assert running.end() == 3
    me = psutil.Process()
    assert f"error: port {port} is in use by process {me.pid} ({me.name()})." in running.text
    assert "--port " in running.text


def test_a_port_that_another_serve_holds(stocked: Home) -> None:
    with serving(stocked, "demo", *ENGINE) as first:
        first.ready()
        second = Serving(stocked, "demo", *ENGINE, port=first.port)
        assert second.end() == 3
        assert f"is in use by process {first.process.pid} (loraport serve)." in second.text
        assert read_records(stocked) and first.process.poll() is None


def test_loaded_but_not_applied(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, replies="base")
    assert running.end() == 3
    assert "error: the adapter demo is loaded but not applied" in running.text
    assert not list(stocked.run.iterdir())


def test_replies_unlike_training(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, replies="garbage")
    assert running.end() == 3
    assert "error: the adapter demo does not answer as it did in training (prompt 1, token 1)." in running.text
    assert "expected: " in running.text and "got:      '????" in running.text


def test_the_older_wording_is_timed_too(stocked: Home) -> None:
    with serving(stocked, "demo", *ENGINE, wording="0.25", start_s="1") as running:
        phases = running.ready()["phases"]
    assert {"compilation", "profiling", "KV cache", "graph capture", "warm-up", "front end"} <= phases.keys()


def test_flags_after_the_dashes_reach_the_engine(stocked: Home) -> None:
    with serving(stocked, "demo", *ENGINE, "--", "--max-log-len", "7") as running:
        running.ready()
        assert running.processes()[1].cmdline()[-2:] == ["--max-log-len", "7"]


def change(path: Path, **values: object) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def damage_weights(folder: Path) -> None:
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_weights, "is cut off:"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors."),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json."),
        (lambda folder: (folder / "loraport.json").unlink(), "has no loraport.json."),
        (lambda folder: change(folder / "adapter_config.json", use_dora=True), "uses DoRA, which vLLM does not serve."),
        (lambda folder: change(folder / "adapter_config.json", bias="all"), "uses bias='all'"),
        (lambda folder: change(folder / "adapter_config.json", modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda folder: change(folder / "adapter_config.json", init_lora_weights="pissa"), "initialisation pissa"),
        (lambda folder: change(folder / "adapter_config.json", peft_type="IA3"), "the PEFT type IA3"),
        (lambda folder: change(folder / "adapter_config.json", r=1024), "has rank 1024; vLLM takes 1 to 512."),
    ],
)
def test_adapters_that_cannot_be_served(stocked: Home, damage: Callable[[Path], None], message: str) -> None:
    damage(stocked.adapters / "demo" / "v1")
    with pytest.raises(AdapterError) as caught:
        checks.open_adapters(stocked, ["demo"], (0, 32))
    assert message in caught.value.message and caught.value.hint


def test_patterns_are_refused_where_vllm_ignores_them(stocked: Home) -> None:
    change(stocked.adapters / "demo" / "v1" / "adapter_config.json", rank_pattern={"q_proj": 4})
    assert checks.open_adapters(stocked, ["demo"], (0, 32))
    with pytest.raises(AdapterError, match=r"which vLLM 0\.25 ignores"):
        checks.open_adapters(stocked, ["demo"], (0, 25))


def test_a_refusal_starts_nothing(stocked: Home) -> None:
    damage_weights(stocked.adapters / "demo" / "v1")
    running = Serving(stocked, "demo", *ENGINE)
    assert running.end() == 3
    assert "is cut off:" in running.text and "\nhint: " in running.text
    assert not stocked.logs.exists() and not stocked.run.exists()


def test_names_and_stop_tokens(stocked: Home, tiny_base: Path) -> None:
    [adapter] = checks.open_adapters(stocked, ["demo"], (0, 32))
    base = checks.find_base(None, [adapter])
    assert checks.name_base(base, [adapter]) == ("base", "tiny-base")
    assert checks.name_base(replace(base, model="org/demo", revision="abc"), [adapter]) == ("base", "org/demo")
    assert checks.stop_token_config(base, [adapter]) is None
    needs = Adapter(adapter.folder, adapter.manifest.model_copy(update={"stop_tokens": [2, 9]}))
    config = checks.stop_token_config(base, [needs])
    assert config is not None and config["eos_token_id"] == [0, 2, 9]
    with pytest.raises(UsageError, match="two of the adapters are called demo"):
        checks.open_adapters(stocked, ["demo", "demo@v1"], (0, 32))
    with pytest.raises(UsageError, match="too short to verify demo"):
        checks.check_golden_fit([adapter], 16)


def test_a_base_that_is_gone(stocked: Home) -> None:
    [adapter] = checks.open_adapters(stocked, ["demo"], (0, 32))
    gone = adapter.manifest.base.model_copy(update={"path": "/nowhere"})
    with pytest.raises(BaseModelError, match="there is no folder /nowhere"):
        checks.find_base(None, [Adapter(adapter.folder, adapter.manifest.model_copy(update={"base": gone}))])
    with pytest.raises(UsageError, match="nothing to serve"):
        checks.find_base(None, [])


def test_an_adapter_of_another_base_says_what_differs(stocked: Home, tiny_base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    change(other / "config.json", rope_theta=5000)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    running = Serving(stocked, "demo", "--model", str(other), *ENGINE)
    assert running.end() == 3
    assert f"was trained on another base than {other}: its config.json and its chat template differ." in running.text

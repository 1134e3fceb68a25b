"""`loraport serve` with the fake engine: ready, stopping in every way, dying in every way, and nothing left behind."""

import errno
import json
import os
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from loraport.clients.endpoint import find_base_url, read_records
from loraport.clients.errors import AdapterError, BaseModelError, ResourceError, UsageError
from loraport.clients.home import Home
from loraport.serve import checks
from loraport.serve.plan.settings import Wanted
from loraport.serve.serve import Request, serve
from loraport.train.adapters import Adapter
from tests.adapters import make_tiny_adapter
from tests.conftest import free_port
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


def test_models_that_get_each_others_weights_in_a_batch(stocked: Home) -> None:
    """Alone base and adapter answer as recorded: only asking both at once can tell."""
    running = Serving(stocked, "demo", *ENGINE, replies="mixed")
    assert running.end() == 3
    assert "error: requests for base get the weights of another model when they are computed" in running.text
    assert "alone:    " in running.text and "together: " in running.text and not list(stocked.run.iterdir())


def test_ctrl_c_while_everything_is_asked_at_once(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, crowd_s="100")
    wait_until(lambda: len(running.processes()) == 2, "guard and engine")
    engine = running.processes()[1]
    wait_until(lambda: engine.num_threads() > 4, "the engine is asked several things")
    began = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 0 and time.monotonic() - began < 30
    assert all_gone([engine]) and not list(stocked.run.iterdir())


def test_a_base_that_was_trained_on_in_4_bits_is_no_mix_up(stocked: Home) -> None:
    with serving(stocked, "demo", *ENGINE, replies="other base") as running:
        assert running.ready()["adapters"][0]["state"] == "verified"


def test_the_template_is_told_what_training_told_it(stocked: Home) -> None:
    manifest = stocked.adapters / "demo" / "v1" / "loraport.json"
    change(manifest, chat_template_kwargs={"enable_thinking": False})
    with serving(stocked, "demo", *ENGINE) as running:
        plan = running.ready()["plan"]
        assert plan["chat template"] == {"value": "thinking off", "reason": "as in training"}
        assert "chat template" in running.text
    running = Serving(stocked, "demo", *ENGINE, "--", "--default-chat-template-kwargs", '{"enable_thinking": true}')
    assert running.end() == 3
    assert "error: the engine renders messages for demo differently than training did (prompt 1, tok" in running.text
    assert "trained: " in running.text and ", 7]" in running.text


def test_adapters_with_different_templates_are_not_served_together(stocked: Home) -> None:
    [adapter] = checks.open_adapters(stocked, ["demo"], (0, 32))
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}, "name": "other"}
    other = Adapter(adapter.folder, adapter.manifest.model_copy(update=kwargs))
    checks.check_template_kwargs([adapter, adapter])
    with pytest.raises(UsageError, match="demo and other were trained with different settings of the chat") as caught:
        checks.check_template_kwargs([adapter, other])
    assert "two ports" in caught.value.hint


def test_a_template_that_prints_dates_only_warns(stocked: Home, tiny_base: Path, tmp_path: Path) -> None:
    dated = shutil.copytree(tiny_base, tmp_path / "dated")
    template = dated / "chat_template.jinja"
    template.write_text(template.read_text() + "{# strftime_now #}")
    [adapter] = checks.open_adapters(stocked, ["demo"], (0, 32))
    manifest = json.loads((adapter.folder / "loraport.json").read_text())
    manifest["base"] = checks.identify(replace(checks.find_base(None, [adapter]), folder=dated)).model_dump()
    change(adapter.folder / "loraport.json", **manifest)
    more = ("--", "--default-chat-template-kwargs", '{"x": true}')
    with serving(stocked, "demo", "--model", str(dated), *ENGINE, *more) as running:
        assert running.ready()["adapters"][0]["state"] == "verified"
        assert "warning: prompts of demo differ from those in training: its template prints dates." in running.text


def test_an_engine_that_lists_other_models(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, hide="demo")
    assert running.end() == 3
    assert "error: the engine is up, but " in running.text
    assert "/v1/models answers base, tiny-base instead of base, tiny-base, demo." in running.text


def test_a_port_after_the_dashes_is_refused_at_once(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, "--", "--port", "9000")
    assert running.end() == 2
    assert "error: --port cannot be given to the engine after `--`" in running.text


def test_hosts_and_keys(stocked: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        assert checks.open_to_others(host) == ()
    for host in ("0.0.0.0", "::", "", "192.168.1.4", "no.such.host.invalid"):
        [warning] = checks.open_to_others(host)
        assert "anybody who reaches the port can use the models" in warning
    with serving(stocked, "demo", "--host", "0.0.0.0", *ENGINE) as running:
        assert any("anybody who reaches the port" in warning for warning in running.ready()["warnings"])
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    [warning] = checks.open_to_others("127.0.0.1")
    assert "VLLM_API_KEY is ignored" in warning
    refused = Serving(stocked, "demo", "--host", "0.0.0.0", *ENGINE)
    assert refused.end() == 2
    assert "error: VLLM_API_KEY is set, but `loraport serve` asks for no key" in refused.text


@pytest.mark.parametrize(
    ("command", "reason"), [("'", "no closing quotation."), ("", "is blank."), ("  ", "is blank.")]
)
def test_an_engine_command_that_is_none(stocked: Home, command: str, reason: str) -> None:
    running = Serving(stocked, "demo", "--engine-command", command)
    assert running.end() == 2
    assert "error: --engine-command" in running.text and reason in running.text and "Traceback" not in running.text


def request_demo(port: int) -> Request:
    """`loraport serve demo` with the fake engine."""
    return Request(["demo"], None, "127.0.0.1", port, Wanted(), FAKE, [], False)


def test_a_full_disk_is_refused_before_anything_starts(stocked: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(stocked.root)._replace(free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(ResourceError, match=r"the engine needs 64 MiB on disk, .* has 5 MiB free"):
        serve(request_demo(free_port()), stocked)
    assert not stocked.logs.exists() and not stocked.run.exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_home_that_cannot_be_written_is_refused(stocked: Home, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Root may write anywhere, so the refusal is the operating system's words, not its deed."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ResourceError, match=r"no permission while making .*logs"):
        serve(request_demo(free_port()), stocked)
    assert not stocked.logs.exists() and not stocked.run.exists()


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


def test_damaged_stop_tokens_of_a_base_are_not_ignored(stocked: Home, tiny_base: Path, tmp_path: Path) -> None:
    [adapter] = checks.open_adapters(stocked, ["demo"], (0, 32))
    damaged = shutil.copytree(tiny_base, tmp_path / "damaged")
    base = replace(checks.find_base(None, [adapter]), folder=damaged)
    (damaged / "generation_config.json").write_text('{"eos_token_id": [0')
    with pytest.raises(BaseModelError, match=r"generation_config\.json cannot be read"):
        checks.stop_token_config(base, [adapter])
    (damaged / "generation_config.json").unlink()
    assert checks.stop_token_config(base, [adapter]) == {"eos_token_id": [0, 2]}


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

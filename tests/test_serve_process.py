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
from loraport.serve.engine.connect import connect, socket_path
from loraport.serve.gateway.keys import create
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
        assert "POST" not in (stocked.logs / f"gateway-{running.port}.log").read_text()
        [log] = stocked.logs.glob("serve-*.log")
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


def test_kill_9_of_the_guard_alone_cleans_up_and_starts_again(stocked: Home) -> None:
    with serving(stocked, "demo", *ENGINE, ignore_sigterm="1", grandchild="1") as running:
        running.ready()
        processes = running.processes()
        processes[0].kill()
        wait_until(lambda: "the engine is ready again" in running.text, "another engine")
        assert all_gone(processes)
        assert "the engine lost its guard, which was killed by signal 9, while serving." in running.text
    assert not list(stocked.run.iterdir())


def test_an_engine_that_dies_while_serving(stocked: Home) -> None:
    with serving(stocked, "demo", *ENGINE) as running:
        url = running.ready()["base_url"]
        running.processes()[1].kill()
        wait_until(lambda: "the engine is ready again" in running.text, "another engine")
        assert "the engine was killed by signal 9 while serving. It is started again (1 of 2)." in running.text
        listed = {model["id"]: model for model in httpx.get(f"{url}/models").json()["data"]}
        assert listed["demo"]["verified"] and listed["demo"]["version"] == "v1"
        body = {"model": "demo", "messages": [{"role": "user", "content": "a b"}], "max_tokens": 2}
        assert httpx.post(f"{url}/chat/completions", json=body).status_code == 200
    assert not list(stocked.run.iterdir())


def test_an_engine_that_dies_again_and_again(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE)
    url = running.ready()["base_url"]
    for number in (1, 2, 3):
        running.processes()[1].kill()
        said = f"{number} of 2" if number < 3 else "requests are answered with 503"
        wait_until(lambda said=said: said in running.text, said)  # type: ignore[misc]
        wait_until(lambda number=number: number == 3 or running.text.count("ready again") == number, "it is back")  # type: ignore[misc]
    answer = httpx.get(f"{url}/models")
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "60"
    assert "signal 9 while serving; it ended 3 times without 10 minutes of service" in answer.text
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 3 and not list(stocked.run.iterdir())


def test_the_port_answers_before_the_engine_does(stocked: Home) -> None:
    with serving(stocked, "demo", *ENGINE, start_s="600") as running:
        wait_until(lambda: len(running.processes()) == 2, "guard and engine")
        answer = httpx.post(f"http://127.0.0.1:{running.port}/v1/chat/completions", json={})
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
        error = answer.json()["error"]
        assert error["phase"] == "starting" and "The engine is starting" in error["message"]


def test_sigterm_lets_requests_end_and_takes_no_more(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, token_s="0.2")
    url = running.ready()["base_url"]
    body = {"model": "demo", "messages": [{"role": "user", "content": "a b"}], "max_tokens": 10, "stream": True}
    with httpx.stream("POST", f"{url}/chat/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "waiting up to 30 s for 1 request" in running.text, "it drains")
        late = httpx.post(f"{url}/chat/completions", json=body)
        assert late.status_code == 503 and late.json()["error"]["phase"] == "draining"
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert running.end() == 0 and not list(stocked.run.iterdir())


def test_without_arguments_it_serves_what_the_port_served_last(stocked: Home) -> None:
    with serving(stocked, "demo", *ENGINE) as running:
        running.ready()
    with serving(stocked, *ENGINE, port=running.port) as again:
        assert [adapter["name"] for adapter in again.ready()["adapters"]] == ["demo"]
    never = Serving(stocked, *ENGINE)
    assert never.end() == 2 and "nothing to serve" in never.text


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


def test_a_terminal_that_closes_ends_nothing_that_was_told_to_stay(stocked: Home) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with serving(stocked, "demo", *ENGINE) as running:
            running.ready()
            running.process.send_signal(signal.SIGHUP)
            time.sleep(1)
            assert running.process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_merged_adapter_is_served_alone(stocked: Home) -> None:
    both = Serving(stocked, "demo", "--merge", "demo", *ENGINE)
    assert both.end() == 2 and "serves that adapter alone" in both.text


def test_a_port_that_another_serve_holds(stocked: Home) -> None:
    with serving(stocked, "demo", *ENGINE) as first:
        first.ready()
        second = Serving(stocked, "demo", *ENGINE, port=first.port)
        assert second.end() == 3
        assert f"is in use by process {first.process.pid} (loraport serve)." in second.text
        with pytest.raises(ResourceError, match=f"in use by process {first.process.pid}"):
            checks.check_port("127.0.0.2", first.port, stocked)  # free there, but its files are those of this port
        assert read_records(stocked) and first.process.poll() is None


def test_loaded_but_not_applied(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, replies="base")
    assert running.end() == 3
    assert "error: the adapter demo@v1 is loaded but not applied" in running.text
    assert not list(stocked.run.iterdir())


def test_replies_unlike_training(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, replies="garbage")
    assert running.end() == 3
    assert "error: the adapter demo@v1 does not answer as it did in training (prompt 1, token 1)." in running.text
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
        assert plan["chat template"] == {"value": "thinking off for demo", "reason": "as in training"}
        assert "chat template" in running.text
        listed = httpx.get(f"http://127.0.0.1:{running.port}/v1/models").json()["data"]
        for model in [entry["id"] for entry in listed]:
            ask(running.port, model)
        with connect(socket_path(stocked, running.port)) as client:
            bodies = [json.loads(request["body"]) for request in client.get("/seen").json()["requests"]]
    [base, demo] = [body for body in bodies if body.get("max_tokens") == 3]
    assert "chat_template_kwargs" not in base, "the base keeps its own"
    assert demo["model"] == "demo@v1" and demo["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_template_that_is_told_something_else_is_noticed(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, "--", "--default-chat-template-kwargs", '{"enable_thinking": true}')
    assert running.end() == 3
    assert "error: the engine renders messages for demo@v1 differently than training did (prompt 1, tok" in running.text
    assert "trained: " in running.text and ", 7]" in running.text


def ask(port: int, model: str) -> httpx.Response:
    """Three tokens of a chat."""
    body = {"model": model, "messages": [{"role": "user", "content": "a b"}], "max_tokens": 3}
    return httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)


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
        words = "warning: prompts of demo@v1 differ from those in training: its template prints dates."
        wait_until(lambda: words in running.text, words)


def test_an_engine_that_lists_other_models(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, hide="tiny-base")
    assert running.end() == 3
    assert "error: the engine is up, but lists base instead of base, tiny-base." in running.text


def test_a_port_after_the_dashes_is_refused_at_once(stocked: Home) -> None:
    running = Serving(stocked, "demo", *ENGINE, "--", "--port", "9000")
    assert running.end() == 2
    assert "error: --port cannot be given to the engine after `--`" in running.text


def test_hosts_and_keys(stocked: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        assert checks.open_to_others(host, stocked) == ()
    for host in ("0.0.0.0", "::", "", "192.168.1.4", "no.such.host.invalid"):
        with pytest.raises(UsageError, match="can be reached by others, and there is no API key yet"):
            checks.open_to_others(host, stocked)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    [warning] = checks.open_to_others("127.0.0.1", stocked)
    assert "VLLM_API_KEY is ignored" in warning
    refused = Serving(stocked, "demo", "--host", "0.0.0.0", *ENGINE)
    assert refused.end() == 2 and "hint: make one, which is shown once: loraport keys create NAME" in refused.text
    text, _ = create(stocked.root / "keys.json", "laptop")
    with serving(stocked, "demo", "--host", "0.0.0.0", *ENGINE) as running:
        url = running.ready()["base_url"]
        assert httpx.get(f"{url}/models").status_code == 401
        listed = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {text}"})
        assert [model["id"] for model in listed.json()["data"]] == ["base", "demo"]


@pytest.mark.parametrize(
    ("command", "reason"), [("'", "no closing quotation."), ("", "is blank."), ("  ", "is blank.")]
)
def test_an_engine_command_that_is_none(stocked: Home, command: str, reason: str) -> None:
    running = Serving(stocked, "demo", "--engine-command", command)
    assert running.end() == 2
    assert "error: --engine-command" in running.text and reason in running.text and "Traceback" not in running.text


def request_demo(port: int) -> Request:
    """`loraport serve demo` with the fake engine."""
    return Request(["demo"], None, "127.0.0.1", port, Wanted(), FAKE, [], json=False, drain_s=0)


def test_a_full_disk_is_refused_before_anything_starts(stocked: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(stocked.root)._replace(free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(ResourceError, match=r"the engine needs 64 MiB on disk, .* has 5 MiB free"):
        serve(request_demo(free_port()), stocked)
    assert not list(stocked.logs.glob("serve-*")) and not stocked.run.exists()


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
    change(stocked.adapters / "demo" / "v1" / "adapter_config.json", alpha_pattern={"q_proj": 4})
    assert checks.open_adapters(stocked, ["demo"], (0, 32))
    with pytest.raises(AdapterError, match=r"which vLLM 0\.25 ignores"):
        checks.open_adapters(stocked, ["demo"], (0, 25))


def test_a_refusal_starts_nothing(stocked: Home) -> None:
    damage_weights(stocked.adapters / "demo" / "v1")
    running = Serving(stocked, "demo", *ENGINE)
    assert running.end() == 3
    assert "is cut off:" in running.text and "\nhint: " in running.text
    assert not list(stocked.logs.glob("serve-*")) and not stocked.run.exists()


def test_names(stocked: Home, tiny_base: Path) -> None:
    [adapter] = checks.open_adapters(stocked, ["demo"], (0, 32))
    base = checks.find_base(None, [adapter])
    assert checks.name_base(base, [adapter]) == ("base", "tiny-base")
    assert checks.name_base(replace(base, model="org/demo", revision="abc"), [adapter]) == ("base", "org/demo")
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

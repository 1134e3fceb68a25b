"""Adapters loaded, replaced, rolled back and unloaded while a gateway serves them; the engine is the fake one."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraport.clients.errors import (
    AdapterError,
    EndpointError,
    EngineError,
    ResourceError,
    UsageError,
    VerificationError,
)
from loraport.clients.home import Home
from loraport.serve import checks
from loraport.serve.adapters.catalog import Catalog, open_reference, require_unchanged
from loraport.serve.adapters.live import Live
from loraport.serve.adapters.loading import GUARD, make_zeros
from loraport.serve.gateway.app import create_app
from loraport.serve.gateway.server import Running, run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState, Model, Phase
from loraport.serve.plan.settings import Plan
from loraport.train.adapters import Adapter
from loraport.train.base_model import Base, identify
from loraport.train.manifest import DataCounts, Golden, Manifest, Reply
from tests.adapters import PROMPTS
from tests.gateway import CHAT, CONTEXT, FakeEngine, asking
from tests.serving import wait_until
from tests.test_adapters_accept import CONFIG, base, write_adapter

V32 = (0, 32)
PLAN = Plan(CONTEXT, 4, slots=3, rank=8, dtype="float32", kv_bytes=1, share=None)
ON_GPU = replace(PLAN, kv_bytes=None, share=0.9, slots=1)
__all__ = ["base"]  # a fixture


def write_version(home: Home, base: Base, version: str, name: str = "demo", token: int = 5, **more: Any) -> Path:
    """A version in the home, whose replies begin with `token`."""
    folder = write_adapter(home.adapters / name / version)
    replies = {
        who: Reply(tokens=[first, 8], logprobs=[-0.5, -0.5], margins=[2, 2], text=who, stopped=True)
        for who, first in (("adapter", token), ("base", 9))
    }
    golden = [
        Golden(messages=[{"role": "user", "content": text}], prompt_tokens=[number, 4], **replies)
        for number, text in enumerate(PROMPTS)
    ]
    fields: dict[str, Any] = {
        "name": name,
        "version": version,
        "created": "2026-01-01T00:00:00+00:00",
        "fingerprint": "0",
        "base": identify(base),
        "base_dtype": "float32",
        "rank": 4,
        "alpha": 8,
        "target_modules": ["q_proj"],
        "trainable_parameters": 256,
        "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "max_lora_rank": 8,
        "stop_tokens": [],
        "chat_template_kwargs": {},
        "run": {},
        "metrics": {},
        "versions": {},
        "data": DataCounts(files=[], sha256="", rows=0, tokens=0, trained_tokens=0, eval_rows=0),
        "golden": golden,
    }
    Manifest(**(fields | more)).write(folder)
    return folder


@dataclass
class Bench:
    """A Live on an engine behind a gateway."""

    engine: FakeEngine
    state: EngineState
    live: Live
    running: Running
    client: httpx.Client

    def knob(self, **knobs: str) -> None:
        """Set knobs of the engine while it runs."""
        self.engine.client.post("/knob", json={name.upper(): value for name, value in knobs.items()})

    def asked(self, model: str) -> str | None:
        """What the engine is asked for where a client asks for `model`; None where there is no such model."""
        answer = self.client.post(CHAT, json=asking(model=model))
        return str(answer.json()["model"]) if answer.status_code == 200 else None

    def loaded(self) -> list[str]:
        """Adapters that the engine knows."""
        cards = self.engine.client.get("/v1/models").json()["data"]
        return [card["id"] for card in cards if card["id"] not in ("base", GUARD)]

    def listed(self) -> dict[str, Any]:
        """GET /v1/models, by id, without the base."""
        cards = self.client.get("/v1/models").json()["data"]
        return {card["id"]: card for card in cards if card["kind"] == "adapter"}

    def slots(self) -> list[str | None]:
        """What is in the engine's slots."""
        return list(self.engine.client.get("/slots").json()["slots"])


@contextlib.contextmanager
def bench(home: Home, base: Base, plan: Plan = PLAN, **knobs: str) -> Iterator[Bench]:
    """A bench whose engine has no adapter yet."""
    engine, state = FakeEngine(called=("base",), slots=plan.slots, **knobs), EngineState()
    try:
        state.ready([Model("base", max_model_len=CONTEXT, aliases=("tiny",))], engine.url)
        app = create_app(state, GatewaySettings("127.0.0.1", 0, home.root / "keys.json"))
        with (
            run_in_thread(app, "127.0.0.1", 0) as running,
            httpx.Client(base_url=running.url, trust_env=False, timeout=60) as client,
        ):
            live = Live(state, home, base, "base", plan, V32, in_flight=running.in_flight)
            live.connect(engine.client)
            running.gateway.adapters = live
            yield Bench(engine, state, live, running, client)
    finally:
        engine.end()


def adapter(home: Home, reference: str) -> Adapter:
    return open_reference(home, reference, V32)


def test_an_adapter_on_linears_without_slots_is_refused(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    with bench(home, base, replace(PLAN, targets=("v_proj",))) as made:
        with pytest.raises(AdapterError, match="has weights for q_proj, and this engine has no slots for them"):
            made.live.load("demo")
        assert made.loaded() == []
    with bench(home, base, replace(PLAN, targets=("q_proj", "v_proj"))) as made:
        made.live.load("demo")
        assert made.loaded() == ["demo@v1"]


def test_a_version_is_loaded_proven_and_named(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    with bench(home, base) as at:
        loaded = at.live.load("demo")
        assert (loaded.engine_name, loaded.verified.state, loaded.verified.prompts) == ("demo@v1", "verified", 3)
        card = at.listed()["demo"]
        assert (card["version"], card["verified"], card["parent"]) == ("v1", True, "base")
        assert {at.asked(name) for name in ("demo", "demo:latest", "demo@v1")} == {"demo@v1"}
        assert at.asked("demo:prev") is None and at.asked("base") == "base"
        [entry] = at.live.listing()
        assert (entry["name"], entry["state"], entry["prev"]) == ("demo", "verified", None)
        assert Catalog(home).registered().references == ("demo@v1",)


def test_another_version_takes_over_and_a_rollback_goes_back(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    with bench(home, base) as at:
        at.live.load("demo")
        write_version(home, base, "v2", token=6)
        assert at.live.load("demo").engine_name == "demo@v2"
        assert [at.asked(name) for name in ("demo", "demo:prev", "demo@v1")] == ["demo@v2", "demo@v1", "demo@v1"]
        assert set(at.listed()) == {"demo", "demo@v1"} and at.live.listing()[0]["prev"] == "v1"
        assert at.live.rollback("demo").engine_name == "demo@v1"
        assert [at.asked(name) for name in ("demo", "demo:prev")] == ["demo@v1", "demo@v2"]
        assert Catalog(home).registered().references == ("demo@v1",)
        assert at.live.rollback("demo").engine_name == "demo@v2"


def test_a_load_that_fails_leaves_all_as_it_was(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    with bench(home, base, wrong="demo@v2") as at:
        at.live.load("demo")
        before = at.listed(), at.live.listing(), Catalog(home).registered(), Catalog(home).aliases("demo")
        write_version(home, base, "v2", token=6)
        with pytest.raises(
            VerificationError, match="demo@v2 is loaded but not applied: the engine answers as the base"
        ):
            at.live.load("demo")
        at.knob(wrong="", refuse="demo@v2")
        with pytest.raises(
            AdapterError, match=r"the engine refuses the adapter demo@v2: .* LoRA rank 64 is greater than"
        ):
            at.live.load("demo")
        assert (at.listed(), at.live.listing(), Catalog(home).registered(), Catalog(home).aliases("demo")) == before
        assert at.loaded() == ["demo@v1"] and at.asked("demo") == "demo@v1"


def test_a_stream_is_not_interrupted_and_its_version_stays_until_it_ends(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    write_version(home, base, "v2", token=6)
    with bench(home, base, token_s="0.05") as at:
        at.live.load("demo@v1")
        words: list[str] = []

        def read() -> None:
            with at.client.stream("POST", CHAT, json=asking(model="demo", max_tokens=60, stream=True)) as answer:
                words.extend(line for line in answer.iter_lines() if line)

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: at.running.in_flight("demo@v1") == 1, "the stream")
        at.live.load("demo@v2")
        at.live.unload("demo:prev")
        assert at.asked("demo") == "demo@v2" and "demo@v1" in at.loaded() and reader.is_alive()
        reader.join(60)
        assert words[-1] == "data: [DONE]" and len(words) == 61
        wait_until(lambda: at.loaded() == ["demo@v2"], "the unloading of the old version")


def test_the_last_slot_of_a_cpu_stays_empty_whatever_is_loaded(home: Home, base: Base) -> None:
    """vLLM's unload frees no slot: without the guard the fourth version would be in the last one."""
    with bench(home, base) as at:
        for number in range(1, 8):
            write_version(home, base, f"v{number}", token=number + 10)
            at.live.load("demo")
            assert at.slots()[-1] in (None, GUARD) and f"demo@v{number}" in at.slots()
        assert at.slots()[-1] == GUARD and at.asked("demo") == "demo@v7"


def test_versions_before_make_room_for_other_adapters(home: Home, base: Base) -> None:
    for version in ("v1", "v2"):
        write_version(home, base, version, token=int(version[1]) + 10)
    for name in ("other", "third"):
        write_version(home, base, "v1", name)
    with bench(home, base) as at:
        at.live.load("demo@v1")
        at.live.load("demo@v2")
        at.live.load("other")
        assert set(at.listed()) == {"demo", "other"} and at.asked("demo:prev") is None
        with pytest.raises(ResourceError, match="all 2 LoRA slots are in use") as caught:
            at.live.load("third")
        assert "--max-loras 2" in caught.value.hint
        at.live.unload("other")
        assert at.live.rollback("demo").engine_name == "demo@v1"
        at.live.load("third")
        assert sorted(at.loaded()) == ["demo@v1", "third@v1"]


def test_on_a_gpu_adapters_take_turns(home: Home, base: Base) -> None:
    for name in ("a", "b", "c"):
        write_version(home, base, "v1", name)
    with bench(home, base, ON_GPU) as at:
        for name in ("a", "b", "c"):
            at.live.load(name)
        assert set(at.listed()) == {"a", "b", "c"} and [at.asked(name) for name in "abc"] == ["a@v1", "b@v1", "c@v1"]


def test_what_does_not_go_with_the_endpoint_is_refused_with_the_flag_that_helps(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    with bench(home, base, replace(PLAN, rank=1)) as at:
        with pytest.raises(ResourceError, match="demo has rank 4, and the slots of this endpoint hold 1") as caught:
            at.live.load("demo")
        assert "--max-lora-rank 8" in caught.value.hint
        at.live.connect(at.engine.client, replace(PLAN, slots=0, rank=0))
        with pytest.raises(ResourceError, match="was started without room for adapters"):
            at.live.load("demo")
        with pytest.raises(UsageError, match="tiny is a name of the base"):
            at.live.load("demo", "tiny")
        with pytest.raises(AdapterError, match="there is no adapter nobody"):
            at.live.unload("nobody")
        at.state.begin(Phase.RESTARTING, "it crashed")
        with pytest.raises(EngineError, match="the engine is restarting: it takes no changes now"):
            at.live.load("demo")
        assert at.engine.bodies("/v1/load_lora_adapter") == []


def test_an_adapter_of_another_base_is_refused_before_the_engine_sees_it(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    (base.folder / "config.json").write_text('{"model_type": "llama", "rope_theta": 7}')
    with bench(home, base) as at:
        with pytest.raises(AdapterError, match=r"was trained on another base than .*: its config.json differs"):
            at.live.load("demo")
        assert at.engine.bodies("/v1/load_lora_adapter") == []


def test_an_adapter_that_stops_being_right_is_served_no_longer(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    with bench(home, base) as at:
        at.live.load("demo")
        assert at.live.verify("demo").verified.state == "verified"
        at.knob(wrong="demo@v1")
        with pytest.raises(VerificationError):
            at.live.verify("demo")
        assert at.asked("demo") is None and at.loaded() == []
        [entry] = at.live.listing()
        assert entry["state"] == "failed" and "loaded but not applied" in entry["reason"]
        at.knob(wrong="")
        assert at.live.load("demo").verified.state == "verified" and len(at.live.listing()) == 1


def test_after_a_restart_all_are_loaded_and_verified_again(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    write_version(home, base, "v2", token=6)
    write_version(home, base, "v1", "other")
    plan = replace(PLAN, slots=4)
    with bench(home, base, plan) as at:
        results = at.live.restore([adapter(home, "demo@v1"), adapter(home, "other")])
        assert [result.loaded is not None for result in results] == [True, True]
        at.live.load("demo@v2")
        at.state.begin(Phase.RESTARTING, "it crashed")
        second = FakeEngine(called=("base",), slots=plan.slots, wrong="other@v1")
        try:
            at.live.connect(second.client)
            results = at.live.restore()
            assert [(each.adapter.manifest.name, each.error is None) for each in results] == [
                ("demo", True),
                ("other", False),
            ]
            at.state.ready([Model("base", max_model_len=CONTEXT), *at.live.models], second.url)
            assert at.asked("demo") == "demo@v2" and at.asked("other") is None and set(at.listed()) == {"demo"}
            assert {entry["name"]: entry["state"] for entry in at.live.listing()} == {
                "demo": "verified",
                "other": "failed",
            }
            second.client.post("/knob", json={"WRONG": ""})
            at.live.connect(at.engine.client)  # a third start: what failed gets another try
            assert len(at.live.restore()) == 2
        finally:
            second.end()


def test_nothing_is_forgotten_where_the_engine_dies_while_adapters_are_restored(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    with bench(home, base) as at:
        at.live.restore([adapter(home, "demo")])
        at.engine.process.kill()
        at.engine.process.wait()
        at.live.connect(at.engine.client)
        with pytest.raises(EndpointError, match="the engine did not answer /v1/load_lora_adapter"):
            at.live.restore()
        assert [each.name for each in (served.latest for served in at.live.served.values())] == ["demo"]


def test_where_base_and_adapters_do_not_keep_apart_none_is_served(home: Home, base: Base) -> None:
    write_version(home, base, "v1")
    with bench(home, base, replies="mixed") as at:
        [result] = at.live.restore([adapter(home, "demo")])
        assert isinstance(result.error, VerificationError) and "requests for base get the weights of anoth" in str(
            result.error
        )
        assert at.listed() == {} and at.live.listing()[0]["state"] == "failed"
        with pytest.raises(VerificationError):
            at.live.load("demo")
        assert Catalog(home).registered().references == ()


def test_an_adapter_that_peft_saved_elsewhere(home: Home, base: Base, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "My LoRA (2)")
    with bench(home, base) as at:
        loaded = at.live.load(str(folder))
        version = loaded.adapter.manifest.version
        assert (loaded.name, loaded.verified.state) == ("My-LoRA-2", "unproven") and len(version) == 8
        assert at.listed()["My-LoRA-2"]["verified"] is False and at.asked("My-LoRA-2") == f"My-LoRA-2@{version}"
        assert at.live.load(f"mine={folder}").name == "mine" and at.live.listing()[1]["is_foreign"]
        assert Catalog(home).registered().references == (f"My-LoRA-2={folder}", f"mine={folder}")
        at.live.unload("My-LoRA-2")
        at.live.unload("mine")
        at.knob(replies="base")
        with pytest.raises(
            VerificationError, match=r"is loaded but not applied: the engine answers as the base does\."
        ):
            at.live.load(str(folder))
        write_adapter(folder, fill=0)
        with pytest.raises(AdapterError, match="changes nothing: every B of it is zero, as before training"):
            at.live.load(str(folder))
        write_adapter(folder, use_dora=True)
        with pytest.raises(AdapterError, match="uses DoRA"):
            at.live.load(str(folder))


def test_a_copy_of_a_version_is_another_version(home: Home, base: Base, tmp_path: Path) -> None:
    """`demo@v1` must always mean the weights in the home: the engine's cache of prefixes goes by the name."""
    folder = write_version(home, base, "v1")
    copied = folder.rename(tmp_path / "copy")
    opened = adapter(home, str(copied))
    assert opened.manifest.version.startswith("v1-") and opened.manifest.name == "demo"
    require_unchanged(opened, home)
    (copied / "adapter_config.json").write_text(json.dumps(CONFIG | {"lora_alpha": 16}))
    with pytest.raises(AdapterError, match=r"has changed since it was loaded as demo@v1-"):
        require_unchanged(opened, home)
    assert adapter(home, str(copied)).manifest.version != opened.manifest.version
    assert adapter(home, f"other={copied}").manifest.name == "other"


def test_what_the_engine_was_not_told_at_its_start_comes_with_each_request(home: Home, base: Base) -> None:
    write_version(home, base, "v1", chat_template_kwargs={"enable_thinking": False})
    write_version(home, base, "v2", stop_tokens=[31])
    with bench(home, base) as at:
        at.live.load("demo@v1")
        models = {model.id: model.defaults for model in at.live.engine.snapshot.models}
        assert models["demo"]["chat_template_kwargs"] == {"enable_thinking": False} and not models["base"]
        at.live.load("demo@v2")
        models = {model.id: model.defaults for model in at.live.engine.snapshot.models}
        assert models["demo"] == {"stop_token_ids": [31]}
        assert models["demo@v1"]["chat_template_kwargs"] == {"enable_thinking": False}


def test_adapters_in_the_wrong_slot_are_served_no_longer(home: Home, base: Base) -> None:
    """On a CPU an adapter that ends up in the last slot changes what the base says, even when its name is gone."""
    write_version(home, base, "v1")
    write_version(home, base, "v2", token=6)
    told: list[str] = []
    with bench(home, base) as at:
        at.live.on_spoiled = told.append
        at.live.load("demo@v1")
        at.knob(replies="mixed")
        with pytest.raises(VerificationError, match="requests for base get the weights of another model"):
            at.live.load("demo@v2")
        assert at.listed() == {} and at.live.listing()[0]["state"] == "failed" and len(told) == 1


def test_a_full_disk_is_told_of_before_a_load(home: Home, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_version(home, base, "v1")

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="no disk space left while writing"):
        make_zeros(home, folder)


def test_a_restart_undoes_no_rollback(home: Home, base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    def started(reference: str = "demo") -> str:
        [adapter] = checks.open_adapters(home, [reference], V32, str(base.folder))
        return adapter.manifest.version

    write_version(home, base, "v1")
    with bench(home, base) as made:
        made.live.load("demo@v1")
        write_version(home, base, "v2")
        assert started() == "v2"  # it was never served
        made.live.load("demo@v2")
        assert started() == "v2"
        made.live.rollback("demo")
        assert started() == "v1" and started("demo@v2") == "v2"
        assert "demo: v1, which took over from v2; demo@v2 serves that one." in capsys.readouterr().err
        write_version(home, base, "v3")
        assert started() == "v3"

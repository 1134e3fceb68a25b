"""Adapters of two engines behind one gateway: on both or on none; and what an engine needs that joins."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraport.clients.errors import AdapterError, EndpointError, EngineError, VerificationError
from loraport.clients.home import Home
from loraport.serve.adapters.catalog import Catalog
from loraport.serve.adapters.live import Live
from loraport.serve.adapters.loading import GUARD
from loraport.serve.gateway.app import create_app
from loraport.serve.gateway.forward import Gateway
from loraport.serve.gateway.server import run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState, Model, Phase
from loraport.train.base_model import Base
from tests.gateway import CHAT, CONTEXT, FakeEngine, asking, error_of
from tests.test_adapters_accept import base, write_adapter
from tests.test_adapters_live import PLAN, V32, write_version

__all__ = ["base"]  # a fixture


@dataclass
class Pair:
    """A Live on two engines, of which both are ready."""

    engines: list[FakeEngine]
    state: EngineState
    live: Live
    client: httpx.Client
    gateway: Gateway

    def knob(self, number: int, **knobs: str) -> None:
        """Set knobs of an engine while it runs."""
        self.engines[number].client.post("/knob", json={name.upper(): value for name, value in knobs.items()})

    def held(self, number: int) -> list[str]:
        """Adapters that an engine knows."""
        cards = self.engines[number].client.get("/v1/models").json()["data"]
        return sorted(card["id"] for card in cards if card["id"] not in ("base", GUARD))

    def asked(self, model: str) -> list[str]:
        """What the engines are asked for where clients ask for `model`, until each was asked."""
        return [self.client.post(CHAT, json=asking(model=model)).json().get("model") for _ in self.engines]

    def crash(self, number: int, **knobs: str) -> None:
        """Put a new engine, which holds nothing, in the place of one; it is not ready yet."""
        self.engines[number].end()
        self.state.begin(Phase.RESTARTING, "it crashed", replica=number)
        self.engines[number] = FakeEngine(called=("base",), slots=PLAN.slots, **knobs)
        self.live.connect(self.engines[number].client, replica=number)


@contextlib.contextmanager
def pair(home: Home, base: Base, **knobs: str) -> Iterator[Pair]:
    """Both engines are ready and hold no adapter yet."""
    engines = [FakeEngine(called=("base",), slots=PLAN.slots, **knobs) for _ in range(2)]
    state = EngineState(2)
    try:
        app = create_app(state, GatewaySettings("127.0.0.1", 0, home.root / "keys.json"))
        with (
            run_in_thread(app, "127.0.0.1", 0) as running,
            httpx.Client(base_url=running.url, trust_env=False, timeout=60) as client,
        ):
            live = Live(state, home, base, "base", PLAN, V32, in_flight=running.in_flight)
            for number, engine in enumerate(engines):
                live.connect(engine.client, replica=number)
                state.ready([Model("base", max_model_len=CONTEXT)], engine.url, replica=number)
            yield Pair(engines, state, live, client, running.gateway)
    finally:
        for engine in engines:
            engine.end()


@pytest.fixture
def versions(home: Home, base: Base) -> Path:
    """demo@v1 and demo@v2."""
    write_version(home, base, "v1")
    return write_version(home, base, "v2", token=6)


@pytest.mark.usefixtures("versions")
def test_changes_go_to_all_engines(home: Home, base: Base) -> None:
    with pair(home, base) as both:
        assert both.live.load("demo@v1").verified.state == "verified"
        assert both.asked("demo") == ["demo@v1"] * 2 and both.held(0) == both.held(1) == ["demo@v1"]
        both.live.load("demo@v2")
        assert both.asked("demo") == ["demo@v2"] * 2 and both.asked("demo:prev") == ["demo@v1"] * 2
        assert [entry["state"] for entry in both.live.listing()] == ["verified"]
        both.live.unload("demo")
        assert both.held(0) == both.held(1) == []


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize(
    ("knobs", "kind", "words"),
    [
        ({"refuse": "demo@v2"}, AdapterError, "replica 1: the engine refuses the adapter demo@v2"),
        ({"wrong": "demo@v2"}, VerificationError, "replica 1: the adapter demo@v2 is loaded but not applied"),
    ],
)
def test_what_one_engine_does_not_take_is_taken_from_the_other_again(
    home: Home, base: Base, knobs: dict[str, str], kind: type[Exception], words: str
) -> None:
    with pair(home, base) as both:
        both.live.load("demo@v1")
        before = both.client.get("/v1/models").json()["data"][1:], both.live.listing(), Catalog(home).aliases("demo")
        both.knob(1, **knobs)
        with pytest.raises(kind, match=words):
            both.live.load("demo@v2")
        assert both.held(0) == both.held(1) == ["demo@v1"] and both.asked("demo") == ["demo@v1"] * 2
        after = both.client.get("/v1/models").json()["data"][1:], both.live.listing(), Catalog(home).aliases("demo")
        assert after == before


@pytest.mark.usefixtures("versions")
def test_an_engine_that_dies_while_an_adapter_is_loaded_undoes_the_change(home: Home, base: Base) -> None:
    with pair(home, base) as both:
        both.live.load("demo@v1")
        both.engines[1].process.kill()
        both.engines[1].process.wait()
        with pytest.raises(EndpointError, match="replica 1: the engine did not answer /v1/load_lora_adapter"):
            both.live.load("demo@v2")
        assert both.held(0) == ["demo@v1"]
        both.state.begin(Phase.RESTARTING, "it crashed", replica=1)
        assert both.live.load("demo@v2").engine_name == "demo@v2" and both.held(0) == ["demo@v1", "demo@v2"]


@pytest.mark.usefixtures("versions")
def test_an_engine_that_joins_gets_what_the_others_serve(home: Home, base: Base) -> None:
    with pair(home, base) as both:
        both.live.load("demo@v1")
        both.crash(1)
        both.live.load("demo@v2")
        assert both.held(1) == [], "it is not ready: the change is none of its business"
        [restored] = both.live.restore(replica=1)
        assert restored.loaded and restored.loaded.engine_name == "demo@v2"
        both.state.ready(base_url=both.engines[1].url, replica=1)
        assert both.held(1) == ["demo@v1", "demo@v2"]
        assert both.asked("demo") == ["demo@v2"] * 2 and both.asked("demo:prev") == ["demo@v1"] * 2


@pytest.mark.usefixtures("versions")
def test_an_engine_that_cannot_hold_what_the_others_serve_does_not_join(home: Home, base: Base) -> None:
    with pair(home, base) as both:
        both.live.load("demo@v1")
        both.crash(1, wrong="demo@v1")
        with pytest.raises(VerificationError, match=r"^the adapter demo@v1 is loaded but not applied"):
            both.live.restore(replica=1)
        assert both.asked("demo") == ["demo@v1"] * 2 and both.live.listing()[0]["state"] == "verified"


@pytest.mark.usefixtures("versions")
def test_where_all_have_crashed_the_first_that_is_back_decides(home: Home, base: Base) -> None:
    with pair(home, base) as both:
        both.live.load("demo@v1")
        both.crash(0, wrong="demo@v1")
        both.crash(1)
        with pytest.raises(EngineError, match="the engine is restarting: it takes no changes now"):
            both.live.load("demo@v2")
        [result] = both.live.restore(replica=0)
        assert result.error is not None and both.live.listing()[0]["state"] == "failed"
        both.state.ready(base_url=both.engines[0].url, replica=0)
        assert both.live.restore(replica=1) == [] and both.held(1) == []


@pytest.mark.usefixtures("versions")
def test_verified_is_what_all_of_them_say(home: Home, base: Base) -> None:
    with pair(home, base) as both:
        both.live.load("demo@v1")
        both.knob(1, wrong="demo@v1")
        with pytest.raises(VerificationError, match="replica 1"):
            both.live.verify("demo")
        assert both.live.listing()[0]["state"] == "failed" and both.held(0) == both.held(1) == []


@pytest.fixture
def elsewhere(home: Home, base: Base, tmp_path: Path) -> list[Path]:
    """Two versions in folders outside the home."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        write_version(home, base, "v1", token=5 + number).rename(folder)
        write_adapter(folder, fill=1 + number)
    return folders


@pytest.mark.parametrize("is_deleted", [True, False])
def test_a_version_before_that_is_gone_keeps_no_engine_out(
    home: Home, base: Base, elsewhere: list[Path], is_deleted: bool
) -> None:
    with pair(home, base) as both:
        before, latest = (both.live.load(f"demo={folder}").engine_name for folder in elsewhere)
        assert both.held(0) == sorted([before, latest])
        shutil.rmtree(elsewhere[0])
        if not is_deleted:
            shutil.copytree(elsewhere[1], elsewhere[0])
        both.crash(1)
        [restored] = both.live.restore(replica=1)
        assert restored.error is None and both.held(0) == both.held(1) == [latest]
        assert both.client.post(CHAT, json=asking(model="demo:prev")).status_code == 404


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("fault", ["wrong", "refuse"])
def test_a_version_before_that_one_engine_cannot_have_is_given_up_by_all(home: Home, base: Base, fault: str) -> None:
    with pair(home, base) as both:
        both.live.load("demo@v1")
        both.live.load("demo@v2")
        both.crash(1, **{fault: "demo@v1"})
        [restored] = both.live.restore(replica=1)
        assert restored.error is None and both.held(0) == both.held(1) == ["demo@v2"]


def test_an_adapter_that_is_gone_is_served_no_longer_by_any(home: Home, base: Base, elsewhere: list[Path]) -> None:
    with pair(home, base) as both:
        both.live.load(f"gone={elsewhere[0]}")
        other = both.live.load(f"other={elsewhere[1]}").engine_name
        shutil.rmtree(elsewhere[0])
        both.crash(1)
        told = both.live.restore(replica=1)
        assert [bool(each.error) for each in told] == [False, True] and both.held(0) == both.held(1) == [other]
        states = {entry["name"]: (entry["state"], entry.get("reason")) for entry in both.live.listing()}
        assert states["other"][0] == "verified" and states["gone"][0] == "failed"
        assert "first cannot be read any more" in str(states["gone"][1])
        assert both.client.post(CHAT, json=asking(model="gone")).status_code == 404


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("step", ["load", "prove", "prove_together"])
def test_what_no_engine_can_prove_any_more_is_not_served(
    home: Home, base: Base, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The service is stopped in the middle of a load."""
    with pair(home, base) as both:
        both.live.load("demo@v1")
        both.gateway.adapters, key = both.live, {"Authorization": f"Bearer {both.gateway.ring.issue()}"}
        real = getattr(both.live.holders, step)

        def stopped_before(*given: Any) -> Any:
            both.state.begin(Phase.DRAINING, "it is being stopped")
            return real(*given)

        monkeypatch.setattr(both.live.holders, step, stopped_before)
        refused = both.client.post("/admin/adapters", json={"reference": "demo@v2"}, headers=key)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "engine_not_ready")
        assert error_of(refused)["message"] == "no engine is ready any more (draining)."
        assert both.live.served["demo"].latest.engine_name == "demo@v1"
        latest = Catalog(home).aliases("demo").latest
        assert latest and latest.version == "v1"

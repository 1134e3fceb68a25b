"""Engines that leave for a training and come back: what requests see, what is started, and what counts as a crash."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import psutil
import pytest

from loraport.clients.errors import EngineError
from loraport.clients.hardware import Device
from loraport.clients.home import Home
from loraport.serve import serve as serving_module
from loraport.serve.engine.connect import connect
from loraport.serve.engine.leftovers import read_traces, session_of
from loraport.serve.engine.process import Launch
from loraport.serve.engine.starts import read_starts
from loraport.serve.fleet import Fleet
from loraport.serve.gateway.refusals import not_ready
from loraport.serve.gateway.state import EngineState, Model, Phase
from loraport.serve.plan.settings import Wanted
from loraport.serve.serve import Request, Service, open_gateway, prepare, spread
from loraport.serve.supervise import Keeper, Patience, Running
from loraport.serve.tenant import Tenant, gpu_names
from tests.adapters import make_tiny_adapter
from tests.conftest import free_port
from tests.serving import FAKE, all_gone, wait_until

QUICK = Patience(silent_s=5, look_s=0.02, probe_s=0.05, pause_s=0.01)


def launches_of(home: Home, base: Path, replicas: int = 1, adapters: tuple[str, ...] = ()) -> list[Launch]:
    """Fake engines."""
    model = None if adapters else str(base)
    wanted = Wanted(replicas=replicas)
    request = Request(list(adapters), model, "127.0.0.1", free_port(), wanted, FAKE, [], json=False, drain_s=0)
    return spread(prepare(request, home), home)


class Kept(Fleet):
    """A fleet that is watched, and its tenant."""

    def __init__(self, launches: list[Launch], home: Home) -> None:
        self.state, self.home, self.in_flight = EngineState(len(launches)), home, 0

        def bring_up(running: Running) -> None:
            launch = running.launch
            self.state.ready([Model("base")], uds=str(launch.socket), replica=launch.replica)

        super().__init__([Keeper(launch, home, self.state, bring_up, QUICK) for launch in launches])
        self.tenant = Tenant(self, self.state, home, in_flight=lambda: self.in_flight, drain_s=0.3)

    @property
    def phases(self) -> list[Phase]:
        """Of the replicas."""
        return [each.phase for each in self.state.snapshot.replicas]

    def engines(self) -> list[psutil.Process]:
        """Processes of all engines."""
        return [process for trace in read_traces(self.home) for process in session_of(trace)]

    def crash(self, number: int = 0) -> None:
        """End an engine as a crash does."""
        running = self.keepers[number].running
        assert running
        session_of(running.engine.trace)[-1].kill()


@contextmanager
def kept(launches: list[Launch], home: Home) -> Iterator[Kept]:
    """A fleet; closed afterwards, and nothing of it is left."""
    made = Kept(launches, home)
    try:
        yield made
    finally:
        seen = made.engines()
        made.close()
        assert all_gone(seen) and not any(thread.is_alive() for thread in made.threads)
        assert made.bug is None or isinstance(made.bug, EngineError)


def test_all_leave_and_come_back_and_no_crash_is_counted(home: Home, tiny_base: Path) -> None:
    replicas = 2
    with kept(launches_of(home, tiny_base, replicas), home) as fleet:
        fleet.start()
        wait_until(lambda: len(fleet.ready) == replicas, "all")
        for _ in range(3):  # as often as crashes are not forgiven
            before = fleet.engines()
            fleet.tenant.suspend("a job trains", 600)
            assert fleet.phases == [Phase.SUSPENDED] * replicas and not fleet.engines() and all_gone(before)
            time.sleep(0.1)  # nobody starts anything
            assert not read_traces(home) and not fleet.state.snapshot.reachable
            fleet.tenant.resume()
            fleet.tenant.resume()
            assert fleet.phases == [Phase.READY] * replicas
        assert [keeper.crashes for keeper in fleet.keepers] == [[]] * replicas
        fleet.crash()
        wait_until(lambda: len(fleet.keepers[0].crashes) == 1, "it is watched again")
        starts = 4 * replicas + 1
        wait_until(lambda: len(read_starts(home)) == starts, "it is started again")
        wait_until(lambda: fleet.phases[0] is Phase.READY, "it is ready again")
    assert [start["outcome"] for start in read_starts(home)] == ["ready"] * starts


def test_requests_are_told_why_and_when(home: Home, tiny_base: Path) -> None:
    with kept(launches_of(home, tiny_base), home) as fleet:
        fleet.start()
        start_s = fleet.tenant.start_s()
        fleet.tenant.suspend("fine-tuning trains on its GPU", 600)
        refusal = not_ready(fleet.state.snapshot)
        assert (refusal.status, refusal.code) == (503, "engine_suspended")
        assert "suspended: fine-tuning trains on its GPU; about " in refusal.message
        assert 590 < int(refusal.headers["Retry-After"]) <= 601 + start_s
        fleet.tenant.suspend("another job trains", None)
        refusal = not_ready(fleet.state.snapshot)
        assert (
            refusal.message == "The engine is suspended: another job trains." and refusal.headers["Retry-After"] == "60"
        )
        fleet.tenant.resume()


def test_what_runs_may_end_first_but_not_for_ever(home: Home, tiny_base: Path) -> None:
    with kept(launches_of(home, tiny_base), home) as fleet:
        fleet.start()
        fleet.in_flight, fleet.tenant.drain_s = 1, 600
        leaving = threading.Thread(target=fleet.tenant.suspend, args=("a job trains", None))
        leaving.start()
        wait_until(lambda: fleet.phases == [Phase.SUSPENDED], "new requests are refused")
        assert fleet.state.snapshot.reachable and fleet.engines(), "those that run have their engine"
        fleet.in_flight = 0
        leaving.join()
        assert not fleet.engines()
        fleet.tenant.resume()
        fleet.in_flight, fleet.tenant.drain_s = 1, 0.1
        fleet.tenant.suspend("a job trains", None)
        assert not fleet.engines()
        fleet.tenant.resume()


def test_an_engine_that_leaves_while_it_starts_comes_back(
    home: Home, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_START_S", "600")
    with kept(launches_of(home, tiny_base), home) as fleet:
        starting = threading.Thread(target=fleet.start)
        starting.start()
        wait_until(lambda: bool((engine := fleet.keepers[0].running) and engine.engine.last), "its start")
        fleet.tenant.suspend("a job trains", None)
        monkeypatch.setenv("FAKE_START_S", "0")
        assert fleet.phases == [Phase.SUSPENDED] and not fleet.engines()
        fleet.tenant.resume()
        starting.join()
        assert fleet.phases == [Phase.READY] and fleet.keepers[0].crashes == []


def test_an_engine_that_was_sent_away_before_its_first_start_waits(home: Home, tiny_base: Path) -> None:
    with kept(launches_of(home, tiny_base), home) as fleet:
        fleet.tenant.suspend("a job of before trains", None)
        starting = threading.Thread(target=fleet.start)
        starting.start()
        time.sleep(0.2)
        assert fleet.phases == [Phase.SUSPENDED] and not fleet.engines()
        fleet.tenant.resume()
        starting.join()
        assert fleet.phases == [Phase.READY] and len(fleet.ready) == 1


def test_a_return_that_fails_is_tried_again_and_then_told(
    home: Home, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept(launches_of(home, tiny_base), home) as fleet:
        fleet.start()
        fleet.tenant.suspend("a job trains", None)
        monkeypatch.setenv("FAKE_CRASH", "weights")
        monkeypatch.setenv("FAKE_LAST_WORDS", "torch.OutOfMemoryError: CUDA out of memory")
        failing = threading.Timer(0.0, fleet.tenant.resume)
        failing.start()
        wait_until(lambda: len(fleet.keepers[0].crashes) == 1, "the first one")
        monkeypatch.delenv("FAKE_CRASH")
        failing.join()
        assert fleet.phases == [Phase.READY] and len(fleet.keepers[0].crashes) < 3
        monkeypatch.setenv("FAKE_CRASH", "weights")
        fleet.keepers[0].crashes = []
        fleet.tenant.suspend("a job trains", None)
        with pytest.raises(EngineError, match=r"does not come back: .*the engine ran out of memory"):
            fleet.tenant.resume()
        fleet.tenant.suspend("a job trains", None)
        assert fleet.phases == [Phase.DOWN]
        with pytest.raises(EngineError, match="does not come back"):
            fleet.tenant.resume()


@pytest.mark.parametrize("when", ["away", "draining", "coming back"])
def test_the_endpoint_may_be_stopped_meanwhile(
    home: Home, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    with kept(launches_of(home, tiny_base), home) as fleet:
        fleet.start()
        fleet.in_flight, fleet.tenant.drain_s = int(when == "draining"), 600
        refused: list[str] = []

        def leave() -> None:
            try:
                fleet.tenant.suspend("a job trains", None)
            except EngineError as error:
                refused.append(error.message)

        away = threading.Thread(target=leave)
        away.start()
        wait_until(lambda: fleet.phases == [Phase.SUSPENDED], "it is told")
        if when != "draining":
            away.join()
        if when == "coming back":
            monkeypatch.setenv("FAKE_START_S", "600")
            away = threading.Thread(target=fleet.tenant.resume)
            away.start()
            wait_until(lambda: bool((engine := fleet.keepers[0].running) and engine.engine.last), "its start")
        fleet.state.begin(Phase.DRAINING, "it is being stopped")
        fleet.close()
        away.join(30)
        assert not away.is_alive() and fleet.phases == [Phase.DRAINING]
        assert refused == (["the endpoint is being stopped."] if when == "draining" else [])


def test_leaving_and_coming_back_at_once_is_no_crash(home: Home, tiny_base: Path) -> None:
    with kept(launches_of(home, tiny_base), home) as fleet:
        fleet.start()
        for _ in range(2):
            fleet.state.begin(Phase.SUSPENDED, "a job trains")
            fleet.keepers[0].leave()
            fleet.tenant.resume()
            fleet.state.begin(Phase.SUSPENDED, "a job trains")
            time.sleep(0.05)
            fleet.keepers[0].leave()
            fleet.keepers[0].come_back()
            fleet.tenant.resume()
        assert fleet.keepers[0].crashes == []


def test_adapters_are_proven_again_before_anybody_is_answered(
    home: Home, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real gateway and the real restoring, on the fake engine: one adapter is right afterwards, one is damaged."""
    for name in ("demo", "other"):
        make_tiny_adapter(home.root, tiny_base, name)
    launches = launches_of(home, tiny_base, 1, ("demo", "other"))
    request = Request(["demo"], None, "127.0.0.1", launches[0].port, Wanted(), FAKE, [], json=False, drain_s=0)
    state = EngineState()
    with open_gateway(request, home, state) as gateway:
        service = Service(launches, request, home, state, gateway, time.monotonic())
        tenant = Tenant(service.fleet, state, home, in_flight=lambda: len(gateway.gateway.running))
        monkeypatch.setattr(serving_module, "print_json", lambda _: None)
        running = threading.Thread(target=lambda: service.fleet.start() and service.fleet.watch(), daemon=True)
        running.start()
        try:
            wait_until(lambda: state.snapshot.phase is Phase.READY, "its start")
            assert ask(gateway.url, "demo").status_code == ask(gateway.url, "other").status_code == 200
            tenant.suspend("a job trains", 60)
            refused = ask(gateway.url, "demo")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_suspended"
            assert int(refused.headers["retry-after"]) >= 60
            (home.adapters / "other" / "v1" / "adapter_model.safetensors").write_bytes(b"damaged")
            tenant.resume()
            assert ask(gateway.url, "demo").status_code == 200 and ask(gateway.url, "other").status_code == 404
            with connect(launches[0].socket) as engine:
                asked = [each["body"] for each in engine.get("/seen").json()["requests"]]
            assert sum('"demo@v1"' in text for text in asked) >= 2, "its replies were replayed"
        finally:
            service.fleet.close()


def ask(url: str, model: str) -> httpx.Response:
    """A request that a client would send."""
    body = {"model": model, "messages": [{"role": "user", "content": "a b"}], "max_tokens": 2}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)


@pytest.mark.parametrize(
    ("visible", "named", "held"),
    [
        (None, ("0", "1"), {0: 72, 1: 72}),
        ("3,1,0", ("3", "1"), {3: 72, 1: 72}),
        ("GPU-a,GPU-b", ("GPU-a", "GPU-b"), {6: 72, 7: 72}),
    ],
)
def test_the_pool_is_told_what_engines_hold(
    home: Home,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    named: tuple[str, ...],
    held: dict[int, int],
) -> None:
    launch = launches_of(home, tiny_base)[0]
    assert gpu_names(launch) == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    plan = replace(launch.plan, share=0.9, tensor_parallel=2)
    launch = replace(launch, device=Device("cuda", "H100", 80 << 30, 79 << 30, 8), plan=plan)
    assert gpu_names(launch) == named and gpu_names(replace(launch, gpus=("5", "4"))) == ("5", "4")
    fleet = cast(Any, SimpleNamespace(keepers=[SimpleNamespace(launch=launch)]))
    tenant = Tenant(fleet, EngineState(), home, {"GPU-a": 6, "GPU-b": 7})
    assert {gpu: count >> 30 for gpu, count in tenant.gpus.items()} == held

"""`loraport serve --replicas`: several engines started, kept and ended together, each on GPUs of its own."""

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

from loraport.clients.endpoint import read_records
from loraport.clients.engine_phases import Timeline
from loraport.clients.errors import EngineError, ResourceError, UsageError
from loraport.clients.hardware import Device
from loraport.clients.home import Home
from loraport.serve.engine.connect import connect, socket_path
from loraport.serve.engine.leftovers import read_traces, session_of
from loraport.serve.engine.process import Launch, environment
from loraport.serve.engine.starts import read_starts
from loraport.serve.fleet import Fleet
from loraport.serve.gateway.state import EngineState, Model, Phase
from loraport.serve.plan import hardware
from loraport.serve.plan.settings import Wanted, for_one
from loraport.serve.plan.wish import parse_replicas
from loraport.serve.serve import Request, Service, prepare, spread
from loraport.serve.supervise import Keeper, Patience, Running
from tests.adapters import make_tiny_adapter
from tests.conftest import free_port
from tests.serving import FAKE, all_gone, serving, wait_until

QUICK = Patience(silent_s=5, look_s=0.02, probe_s=60, pause_s=0.01)
H100 = Device("cuda", "H100", 80 << 30, 79 << 30, 8)


@pytest.fixture
def launches(home: Home, tiny_base: Path) -> list[Launch]:
    """Two fake engines with a base alone."""
    wanted = Wanted(replicas=2)
    request = Request([], str(tiny_base), "127.0.0.1", free_port(), wanted, FAKE, [], json=False, drain_s=0)
    return spread(prepare(request, home), home)


class Kept(Fleet):
    """A fleet of these, whose `watch` runs in a thread of its own."""

    def __init__(self, launches: list[Launch], home: Home) -> None:
        self.state, self.error = EngineState(len(launches)), None

        def bring_up(running: Running) -> None:
            launch = running.launch
            self.state.ready([Model("base")], uds=str(launch.socket), replica=launch.replica)

        super().__init__([Keeper(launch, home, self.state, bring_up, QUICK) for launch in launches])

    def crash(self, number: int) -> None:
        """End an engine as a crash does."""
        running = self.keepers[number].running
        assert running
        session_of(running.engine.trace)[-1].kill()

    def phase(self, number: int) -> Phase:
        """Of a replica."""
        return self.state.snapshot.replicas[number].phase


@contextmanager
def fleet(launches: list[Launch], home: Home) -> Iterator[Kept]:
    """Closed afterwards, and nothing of it is left."""
    made = Kept(launches, home)
    seen: list[psutil.Process] = []
    try:
        yield made
    finally:
        seen = [process for trace in read_traces(home) for process in session_of(trace)]
        made.close()
        assert all_gone(seen) and not any(thread.is_alive() for thread in made.threads)
        assert not list(home.run.iterdir())


def test_one_that_cannot_start_is_tried_again_and_then_left_out(
    launches: list[Launch], home: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_CRASH", "weights")
    monkeypatch.setenv("FAKE_CRASHING", "-1.sock")
    with fleet(launches, home) as kept:
        assert kept.start().launch.replica == 0
        wait_until(lambda: bool(kept.down), "the end of the other")
        assert kept.phase(1) is Phase.DOWN and kept.state.snapshot.phase is Phase.READY
        wait_until(lambda: "1 of 2 go on without it." in "".join(capfd.readouterr().err.split("\n")), "it is told")
    outcomes = [(start["replica"], start["outcome"] == "ready") for start in read_starts(home)]
    assert sorted(outcomes) == [(0, True), (1, False), (1, False), (1, False)]


def test_where_none_can_start_it_ends_with_the_first_error(
    launches: list[Launch], home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CRASH", "weights")
    monkeypatch.setenv("FAKE_LAST_WORDS", "torch.OutOfMemoryError: CUDA out of memory")
    with fleet(launches, home) as kept, pytest.raises(EngineError, match="the engine ran out of memory"):
        kept.start()
    assert len(read_starts(home)) == 2, "none is tried again"


def test_it_is_down_when_all_are(launches: list[Launch], home: Home) -> None:
    with fleet(launches, home) as kept:
        kept.start()
        wait_until(lambda: len(kept.ready) == 2, "both")
        for keeper in kept.keepers:
            keeper.crashes = [time.monotonic()] * 2  # the next end is the last
        kept.crash(1)
        wait_until(lambda: kept.phase(1) is Phase.DOWN, "its end")
        assert kept.state.snapshot.phase is Phase.READY
        kept.crash(0)
        with pytest.raises(EngineError, match=r"signal 9 while serving; it ended 3 times .* and stays down"):
            kept.watch()
        assert kept.state.snapshot.phase is Phase.DOWN


def test_what_is_ended_while_it_starts_leaves_nothing(
    launches: list[Launch], home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_START_S", "600")
    with fleet(launches, home) as kept:
        for thread in kept.threads:
            thread.start()
        wait_until(lambda: len(read_traces(home)) == 2, "both")
    assert {start["outcome"] for start in read_starts(home)} == {"interrupted"}


def test_a_bug_in_a_thread_ends_it_all(launches: list[Launch], home: Home) -> None:
    def break_down(_: Running) -> None:
        raise ZeroDivisionError

    with fleet(launches, home) as kept:
        kept.keepers[1].bring_up = break_down
        with pytest.raises(ZeroDivisionError):
            kept.start()
            kept.watch()


def test_two_replicas_from_start_to_end(home: Home, tiny_base: Path) -> None:
    """Adapters that came while one was away are on it before it is asked again."""
    for version in ("v1", "v2"):
        make_tiny_adapter(home.root, tiny_base, "demo")
        (home.adapters / "demo" / "v1").rename(home.adapters / "demo" / f"{version}-made")
    for version in ("v1", "v2"):
        change_version(home, version)
    with serving(home, "demo@v1", "--replicas", "2", "--engine-command", FAKE, token_s="0.02") as running:
        document = running.ready()
        assert document["replicas"] == 2 and document["plan"]["replicas"]["value"] == "2"
        wait_until(lambda: "2 of 2 answer." in running.text, "both")
        url, key = document["base_url"], {"Authorization": f"Bearer {read_records(home)[0].admin_key}"}
        admin = url.removesuffix("/v1") + "/admin/adapters"
        assert [entry["state"] for entry in httpx.get(admin, headers=key).json()["adapters"]] == ["verified"]
        assert [trace.replica for trace in read_traces(home)] == [0, 1]
        body = {"model": "demo", "messages": [{"role": "user", "content": "a b"}], "max_tokens": 2}
        session_of(read_traces(home)[0])[-1].kill()
        wait_until(lambda: "replica 0: the engine was killed by signal 9" in running.text, "it is noticed")
        loaded = httpx.post(admin, json={"reference": "demo@v2"}, headers=key, timeout=60)
        assert loaded.status_code == 200, loaded.text
        wait_until(lambda: "replica 0 is ready again" in running.text, "it is back")
        answers = [httpx.post(f"{url}/chat/completions", json=body).json()["model"] for _ in range(4)]
        assert answers == ["demo@v2"] * 4
        for number in range(2):
            with connect(socket_path(home, running.port, number)) as engine:
                asked = [each["body"] for each in engine.get("/seen").json()["requests"]]
            assert sum('"demo@v2"' in text and '"messages"' in text for text in asked) >= 2
    assert not list(home.run.iterdir())
    assert {start["replica"] for start in read_starts(home)} == {0, 1}


def change_version(home: Home, version: str) -> None:
    """Give a version that was made as v1 its number."""
    folder = (home.adapters / "demo" / f"{version}-made").rename(home.adapters / "demo" / version)
    manifest = folder / "loraport.json"
    manifest.write_text(manifest.read_text().replace('"version": "v1"', f'"version": "{version}"'))


def test_a_replica_that_joins_writes_the_record_while_no_adapter_can_change(
    launches: list[Launch], home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request([], None, "127.0.0.1", launches[0].port, Wanted(), FAKE, [], json=False, drain_s=0)
    gateway = SimpleNamespace(gateway=SimpleNamespace(ring=SimpleNamespace(issue=str)), in_flight=len)
    service = Service(launches, request, home, EngineState(2), cast(Any, gateway), 0.0)
    free: list[bool] = []

    def write(_: Running) -> None:
        other = threading.Thread(target=lambda: free.append(service.live.lock.acquire(blocking=False)))
        other.start()
        other.join()

    monkeypatch.setattr(service, "prove_adapters", lambda _: [])
    monkeypatch.setattr(service, "write_record", write)
    service.record = cast(Any, "the one before")
    engine, timeline = SimpleNamespace(started=0.0), Timeline(has_lora=False)
    running = SimpleNamespace(launch=launches[1], is_shown=False, timeline=timeline, engine=engine)
    service.bring_up(cast(Any, running))
    assert free == [False]


@pytest.mark.parametrize(
    ("visible", "split"),
    [
        (None, [("0", "1"), ("2", "3")]),
        ("7,5,3,1,0", [("7", "5"), ("3", "1")]),
        ("GPU-a, GPU-b,GPU-c,GPU-d", [("GPU-a", "GPU-b"), ("GPU-c", "GPU-d")]),
    ],
)
def test_gpus_are_divided(
    visible: str | None,
    split: list[tuple[str, ...]],
    launches: list[Launch],
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.split_gpus(2, 2) == split
    launch = replace(launches[0], device=H100, plan=replace(launches[0].plan, tensor_parallel=2, kv_bytes=None))
    seen = [environment(each, home, (1, 0.0))["CUDA_VISIBLE_DEVICES"] for each in spread(launch, home)]
    assert seen == [",".join(gpus) for gpus in split]


def test_a_single_engine_sees_what_we_see(launches: list[Launch], home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    [alone] = spread(replace(launches[0], device=H100, replicas=1), home)
    assert environment(alone, home, (1, 0.0))["CUDA_VISIBLE_DEVICES"] == "3,1"
    assert alone.socket == socket_path(home, alone.port)


def test_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "is_cpu_build", lambda: False)
    monkeypatch.setattr(hardware, "read_gpus", lambda most=None: [H100] * min(most or 8, 8))
    assert hardware.count_replicas(Wanted(replicas=None)) == 8
    assert hardware.count_replicas(Wanted(replicas=None, tensor_parallel=3)) == 2
    assert hardware.count_replicas(Wanted(replicas=3)) == 3
    assert hardware.read_device(2, 4) == H100
    with pytest.raises(ResourceError, match="10 GPUs are wished, and 8 can be seen"):
        hardware.read_device(2, 5)
    monkeypatch.setattr(hardware, "read_gpus", lambda most=None: [])
    assert hardware.count_replicas(Wanted(replicas=None)) == 1
    whole, half = hardware.read_device(), hardware.part_of(replace(H100, kind="cpu"), 2)
    assert whole.kind == "cpu" and (half.cores, half.free, half.total) == (4, H100.free // 2, H100.total // 2)


def test_what_may_be_wished() -> None:
    assert [parse_replicas(text) for text in ("1", "12", "auto", "AUTO")] == [1, 12, None, None]
    for wrong in ("0", "-1", "two", "", "1.5", "1000"):
        with pytest.raises(UsageError, match="is not a number of engines"):
            parse_replicas(wrong)
    assert for_one(Wanted(concurrency=7), 2).concurrency == 4 and for_one(Wanted(), 2).concurrency is None

"""The gateway in front of two engines: who is asked, what happens when one is gone, and their figures on one page."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraport.serve.gateway import app
from loraport.serve.gateway.app import create_app
from loraport.serve.gateway.metrics import Merged
from loraport.serve.gateway.server import Running, run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState, Phase
from tests.gateway import CHAT, MODELS, FakeEngine, asking, error_of
from tests.serving import wait_until


@dataclass
class Pair:
    """A gateway, its two engines, and a client of it."""

    engines: list[FakeEngine]
    state: EngineState
    running: Running
    client: httpx.Client

    def asked(self) -> list[int]:
        """Requests that each engine has seen."""
        return [len(engine.bodies()) for engine in self.engines]

    def streams(self, count: int, tokens: int = 40) -> list[threading.Thread]:
        """So many streams at once; `texts` has what came of them."""
        self.texts: list[str] = []

        def read() -> None:
            self.texts.append(self.client.post(CHAT, json=asking(stream=True, max_tokens=tokens)).text)

        threads = [threading.Thread(target=read) for _ in range(count)]
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(self.running.gateway.upstream.in_flight.values()) == count, "the streams")
        return threads


@contextlib.contextmanager
def pair(**knobs: str) -> Iterator[Pair]:
    """Both are ready."""
    engines, state = [FakeEngine(**knobs), FakeEngine(**knobs)], EngineState(2)
    try:
        for number, engine in enumerate(engines):
            state.ready(MODELS, engine.url, replica=number)
        with (
            run_in_thread(create_app(state, GatewaySettings("127.0.0.1", 0)), "127.0.0.1", 0) as running,
            httpx.Client(base_url=running.url, trust_env=False, timeout=60) as client,
        ):
            yield Pair(engines, state, running, client)
    finally:
        for engine in engines:
            engine.end()


def test_requests_one_by_one_take_turns() -> None:
    with pair() as both:
        assert [both.client.post(CHAT, json=asking()).status_code for _ in range(6)] == [200] * 6
        assert both.asked() == [3, 3]


def test_prompts_that_are_counted_take_turns_too() -> None:
    with pair() as both:
        chats = [both.client.post(CHAT, json=asking("word " * 190)) for _ in range(4)]
        assert {chat.status_code for chat in chats} == {200}
        assert sum(len(engine.bodies("/tokenize")) for engine in both.engines) == 4 and both.asked() == [2, 2]


def test_nobody_waits_for_an_engine_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "PROBE_S", 600)
    monkeypatch.setattr(app, "FIGURES_S", 0.5)
    with pair() as both:
        both.engines[0].process.send_signal(signal.SIGSTOP)
        assert both.client.get("/health", timeout=20).status_code == 200
        text = both.client.get("/metrics", timeout=20).text
        assert 'running{replica="1"}' in text and 'running{replica="0"}' not in text


def test_a_request_goes_to_the_engine_that_has_fewest() -> None:
    with pair(token_s="0.05") as both:
        both.state.begin(Phase.RESTARTING, "it crashed", replica=1)
        threads = both.streams(3)
        both.state.ready(replica=1)
        for _ in range(2):
            assert both.client.post(CHAT, json=asking(max_tokens=1)).status_code == 200
        assert both.asked() == [3, 2]
        for thread in threads:
            thread.join()
        assert not sum(both.running.gateway.upstream.in_flight.values())


def test_a_client_that_hangs_up_counts_no_more() -> None:
    with pair(token_s="0.02") as both:
        with both.client.stream("POST", CHAT, json=asking(stream=True, max_tokens=900)) as stream:
            next(stream.iter_raw())
        wait_until(lambda: not sum(both.running.gateway.upstream.in_flight.values()), "the end of the request", 10)
        wait_until(lambda: sum(engine.seen()["cut"] for engine in both.engines) == 1, "the engine's stream to be cut")


def test_when_an_engine_dies_its_streams_end_in_words_and_the_other_goes_on() -> None:
    with pair(token_s="0.05") as both:
        threads = both.streams(4)
        both.engines[0].process.kill()
        both.engines[0].process.wait()
        answers = [both.client.post(CHAT, json=asking(max_tokens=2)) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 5, "nobody has said yet that it is gone"
        for thread in threads:
            thread.join()
        assert sum("engine_stopped" in text for text in both.texts) == 2
        assert sum(text.rstrip().endswith("[DONE]") for text in both.texts) == 2
        assert both.client.get("/health").status_code == 200
        both.state.begin(Phase.RESTARTING, "it crashed", 20, replica=0)
        assert both.client.get("/v1/models").status_code == 200
        both.state.begin(Phase.DOWN, "it crashed again", replica=1)
        refused = both.client.post(CHAT, json=asking())
        assert refused.status_code == 503 and error_of(refused)["phase"] == "restarting"
        assert "restarting: it crashed; about 20 s left" in error_of(refused)["message"]


def test_the_figures_of_both_are_on_one_page() -> None:
    with pair() as both:
        text = both.client.get("/metrics").text
        families = list(text_string_to_metric_families(text))
        names = [family.name for family in families]
        assert len(set(names)) == len(names) and text.count("# TYPE vllm:num_requests_running gauge") == 1
        [running] = [family for family in families if family.name == "vllm:num_requests_running"]
        assert [sample.labels for sample in running.samples] == [{"replica": "0"}, {"replica": "1"}]
        both.state.begin(Phase.DOWN, "it crashed", replica=0)
        text = both.client.get("/metrics").text
        assert 'running{replica="1"}' in text and 'running{replica="0"}' not in text
        assert 'loraport_gateway_replica_ready{replica="0"} 0.0' in text


def test_a_page_that_cannot_be_read_costs_nobody_elses() -> None:
    families = list(Merged({0: b"a 1\n", 1: b"b{ 2\nb 3\n", 2: b'a{x="y"} 4\n'}).collect())
    assert [(sample.labels, sample.value) for sample in families[0].samples] == [
        ({"replica": "0"}, 1),
        ({"x": "y", "replica": "2"}, 4),
    ]


@pytest.mark.parametrize(
    ("phases", "seen"),
    [
        ((Phase.DOWN, Phase.READY), Phase.READY),
        ((Phase.DOWN, Phase.LOADING), Phase.LOADING),
        ((Phase.RESTARTING, Phase.DOWN), Phase.RESTARTING),
        ((Phase.DOWN, Phase.DOWN), Phase.DOWN),
    ],
)
def test_the_phase_of_all_is_that_of_the_nearest(phases: tuple[Phase, Phase], seen: Phase) -> None:
    state = EngineState(2)
    for number, phase in enumerate(phases):
        state.begin(phase, f"{number}", replica=number)
    assert state.snapshot.phase is seen


def test_what_is_draining_stays_so() -> None:
    state = EngineState(2)
    state.begin(Phase.DRAINING, "it is being stopped")
    state.ready(MODELS, replica=1)
    state.begin(Phase.RESTARTING, "it crashed", replica=0)
    assert {each.phase for each in state.snapshot.replicas} == {Phase.DRAINING}

"""How requests end: clients that hang up or stop reading, engines that die or fall silent, a gateway that stops."""

import asyncio
import json
import socket
from typing import Any

import aiohttp
import httpx
import openai
import pytest

from loraport.serve.gateway.body import Body
from loraport.serve.gateway.calls import Call
from loraport.serve.gateway.forward import Forward, end_stream
from loraport.serve.gateway.refusals import Refusal
from loraport.serve.gateway.state import Model, Phase
from tests.gateway import CHAT, Gated, asking, error_of, gated
from tests.serving import wait_until


def test_a_client_that_hangs_up_ends_the_generation() -> None:
    with gated(token_s="0.02") as gate:
        with gate.client.stream("POST", CHAT, json=asking(stream=True, max_tokens=900)) as stream:
            next(stream.iter_raw())
        wait_until(lambda: gate.engine.seen()["cut"] == 1, "the engine's stream to be cut", 10)
        assert gate.engine.seen()["running"] == 0 and not gate.running.gateway.running


def test_a_client_that_hangs_up_before_the_first_byte_ends_the_request() -> None:
    with gated(token_s="5") as gate:
        with pytest.raises(httpx.ReadTimeout):
            gate.client.post(CHAT, json=asking(stream=True), timeout=0.3)
        wait_until(lambda: not gate.running.gateway.running, "the request to end", 4)


def test_a_client_that_stops_reading_is_dropped() -> None:
    with gated({"idle_s": 1.0, "flush_s": 0.1}, word_bytes="50000") as gate, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", gate.running.port))
        body = json.dumps(asking(stream=True, max_tokens=900)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: bool(gate.running.gateway.running), "the request to start", 5)
        wait_until(lambda: not gate.running.gateway.running, "the client to be dropped", 10)
        wait_until(lambda: 'status="499"' in gate.client.get("/metrics").text, "the end to be counted", 5)


def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error() -> None:
    with gated(die_at="3") as gate:
        streamed = gate.chat(stream=True, max_tokens=50)
        *words, last = [line for line in streamed.text.split("\n\n") if line.strip()]
        assert len(words) >= 1 and words[0].startswith("data: ")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
        refused = gate.chat()
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert error_of(refused)["code"] == "engine_unreachable"
        assert gate.client.get("/health").status_code == 503


def test_the_official_clients_see_a_broken_stream_as_an_error() -> None:
    with gated(die_at="3") as gate:
        client = openai.OpenAI(base_url=f"{gate.running.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="base", prompt="hi", max_tokens=50, stream=True)
        with pytest.raises(openai.APIError, match="The engine stopped"):
            list(stream)
    with gated(die_at="3") as gate:
        broken = gate.client.post("/v1/messages", json=asking(stream=True, max_tokens=50)).text
        assert "event: error\ndata: " in broken
        assert json.loads(broken.rpartition("data: ")[2])["type"] == "error"


def test_an_engine_that_dies_over_a_whole_reply_is_a_503() -> None:
    with gated(die_at="0") as gate:
        refused = gate.chat(stream=True)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "engine_stopped")


def test_a_reply_that_is_no_stream_is_cut_off_rather_than_mended() -> None:
    broken = Call("POST", CHAT, "id", status=200)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(end_stream(Refusal(503, "engine_stopped", "It stopped."), broken, send))
    assert sent == [] and broken.broke == "engine_stopped"
    broken.is_events = True
    asyncio.run(end_stream(Refusal(503, "engine_stopped", "It stopped."), broken, send))
    assert sent[0]["body"].startswith(b"\n\ndata: {")


def test_a_silent_engine_ends_the_stream_in_time() -> None:
    with gated({"idle_s": 0.5}, hang_at="2") as gate:
        *_, last = gate.chat(stream=True, max_tokens=9).text.strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_timeout"
    with gated({"reply_s": 0.5}, silent_s="9") as gate:
        assert gate.chat().status_code == 504


def test_stopping_lets_requests_end_and_breaks_the_others_in_words() -> None:
    async def ask(url: str) -> str:
        asked = asking(stream=True, max_tokens=100)
        async with aiohttp.ClientSession() as session, session.post(url + CHAT, json=asked) as stream:
            return await stream.text()

    for token_s, last in (("0.005", "[DONE]"), ("0.5", "engine_stopped")):
        with gated(token_s=token_s) as gate:

            async def both(gate: Gated = gate) -> str:
                asked = asyncio.create_task(ask(gate.running.url))
                while not gate.running.gateway.running:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.8)
                gate.state.begin(Phase.DRAINING, "it is being stopped")
                await asyncio.to_thread(gate.running.stop, 1.0)
                return await asked

            assert last in asyncio.run(both())


def test_what_was_let_in_before_the_stop_still_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Forward.refuse_overflow

    async def stopped_meanwhile(self: Forward, body: Body, model: Model) -> None:
        self.gateway.engine.begin(Phase.DRAINING, "it is being stopped")
        await real(self, body, model)

    monkeypatch.setattr(Forward, "refuse_overflow", stopped_meanwhile)
    with gated() as gate:
        assert gate.chat().status_code == 200
        assert error_of(gate.chat())["code"] == "engine_draining", "it came too late"
        assert "vllm:num_requests_running" in gate.client.get("/metrics").text


def test_two_hundred_streams_all_end_while_the_engine_is_killed() -> None:
    async def ask(session: aiohttp.ClientSession) -> str:
        async with session.post(CHAT, json=asking(stream=True, max_tokens=900)) as reply:
            return (await reply.text()) if reply.status == 200 else f"refused {reply.status}"

    async def crowd(gate: Gated) -> list[str]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(gate.running.url, connector=connector) as session:
            asked = [asyncio.create_task(ask(session)) for _ in range(200)]
            all_run = "all requests to reach the engine at once: nothing queues in the gateway"
            await asyncio.to_thread(wait_until, lambda: gate.engine.seen()["running"] == 200, all_run, 20)
            gate.engine.process.kill()
            return await asyncio.wait_for(asyncio.gather(*asked), 60)

    with gated(token_s="0.03") as gate:
        ends = asyncio.run(crowd(gate))
        assert len(ends) == 200
        # The last ones may not have had a word yet: then the answer is a plain 503.
        odd = [end[-300:] for end in ends if '"code": "engine_stopped"' not in end and end != "refused 503"]
        assert not odd and sum("engine_stopped" in end for end in ends) > 100, odd[:1]
        assert not gate.running.gateway.running


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_engine_whose_core_has_died_is_a_503_to_be_asked_again(is_stream: bool) -> None:
    with gated(dead_core="1") as gate:
        refused = gate.client.post(CHAT, json=asking(stream=is_stream))
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
        assert error_of(refused)["code"] == "engine_stopped" and "stack trace" not in refused.text

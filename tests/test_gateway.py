"""The gateway over HTTP in front of a fake engine: what passes, what is refused, and how requests end."""

import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loraport.clients.errors import ResourceError
from loraport.serve.gateway.app import create_app
from loraport.serve.gateway.calls import log_to
from loraport.serve.gateway.server import HEAD_BYTES, run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.standalone import read_models
from loraport.serve.gateway.state import EngineState, Model, Phase
from tests.conftest import free_port
from tests.gateway import CHAT, CONTEXT, Gated, asking, error_of, gated
from tests.serving import wait_until

SECRET = "my-private-prompt"


@pytest.fixture(scope="module")
def gate() -> Iterator[Gated]:
    """One gateway for the tests that do not break it."""
    with gated() as found:
        yield found


def test_replies_come_through_unchanged(gate: Gated) -> None:
    direct = gate.engine.client.post(CHAT, json=asking())
    through = gate.chat()
    assert (through.status_code, through.content) == (200, direct.content)
    with gate.client.stream("POST", CHAT, json=asking(stream=True)) as stream:
        streamed = stream.read()
        assert stream.headers["content-type"].startswith("text/event-stream")
    assert streamed == gate.engine.client.post(CHAT, json=asking(stream=True)).content


def test_a_body_reaches_the_engine_as_it_came(gate: Gated) -> None:
    raw = b'{ "model":"base",\n "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}], "max_tokens":2, "odd": 1e2}'
    assert gate.client.post(CHAT, content=raw, headers={"content-type": "application/json"}).status_code == 200
    assert gate.engine.bodies()[-1].encode() == raw


def test_the_official_client_works(gate: Gated) -> None:
    client = openai.OpenAI(base_url=f"{gate.running.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["base", "demo"]
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    reply = client.chat.completions.create(model="demo:latest", messages=messages, max_tokens=3)
    assert reply.usage and reply.usage.completion_tokens == 3
    stream = client.chat.completions.create(model="demo", messages=messages, max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "word0 word1 word2 "
    with pytest.raises(openai.NotFoundError, match="Did you mean demo"):
        client.chat.completions.create(model="dem", messages=messages)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="base", messages=messages, max_tokens=CONTEXT)
    assert refused.value.code == "context_length_exceeded"


ADMINS = [("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter")]  # answered here, for admin keys
FORBIDDEN = [
    *ADMINS,
    ("POST", "/invocations"),
    ("POST", "/die"),
    ("POST", "/v1/chat/completions/"),
    ("POST", "//v1/chat/completions"),
    ("POST", "/v1/../invocations"),
    ("POST", "/v1/%2e%2e/invocations"),
    ("PUT", CHAT),
    ("GET", CHAT),
    ("GET", "/docs"),
    ("GET", "/seen"),
    ("OPTIONS", CHAT),
    ("DELETE", "/v1/models/base"),
]


@pytest.mark.parametrize(("method", "path"), FORBIDDEN)
def test_what_is_not_allowed_is_never_forwarded(gate: Gated, method: str, path: str) -> None:
    before = len(gate.engine.seen()["requests"])
    connection = socket.create_connection(("127.0.0.1", gate.running.port))
    body = json.dumps(asking()).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with connection:  # a client library would tidy the path up
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    status, code = (b"403", "admin_only") if (method, path) in ADMINS else (b"404", "unknown_route")
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == code
    assert len(gate.engine.seen()["requests"]) == before


def test_an_engine_without_a_route_says_so(gate: Gated) -> None:
    refused = gate.client.post("/v1/embeddings", json={"model": "base", "input": "x"})
    assert (refused.status_code, error_of(refused)["code"]) == (404, "unsupported_by_engine")


def test_models_show_context_version_and_verification(gate: Gated) -> None:
    base, demo = gate.client.get("/v1/models").json()["data"]
    assert (base["max_model_len"], base["kind"]) == (CONTEXT, "base")
    assert (demo["max_model_len"], demo["version"], demo["verified"], demo["parent"]) == (CONTEXT, "3", True, "base")
    assert gate.client.get("/v1/models/demo:latest").json()["id"] == "demo"
    missing = gate.client.get("/v1/models/dmo")
    assert missing.status_code == 404 and error_of(missing)["models"] == ["base", "demo"]


def test_a_model_goes_to_the_engine_under_its_own_name(gate: Gated) -> None:
    gate.state.put(Model("tuned", "adapter", engine_name="demo@3", aliases=("tuned:prev",)))
    try:
        assert gate.chat(model="tuned:prev").json()["model"] == "demo@3"
    finally:
        gate.state.drop("tuned")


@pytest.mark.parametrize("wording", ["0.25", "0.32"])
@pytest.mark.parametrize("stream", [False, True])
def test_overflow_is_the_same_refusal_on_every_version(wording: str, stream: bool) -> None:
    prompt = "word " * 1200
    with gated(wording=wording) as gate:
        both = error_of(gate.chat(content="word " * 900, max_tokens=200, stream=stream))
        alone = error_of(gate.chat(content=prompt, max_tokens=None, stream=stream))
        text = gate.client.post("/v1/completions", json={"model": "base", "prompt": prompt, "stream": stream})
    numbers = [(e["prompt_tokens"], e["max_tokens"], e["max_model_len"]) for e in (both, alone, error_of(text))]
    assert numbers == [(904, 200, CONTEXT), (1204, None, CONTEXT), (1200, None, CONTEXT)]
    assert {both["code"], alone["code"]} == {"context_length_exceeded"}
    assert "the prompt has 904 tokens and max_tokens asks for 200" in both["message"]


def test_the_engine_counts_only_where_the_size_leaves_a_doubt(gate: Gated) -> None:
    before = len(gate.engine.bodies("/tokenize"))
    assert gate.chat(content="short").status_code == 200
    assert len(gate.engine.bodies("/tokenize")) == before
    assert gate.chat(content="word " * 300).status_code == 200
    assert len(gate.engine.bodies("/tokenize")) == before + 1


def test_thinking_goes_where_the_template_sees_it(gate: Gated) -> None:
    gate.chat(enable_thinking=False, other=1)
    sent = json.loads(gate.engine.bodies()[-1])
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert "enable_thinking" not in sent and sent["other"] == 1


def test_the_port_is_open_while_the_engine_starts() -> None:
    state = EngineState()
    state.begin(Phase.COMPILING, "compiling graphs", expected_s=30)
    app = create_app(state, GatewaySettings("127.0.0.1", 0))
    with run_in_thread(app, "127.0.0.1", 0) as running, httpx.Client(base_url=running.url) as client:
        refused = client.post(CHAT, json=asking())
        error = error_of(refused)
        assert refused.status_code == 503 and 28 <= int(refused.headers["retry-after"]) <= 30
        assert (error["code"], error["phase"]) == ("engine_compiling", "compiling")
        assert "compiling graphs" in error["message"]
        assert client.get("/v1/models").status_code == client.get("/health").status_code == 503
        assert 'engine_phase{phase="compiling"} 1.0' in client.get("/metrics").text


def test_a_taken_port_is_refused_in_words(gate: Gated) -> None:
    app = create_app(EngineState(), GatewaySettings("127.0.0.1", gate.running.port))
    with pytest.raises(ResourceError, match=str(gate.running.port)):
        run_in_thread(app, "127.0.0.1", gate.running.port)


def test_a_unix_socket_does_as_well(tmp_path: Path) -> None:
    with gated({}, tmp_path / "e.sock") as gate:
        assert gate.chat(stream=True).text.endswith("data: [DONE]\n\n")
        listed = read_models("http://engine", str(tmp_path / "e.sock"))
        assert {(model.id, model.max_model_len) for model in listed} >= {("base", CONTEXT)}


def test_it_runs_alone_in_front_of_an_engine(gate: Gated, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "loraport.serve.gateway", "--engine", gate.engine.url, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_until(lambda: is_ready(client), "the gateway", 30)
            assert client.post(CHAT, json=asking()).json()["usage"]["completion_tokens"] == 4
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert process.stderr and "Traceback" not in process.stderr.read()
    (log,) = (tmp_path / "home" / "logs").iterdir()
    assert f"POST {CHAT} 200" in log.read_text()
    assert json.loads((tmp_path / "home" / "usage" / f"{port}.json").read_text())["-"]["completion_tokens"] == 4


def is_ready(client: httpx.Client) -> bool:
    """Whether a gateway answers with models."""
    with contextlib.suppress(httpx.HTTPError):
        return client.get("/v1/models").status_code == 200
    return False


BAD = [
    (b"{", "application/json", 400),
    (b"[]", "application/json", 400),
    (b'{"model": "demo", "model": "base"}', "application/json", 400),
    (b'{"model": "base", "temperature": NaN}', "application/json", 400),
    (b"\xff\xfe", "application/json", 400),
    (b"{}", "application/json", 400),
    (b'{"model": 3}', "application/json", 400),
    (b'{"model": "base"}', "text/plain", 415),
]


def test_bodies_and_heads_have_bounds() -> None:
    with gated({"body_bytes": 2000, "json_depth": 8}) as gate:
        assert gate.chat(content="x" * 3000).status_code == 413
        pieces = iter([b"x" * 1500] * 3)
        headers = {"content-type": "application/json"}
        assert gate.client.post(CHAT, content=pieces, headers=headers).status_code == 413
        assert gate.chat(deep=json.loads("[" * 9 + "]" * 9)).status_code == 400
        assert gate.client.post(CHAT, content=b"[" * 1900, headers=headers).status_code == 400
        assert gate.client.get("/health", headers={"x-long": "x" * 40000}).status_code == 431
        with socket.create_connection(("127.0.0.1", gate.running.port)) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n")
            with pytest.raises(OSError, match=r"reset|pipe"):
                for _ in range(HEAD_BYTES):
                    connection.sendall(b"X-More: " + b"x" * 1000 + b"\r\n")
        assert gate.chat().status_code == 200


@pytest.mark.parametrize(("body", "kind", "status"), BAD)
def test_bad_bodies_are_refused_in_words(gate: Gated, body: bytes, kind: str, status: int) -> None:
    refused = gate.client.post(CHAT, content=body, headers={"content-type": kind})
    assert refused.status_code == status and error_of(refused)["message"].endswith(".")


def test_request_ids_are_taken_over_where_they_are_sane(gate: Gated) -> None:
    mine = gate.client.post(CHAT, json=asking(), headers={"x-request-id": "abc-1"})
    assert mine.headers["x-request-id"] == "abc-1"
    sent = gate.engine.seen()["requests"][-1]["headers"]
    assert sent["x-request-id"].startswith("abc-1-")
    odd = gate.client.get("/health", headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"].startswith("req-")


def test_the_engine_gets_no_key_and_the_log_no_secret(gate: Gated, tmp_path: Path) -> None:
    handler = log_to(tmp_path / "logs" / "gateway.log")
    try:
        headers = {"authorization": f"Bearer {SECRET}", "x-api-key": SECRET, "cookie": SECRET}
        gate.client.post(f"{CHAT}?q={SECRET}", json=asking(SECRET), headers=headers)
        gate.client.post(CHAT, json=asking(SECRET, model=SECRET))
        gate.client.post(CHAT, content=f'{{"{SECRET}', headers={"content-type": "application/json"})
        gate.client.post(CHAT, json=asking(SECRET, max_tokens=CONTEXT))
        gate.client.get("/v1/lp-" + "k" * 43)
    finally:
        logging.getLogger("loraport.gateway").removeHandler(handler)
        handler.close()
    text = (tmp_path / "logs" / "gateway.log").read_text()
    assert len(text.splitlines()) == 5 and SECRET not in text and "kkk" not in text
    assert f"POST {CHAT} 200 model=base" in text and "tokens=5+4" in text
    assert SECRET not in gate.client.get("/metrics").text
    sent = [request["headers"] for request in gate.engine.seen()["requests"]]
    assert not [headers for headers in sent if {"authorization", "x-api-key", "cookie"} & {n.lower() for n in headers}]


def test_one_page_of_metrics(gate: Gated) -> None:
    gate.chat()
    page = gate.client.get("/metrics").text
    assert f'loraport_gateway_requests_total{{model="base",route="{CHAT}",status="200"}}' in page
    assert "vllm:num_requests_running" in page
    behind_proxy = gate.client.get("/metrics", headers={"x-forwarded-for": "203.0.113.7"})
    assert behind_proxy.status_code == 403

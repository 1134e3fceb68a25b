"""Clients as people use them, through the gateway: thinking in all its spellings, Anthropic's client, web pages.

Claude Code itself is not here: what it sends is what Anthropic's client sends, and it reads the words of an overflow.
"""

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from loraport.serve.gateway import keys
from loraport.serve.gateway.app import FORWARDED, create_app
from loraport.serve.gateway.context import overflow
from loraport.serve.gateway.server import run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState, Model
from tests.conftest import Served
from tests.gateway import CHAT, CONTEXT, Gated, asking, error_of, gated
from tests.loopback import Loopback

QUESTION: Any = [{"role": "user", "content": "hi"}]
GREEDY = {"temperature": 0}  # which this client has no field for
PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def gate() -> Iterator[Gated]:
    """One gateway, with a page that may ask."""
    with gated({"origins": (PAGE,)}) as found:
        yield found


class MessagesEngine(Loopback):
    """An engine that knows /v1/messages alone, in the shape of vLLM's replies."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        super().__init__(MessagesHandler)


class MessagesHandler(BaseHTTPRequestHandler):
    """One request."""

    owner: MessagesEngine
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """A message, a stream of events, or a count."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.owner.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        message = {"id": "m", "type": "message", "role": "assistant", "model": body["model"], "stop_reason": "end_turn"}
        usage, text = {"input_tokens": 7, "output_tokens": 2}, {"type": "text", "text": "Hello."}
        if self.path.endswith("/count_tokens"):
            self.reply({"input_tokens": len(json.dumps([body["messages"], body.get("tools")]).split()) + 4})
        elif not body.get("stream"):
            self.reply({**message, "content": [text], "usage": usage})
        else:
            start = {**message, "content": [], "stop_reason": None, "usage": {"input_tokens": 7, "output_tokens": 0}}
            self.events(
                {"type": "message_start", "message": start},
                {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello."}},
                {"type": "content_block_stop", "index": 0},
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
                {"type": "message_stop"},
            )

    def reply(self, document: dict[str, Any]) -> None:
        """A JSON reply."""
        self.send(json.dumps(document).encode(), "application/json")

    def events(self, *events: dict[str, Any]) -> None:
        """A stream of server-sent events."""
        text = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
        self.send(text.encode(), "text/event-stream")

    def send(self, content: bytes, kind: str) -> None:
        """A body."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def messages(tmp_path: Path) -> Iterator[tuple[MessagesEngine, str, str]]:
    """(such an engine, the gateway in front of it, a key)."""
    text, _ = keys.create(tmp_path / "keys.json", "laptop")
    state = EngineState()
    settings = GatewaySettings("127.0.0.1", 0, tmp_path / "keys.json", tmp_path / "usage.json")
    with MessagesEngine() as engine, run_in_thread(create_app(state, settings), "127.0.0.1", 0) as running:
        state.ready(
            [Model("base", max_model_len=CONTEXT), Model("demo", "adapter", max_model_len=CONTEXT)], engine.origin
        )
        yield engine, running.url, text


OFF: Any = {"enable_thinking": False}
SPELLINGS: Any = [
    ({"extra_body": OFF}, False),
    ({"extra_body": {"enable_thinking": True}}, True),
    ({"extra_body": {"chat_template_kwargs": OFF}}, False),
    ({"extra_body": {"chat_template_kwargs": OFF, "enable_thinking": True}}, False),
    ({"extra_body": {"thinking": {"type": "disabled"}}}, False),
    ({"extra_body": {"thinking": {"type": "enabled"}}}, True),
    ({"extra_body": {"enable_thinking": None}}, None),
    ({"reasoning_effort": "none"}, False),
    ({"reasoning_effort": "minimal"}, False),
    ({"reasoning_effort": "high"}, None),
    ({"reasoning_effort": "none", "extra_body": {"enable_thinking": True}}, True),
    ({}, None),
]


@pytest.mark.parametrize(("asked", "expected"), SPELLINGS)
@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_switched_in_every_spelling(
    gate: Gated, asked: dict[str, Any], expected: bool | None, stream: bool
) -> None:
    client = openai.OpenAI(base_url=f"{gate.running.url}/v1", api_key="none", max_retries=0)
    reply: Any = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=2, stream=stream, **asked)
    assert len(list(reply)) == 2 if stream else reply.usage.completion_tokens == 2
    sent = json.loads(gate.engine.bodies()[-1])
    assert (sent.get("chat_template_kwargs") or {}).get("enable_thinking") is expected
    assert "enable_thinking" not in sent
    assert sent.get("reasoning_effort") == asked.get("reasoning_effort")


def test_thinking_of_the_responses_api(gate: Gated) -> None:
    for effort, expected in (("minimal", {"enable_thinking": False}), ("low", None)):
        asked = {"model": "base", "input": "hi", "reasoning": {"effort": effort}}
        assert gate.client.post("/v1/responses", json=asked).status_code == 200
        assert json.loads(gate.engine.bodies("/v1/responses")[-1]).get("chat_template_kwargs") == expected


def test_a_switch_that_is_none_is_refused_rather_than_ignored(gate: Gated) -> None:
    refused = gate.chat(enable_thinking="false")
    assert refused.status_code == 400 and error_of(refused)["param"] == "enable_thinking"


def test_anthropics_client_works_with_either_key_header(messages: tuple[MessagesEngine, str, str]) -> None:
    engine, url, text = messages
    for login in ({"api_key": text}, {"auth_token": text, "api_key": None}):
        client = anthropic.Anthropic(base_url=url, max_retries=0, **login)
        reply = client.messages.create(model="demo", max_tokens=9, messages=QUESTION)
        assert reply.content[0].type == "text" and reply.content[0].text == "Hello."
        with client.messages.stream(model="demo", max_tokens=9, messages=QUESTION) as stream:
            assert stream.get_final_text() == "Hello."
        assert client.messages.count_tokens(model="demo", messages=QUESTION).input_tokens > 4
        assert [model.id for model in client.models.list()] == ["base", "demo"]
        assert client.models.retrieve("demo").id == "demo"
    path, headers, _ = engine.requests[0]
    assert path == "/v1/messages" and headers["anthropic-version"]
    assert not {"x-api-key", "authorization"} & headers.keys()
    wrong = anthropic.Anthropic(base_url=url, api_key="lp-wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError, match="is not known, has expired or was revoked"):
        wrong.messages.create(model="demo", max_tokens=9, messages=QUESTION)


def test_what_claude_code_sends(messages: tuple[MessagesEngine, str, str]) -> None:
    engine, url, text = messages
    client = anthropic.Anthropic(base_url=url, auth_token=text, max_retries=0)
    asked: Any = {"model": "demo", "max_tokens": 100, "messages": QUESTION, "metadata": {"user_id": "u"}}
    asked["system"] = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    asked["tools"] = [{"name": "Read", "description": "Reads.", "input_schema": {"type": "object"}}]
    client.beta.messages.create(**asked, betas=["context-1m-2025-08-07"], thinking={"type": "disabled"})
    path, headers, body = engine.requests[-1]
    assert path == "/v1/messages" and headers["anthropic-beta"] == "context-1m-2025-08-07"  # without ?beta=true
    assert body.pop("chat_template_kwargs") == {"enable_thinking": False}
    assert body == asked | {"thinking": {"type": "disabled"}}


def test_an_overflow_in_the_words_that_claude_code_reads(messages: tuple[MessagesEngine, str, str]) -> None:
    _, url, text = messages
    client = anthropic.Anthropic(base_url=url, auth_token=text, max_retries=0)
    tools: Any = [{"name": "Read", "description": "word " * 900, "input_schema": {"type": "object"}}]
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="demo", max_tokens=500, messages=QUESTION, tools=tools)
    # the expression with which Claude Code finds how much is left
    pattern = r"input length and `max_tokens` exceed context limit: (\d+) \+ (\d+) > (\d+)"
    found = re.search(pattern, caught.value.message)
    assert found and found.groups()[1:] == ("500", str(CONTEXT))
    assert 900 < int(found[1]) < 950  # tools count, too
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


def test_words_of_an_overflow() -> None:
    alone = overflow("/v1/messages", 1000, 1200, 50)
    assert alone.message == "prompt is too long: 1200 tokens > 1000 maximum"
    both = overflow("/v1/messages", 1000, 951, 50).message
    assert both.startswith("input length and `max_tokens` exceed context limit: 951 + 50 > 1000, decrease")
    assert "maximum context length is 1000" in overflow("/v1/messages", 1000, None, 50).message
    assert "maximum context length is 1000" in overflow(CHAT, 1000, 1200, 50).message


def preflight(client: httpx.Client, origin: str) -> httpx.Response:
    """What a browser asks before a page of `origin` may post."""
    headers = {"origin": origin, "access-control-request-method": "POST"}
    return client.options(CHAT, headers=headers | {"access-control-request-headers": "authorization,content-type"})


def test_pages_may_ask_where_they_are_named_and_read_refusals(gate: Gated) -> None:
    assert preflight(gate.client, PAGE).headers["access-control-allow-origin"] == PAGE
    assert "access-control-allow-origin" not in preflight(gate.client, "https://evil.example").headers
    for body, status in ((asking(), 200), (asking(model="none"), 404)):
        answer = gate.client.post(CHAT, json=body, headers={"origin": PAGE})
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == PAGE


def test_no_page_may_ask_by_default() -> None:
    with gated() as gate:
        assert preflight(gate.client, PAGE).status_code == 404
        assert (
            "access-control-allow-origin" not in gate.client.post(CHAT, json=asking(), headers={"origin": PAGE}).headers
        )


@pytest.mark.parametrize("path", FORWARDED)
def test_every_route_of_the_list_reaches_the_engine(gate: Gated, path: str) -> None:
    before = len(gate.engine.bodies(path))
    gate.client.post(path, json={"model": "base", "messages": QUESTION, "input": "hi", "prompt": "hi", "max_tokens": 2})
    assert len(gate.engine.bodies(path)) == before + 1


@pytest.mark.engine
def test_anthropics_client_against_the_real_engine(served: Served) -> None:
    client = anthropic.Anthropic(base_url=served.base_url.removesuffix("/v1"), auth_token="any", max_retries=0)
    whole = client.messages.create(model=served.adapter, max_tokens=16, messages=QUESTION, extra_body=GREEDY)
    with client.messages.stream(model=served.adapter, max_tokens=16, messages=QUESTION, extra_body=GREEDY) as stream:
        assert whole.content[0].type == "text" and stream.get_final_text() == whole.content[0].text
    counted = client.messages.count_tokens(model=served.adapter, messages=QUESTION)
    assert counted.input_tokens == whole.usage.input_tokens > 0

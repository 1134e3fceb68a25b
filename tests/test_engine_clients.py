"""The official `openai` client, and our own commands, against the real engine behind `loraport serve`."""

import json
import subprocess
import sys
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from loraport.clients.cli import env
from loraport.clients.models import choose_model, connect, context_length, count_tokens, list_models
from tests.conftest import Served

pytestmark = pytest.mark.engine
QUESTION: Any = [{"role": "user", "content": "What is the name of the ship?"}]


@pytest.fixture
def client(served: Served) -> OpenAI:
    """The client as a user would make it."""
    return OpenAI(base_url=served.base_url, api_key="any", max_retries=0)


def test_models(client: OpenAI, served: Served) -> None:
    names = [model.id for model in client.models.list()]
    assert {"base", served.adapter} <= set(names)
    cards = list_models(connect(served.base_url))
    assert choose_model(cards, None, None) == served.adapter
    assert context_length(cards, served.adapter) == context_length(cards, "base") == 8192


@pytest.mark.parametrize("model", ["base", "demo"])
def test_chat_and_its_stream_say_the_same(client: OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=24, temperature=0)
    assert whole.model in (model, f"{model}@v1"), "a reply names the version that gave it"
    assert whole.usage is not None and 0 < whole.usage.completion_tokens <= 24
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    endings = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert endings[-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_engine_counts_tokens(client: OpenAI, served: Served) -> None:
    counts = [count_tokens(client, served.adapter, "The ship" * times) for times in (1, 8)]
    assert counts[0] and counts[1] and counts[0] < counts[1]


def test_completions(client: OpenAI) -> None:
    done = client.completions.create(model="demo", prompt="The ship", max_tokens=8, temperature=0, logprobs=1)
    assert done.choices[0].logprobs is not None
    assert len(done.choices[0].logprobs.token_logprobs or []) == done.usage.completion_tokens  # type: ignore[union-attr]
    stream = client.completions.create(model="demo", prompt="The ship", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == done.choices[0].text


def test_several_replies_and_stop_words(client: OpenAI) -> None:
    done = client.chat.completions.create(model="base", messages=QUESTION, max_tokens=8, n=2, temperature=1, seed=1)
    assert len(done.choices) == 2
    text = client.completions.create(model="base", prompt="The ship", max_tokens=16, temperature=0).choices[0].text
    stop = text.strip().split(" ")[-1]
    cut = client.completions.create(model="base", prompt="The ship", max_tokens=16, temperature=0, stop=[stop])
    assert stop not in cut.choices[0].text


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="other", messages=QUESTION)


def test_too_long_a_prompt_is_refused_with_the_context(client: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "ship " * 9000}]
    with pytest.raises(BadRequestError, match="8192"):
        client.chat.completions.create(model="demo", messages=long, max_tokens=1)


def test_what_is_for_administrators_is_not_there(client: OpenAI) -> None:
    with pytest.raises(APIStatusError) as caught:
        client.post("/load_lora_adapter", cast_to=object, body={"lora_name": "x", "lora_path": "/x"})
    assert caught.value.status_code in (401, 403, 404)


def command(served: Served, *words: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    """A command of ours, which finds the endpoint by its record."""
    environment = {"LORAPORT_HOME": str(served.home.root), "PATH": "/usr/bin:/bin"}
    line = [sys.executable, "-m", "loraport_cli", *words]
    return subprocess.run(line, env=environment, input=lines, capture_output=True, text=True, timeout=120)


def test_chat_finds_the_endpoint_and_answers(served: Served) -> None:
    done = command(served, "chat", "--max-tokens", "16", "--temperature", "0", lines="hello\n/model base\nhello\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_chat_says_when_the_context_is_too_short(served: Served) -> None:
    done = command(served, "chat", lines="ship " * 9000 + "\n")
    assert done.returncode == 3
    assert "longer than the model's context of 8,192 tokens" in done.stderr


def test_env_names_the_endpoint(
    served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAPORT_HOME", str(served.home.root))
    env(json=True)
    document = json.loads(capfd.readouterr().out)
    assert document["OPENAI_BASE_URL"] == served.base_url
    assert (document["default_model"], document["context"]) == (served.adapter, 8192)

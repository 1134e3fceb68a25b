"""`loraport env`, the records it reads, and the words for what goes wrong with an endpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from loraport.clients.cli import env
from loraport.clients.endpoint import (
    EndpointRecord,
    api_key,
    endpoint_errors,
    find_base_url,
    process_identity,
    read_records,
)
from loraport.clients.errors import EndpointError, http_errors
from loraport.clients.home import Home
from loraport.clients.models import ModelCard, choose_model, connect, context_length, list_models
from tests.fake_openai import FakeOpenAI, Knobs


def silent(messages: list[dict[str, str]]) -> str:
    """Reply nothing."""
    return ""


def leave_record(home: Home, base_url: str, pid: int | None = None) -> None:
    """Write a record as `loraport serve` does."""
    process = process_identity(pid or os.getpid())
    EndpointRecord(base_url, 1, ["base", "demo"], ["demo"], 4096, process, None).write(home)


def test_the_lines_set_the_variables_of_a_shell(capfd: pytest.CaptureFixture[str]) -> None:
    with FakeOpenAI({"base": silent, "demo": silent}) as endpoint:
        env(f"{endpoint.base_url}/")
    captured = capfd.readouterr()
    asked = captured.out + 'echo "$OPENAI_API_BASE $OPENAI_BASE_URL $OPENAI_API_KEY"'
    said = subprocess.run(["sh", "-c", asked], capture_output=True, text=True, check=True).stdout
    assert said == f"{endpoint.base_url} {endpoint.base_url} loraport\n"
    assert all(line.startswith("export ") for line in captured.out.splitlines())
    assert "# models: base, demo" in captured.err


def test_values_are_quoted(capfd: pytest.CaptureFixture[str]) -> None:
    env("http://127.0.0.1:1/v1;touch$(id)")
    out = capfd.readouterr().out
    assert "OPENAI_BASE_URL='http://127.0.0.1:1/v1;touch$(id)'\n" in out


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_real_key_is_printed_only_when_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, json_wanted: bool
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with FakeOpenAI({"demo": silent}) as endpoint:
        env(endpoint.base_url, json=json_wanted)
        captured = capfd.readouterr()
        assert "sk-secret" not in captured.out + captured.err
        assert "is set already, in OPENAI_API_KEY" in captured.err
        env(endpoint.base_url, show_key=True, json=json_wanted)
        assert "sk-secret" in capfd.readouterr().out


@pytest.mark.parametrize("others", [{}, {"OPENAI_API_KEY": "sk-of-openai"}])
def test_our_own_key_is_referred_to_and_wins(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, others: dict[str, str]
) -> None:
    for name, value in {"LORAPORT_API_KEY": " lp-mine\n", **others}.items():
        monkeypatch.setenv(name, value)
    assert api_key() == "lp-mine"
    with FakeOpenAI({"demo": silent}, Knobs(key="lp-mine")) as endpoint:
        env(endpoint.base_url)
        captured = capfd.readouterr()
        assert "# models: demo" in captured.err
        assert "lp-mine" not in captured.out + captured.err
        asked = captured.out + 'echo "$OPENAI_API_KEY"'
        environment = {"LORAPORT_API_KEY": "lp-mine", **others}
        said = subprocess.run(["sh", "-c", asked], env=environment, capture_output=True, text=True, check=True).stdout
        assert said == "lp-mine\n"
        env(endpoint.base_url, show_key=True)
        assert "export OPENAI_API_KEY=lp-mine\n" in capfd.readouterr().out


def test_anthropics_clients(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOpenAI({"base": silent, "demo": silent}, Knobs(context=40_960)) as endpoint:
        env(endpoint.base_url, anthropic=True, json=True)
        values = json.loads(capfd.readouterr().out)
        monkeypatch.setenv("OPENAI_API_KEY", "lp-mine")
        env(endpoint.base_url, anthropic=True)
        lines = capfd.readouterr().out
    assert values["ANTHROPIC_BASE_URL"] == endpoint.origin  # without /v1
    assert values["ANTHROPIC_AUTH_TOKEN"] == "loraport"
    assert values["ANTHROPIC_MODEL"] == values["ANTHROPIC_SMALL_FAST_MODEL"] == "demo"
    assert values["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "8192"
    assert values["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "40960"
    assert not any(name.startswith("OPENAI") for name in values)
    assert 'export ANTHROPIC_AUTH_TOKEN="$OPENAI_API_KEY"\n' in lines and "lp-mine" not in lines


@pytest.mark.parametrize("variable", [None, "LORAPORT_API_KEY", "OPENAI_API_KEY"])
@pytest.mark.parametrize("command", ["chat", "eval", "aider"])
def test_a_wrong_or_missing_key_is_a_sentence_that_says_how_to_make_one(
    command: str, variable: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if variable:
        monkeypatch.setenv(variable, "lp-wrong")
    monkeypatch.setenv("AIDER", "/bin/true")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    )
    more = ["--data", str(tmp_path / "rows.jsonl")] if command == "eval" else []
    with FakeOpenAI({"demo": silent}, Knobs(key="lp-right")) as endpoint:
        line = [sys.executable, "-m", "loraport_cli", command, "--base-url", endpoint.base_url, *more]
        done = subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (3, "")
    assert "refuses the API key: Unauthorized." in done.stderr and "loraport keys create NAME" in done.stderr
    assert "lp-wrong" not in done.stderr and "Traceback" not in done.stderr


def test_an_endpoint_that_starts_or_forbids_says_so() -> None:
    with FakeOpenAI({"demo": silent}, Knobs(statuses=(503, 403))) as endpoint:
        client = connect(endpoint.base_url)
        for words in ("cannot answer now: as ordered", "does not allow it: as ordered"):
            with pytest.raises(EndpointError, match=words), endpoint_errors(endpoint.base_url):
                client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "a"}])


def test_json(capfd: pytest.CaptureFixture[str]) -> None:
    with FakeOpenAI({"base": silent, "demo": silent}) as endpoint:
        env(endpoint.base_url, json=True)
    document = json.loads(capfd.readouterr().out)
    assert document["models"] == ["base", "demo"]
    assert (document["default_model"], document["context"]) == ("demo", 1000)
    assert document["OPENAI_API_BASE"] == document["OPENAI_BASE_URL"] == endpoint.base_url


def test_an_endpoint_that_is_away_is_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    env("http://127.0.0.1:1/v1")
    captured = capfd.readouterr()
    assert "export OPENAI_BASE_URL=http://127.0.0.1:1/v1\n" in captured.out
    assert "warning: nothing answers" in captured.err


def test_without_an_endpoint_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EndpointError):
        env()
    assert capfd.readouterr().out == ""


def test_which_endpoint(home: Home, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    ended = subprocess.Popen(["sleep", "60"])
    EndpointRecord("http://ended/v1", 2, ["base"], [], None, process_identity(ended.pid), None).write(home)
    ended.kill()
    ended.wait()
    with pytest.raises(EndpointError, match="no endpoint of Loraport runs"):
        find_base_url(None, home)
    leave_record(home, "http://127.0.0.1:1/v1")
    (home.run / "broken.json").write_text("{")
    assert len(read_records(home)) == 2
    assert find_base_url(None, home) == "http://127.0.0.1:1/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:2/v1/")
    assert find_base_url(None, home) == "http://127.0.0.1:2/v1"
    assert find_base_url("http://127.0.0.1:3/v1", home) == "http://127.0.0.1:3/v1"
    env()  # what it prints is there to replace what is set
    assert "http://127.0.0.1:1/v1" in capfd.readouterr().out


def test_context_of_an_adapter_is_that_of_its_base() -> None:
    cards = [ModelCard("big", 9000), ModelCard("base", 4000), ModelCard("demo", None, "base"), ModelCard("odd")]
    assert [context_length(cards, card.id) for card in cards] == [9000, 4000, 4000, 4000]
    assert context_length([ModelCard("m")], "m") is None


def test_the_default_model(home: Home) -> None:
    cards = [ModelCard("base"), ModelCard("demo", None, "base"), ModelCard("other", None, "base")]
    assert choose_model(cards, None, None) == "demo"
    assert choose_model(cards[:1], None, None) == "base"
    record = EndpointRecord("http://x/v1", 1, ["base", "other"], ["other"], None, (1, 1.0), None)
    assert choose_model(cards, None, record) == "other"
    assert choose_model(cards[:2], None, record) == "demo"


@pytest.mark.parametrize(
    ("knobs", "path", "says"),
    [
        (Knobs(key="k"), "/v1", "refuses the API key"),
        (Knobs(), "", "says: Not Found"),
        (Knobs(), "/v2", "says: Not Found"),
    ],
)
def test_an_endpoint_that_refuses(knobs: Knobs, path: str, says: str) -> None:
    with FakeOpenAI({"demo": silent}, knobs) as endpoint, pytest.raises(EndpointError) as caught:
        list_models(connect(endpoint.base_url.removesuffix("/v1") + path))
    assert says in caught.value.message
    assert caught.value.hint


def test_an_endpoint_without_models() -> None:
    with FakeOpenAI({}) as endpoint, pytest.raises(EndpointError, match="has no models"):
        list_models(connect(endpoint.base_url))


def all_kinds(kind: type[Exception]) -> list[type[Exception]]:
    """`kind` and everything below it."""
    return [kind, *(below for direct in kind.__subclasses__() for below in all_kinds(direct))]


def test_every_error_of_the_clients_becomes_one_sentence() -> None:
    """No error of openai, httpx or httpx2 reaches a person as a traceback."""
    kinds = all_kinds(openai.OpenAIError)
    for name in ("HTTPError", "InvalidURL"):
        kinds += [below for kind in http_errors(name) for below in all_kinds(kind)]
    assert len(kinds) > 40
    for kind in kinds:
        error = kind.__new__(kind)
        error.args = ("boom",)
        vars(error).update(status_code=418, body={"message": "no.\n  really."}, message="boom")
        with pytest.raises(EndpointError) as caught, endpoint_errors("http://x/v1"):
            raise error
        assert caught.value.message.endswith(".") and "\n" not in caught.value.message, kind
        assert ".." not in caught.value.message and caught.value.hint, kind

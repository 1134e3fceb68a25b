"""`loraport aider` with a stand-in for Aider that says what it was started with."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraport.clients.aider import NO_FILES_FACTOR, budget, command, find_aider, metadata, settings
from loraport.clients.environment import Endpoint
from loraport.clients.errors import Refused, UsageError
from tests.conftest import ROOT
from tests.fake_openai import FakeOpenAI, Knobs

STAND_IN = """#!{python}
import json, os, sys
given = dict(zip(sys.argv, sys.argv[1:]))
read = lambda flag: json.load(open(given[flag]))
print(json.dumps({{"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ),
    "metadata": read("--model-metadata-file"), "settings": read("--model-settings-file")}}))
sys.exit(7)
"""


def silent(messages: list[dict[str, str]]) -> str:
    """Reply nothing."""
    return ""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in PATH by the name of aider."""
    path = tmp_path / "bin" / "aider"
    path.parent.mkdir()
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


def start(endpoint: FakeOpenAI, *arguments: str) -> tuple[subprocess.Popen[str], dict[str, Any], str]:
    """Run `loraport aider`; its process, what the stand-in says, and standard error."""
    command = [sys.executable, "-m", "loraport_cli", "aider", "--base-url", endpoint.base_url, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=60)
    return process, json.loads(out) if out else {}, err


def test_aider_is_told_model_context_and_endpoint(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with FakeOpenAI({"base": silent, "demo": silent}, Knobs(context=40_000)) as endpoint:
        process, seen, err = start(endpoint, "--message", "add a test", "-m", "x", "a.py", "--", "--help")
    assert (process.returncode, seen["pid"]) == (7, process.pid)  # it took our place
    assert seen["argv"][:2] == ["--model", "openai/demo"]
    assert seen["argv"][-6:] == ["--message", "add a test", "-m", "x", "a.py", "--help"]
    assert {"--no-analytics", "--no-check-update"} <= set(seen["argv"])
    assert seen["env"]["OPENAI_API_BASE"] == endpoint.base_url
    assert seen["env"]["OPENAI_API_KEY"] == "sk-secret"
    assert "sk-secret" not in " ".join(seen["argv"]) + err
    assert seen["env"]["LITELLM_LOCAL_MODEL_COST_MAP"] == "True"
    assert seen["metadata"]["openai/demo"]["max_input_tokens"] == 40_000 - 8192 - 625
    assert seen["argv"][seen["argv"].index("--map-tokens") + 1] == "3897"
    assert seen["settings"][0]["extra_params"] == {"max_tokens": 8192}
    assert {one["name"] for one in seen["settings"]} == {"openai/base", "openai/demo"}
    assert f"Aider with demo at {endpoint.base_url}, context 40,000 tokens" in err
    assert "warning" not in err


@pytest.mark.parametrize("name", ["base", "openai/base"])
def test_another_model_and_a_short_context(stand_in: Path, name: str) -> None:
    with FakeOpenAI({"base": silent, "demo": silent}, Knobs(context=8192)) as endpoint:
        _, seen, err = start(endpoint, "--model", name)
    assert seen["argv"][:2] == ["--model", "openai/base"]
    assert "needs a context of about 16,384 tokens" in err


def test_a_model_that_is_not_there(stand_in: Path) -> None:
    with FakeOpenAI({"base": silent}) as endpoint:
        process, seen, err = start(endpoint, "--model", "demo")
    assert (process.returncode, seen) == (2, {})
    assert "it has: base" in err


def test_no_endpoint(stand_in: Path) -> None:
    endpoint = FakeOpenAI({"base": silent})
    endpoint.server.server_close()
    process, seen, err = start(endpoint)
    assert (process.returncode, seen) == (3, {})
    assert "nothing answers" in err


def test_aider_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("AIDER", raising=False)
    with pytest.raises(Refused) as caught:
        find_aider()
    assert caught.value.exit_code == 3
    assert all(tool in caught.value.hint for tool in ("uv tool install aider-chat", "pipx", "pip install aider-chat"))
    monkeypatch.setenv("AIDER", str(tmp_path / "aider"))
    with pytest.raises(UsageError, match="is not a program"):
        find_aider()


def test_aider_variable_names_it(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("AIDER", str(stand_in))
    assert find_aider() == stand_in


def test_what_is_known_of_an_endpoint_without_context() -> None:
    endpoint = Endpoint("http://x/v1", ["m"], "m")
    assert "max_input_tokens" not in metadata(endpoint, None)["openai/m"]
    assert metadata(endpoint, None)["openai/m"]  # an empty entry would send Aider to the internet
    assert settings(endpoint, None)[0]["use_repo_map"] is False
    assert "extra_params" not in settings(endpoint, None)[0]
    line = command(Path("aider"), endpoint, None, Path("folder"), [])
    assert line[line.index("--map-tokens") + 1] == "0" and "--max-chat-history-tokens" not in line


@pytest.mark.parametrize("context", [512, 4096, 8192, 16_384, 40_960, 131_072])
@pytest.mark.parametrize("tokens_each", [0.5, 1.0, 1.4, 3.0])
def test_the_parts_of_a_context_fit(context: int, tokens_each: float) -> None:
    parts = budget(context, tokens_each)
    assert parts.reply + parts.prompt * max(1.0, tokens_each) <= context
    # half of the prompt is left for files and question, also where the map is larger because no file is in the chat
    assert 2 * parts.repo_map + parts.history <= parts.prompt / 2
    assert parts.repo_map == 0 or 512 <= parts.repo_map <= 4096


def test_a_tokenizer_that_needs_more_tokens_leaves_less_room(stand_in: Path) -> None:
    with FakeOpenAI({"demo": silent}, Knobs(context=40_000, tokenizes=True)) as endpoint:  # a character is a token
        _, seen, err = start(endpoint, "--no-thinking")
    card = seen["metadata"]["openai/demo"]
    assert card["max_input_tokens"] < (40_000 - 8192) / 3 and card["max_output_tokens"] == 8192
    assert "no repo map" not in err and "8,192 tokens for a reply" in err
    extra = seen["settings"][0]["extra_params"]
    assert extra["extra_body"] == {"chat_template_kwargs": {"enable_thinking": False}}
    assert "--no-thinking" not in seen["argv"]


def test_the_page_on_clients_is_right() -> None:
    """Its table of contexts is what is computed, and its YAML can be read."""
    text = (ROOT / "docs" / "clients.md").read_text()
    rows = re.findall(r"^\| (\d+,\d{3}) \| (.+) \|$", text, re.M)
    assert len(rows) == 4
    for context, cells in rows:
        parts = budget(int(context.replace(",", "")))
        numbers = (parts.reply, parts.prompt, parts.repo_map, NO_FILES_FACTOR * parts.repo_map, parts.history)
        assert cells.split(" | ") == [f"{number:,}" if number else "none" for number in numbers]
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    assert [type(block) for block in blocks] == [list, dict]

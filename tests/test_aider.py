"""The real Aider, from its own environment, started by `loraport aider`, without a person.

Against an endpoint that writes down what it is asked and replies with the edit: everything that Aider sends stays
within contexts of 4k to 40k tokens, in a repository of 200 files. Against the real engine,
whose models here are far too small to write code: Aider finds endpoint, model and context, gets a reply, and needs no
internet for it.
"""

import json
import os
import re
import subprocess
import sys
import venv
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraport.clients.aider import SAMPLE, SAMPLE_TOKENS, budget
from loraport.serve.gateway.context import overflow
from loraport.serve.gateway.refusals import Refusal
from tests.conftest import ROOT, Served
from tests.loopback import Loopback

pytestmark = pytest.mark.aider
AIDER = "aider-chat==0.86.2"
BOUND_S = 420  # half a minute on a quiet machine; a process that looks for the internet may hang


@pytest.fixture(scope="session")
def aider() -> Path:
    """Aider's program in .venv-aider, which is made when it is not there and kept for the next time."""
    folder = ROOT / ".venv-aider"
    stamp, program = folder / "installed", folder / "bin" / "aider"
    if not stamp.is_file() or stamp.read_text() != AIDER:
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", AIDER]
        done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0 and not os.environ.get("CI"):
            pytest.skip(f"{AIDER} cannot be installed here: {done.stdout[-500:]}")
        assert done.returncode == 0, done.stdout
        stamp.write_text(AIDER)
    return program


class Recorder(Loopback):
    """An endpoint with one model, whose tokens are `tokens_each` of Aider's. `asked`: bodies of chat requests."""

    def __init__(self, context: int, tokens_each: float, reply: str, refusal: Refusal | None = None) -> None:
        self.context, self.tokens_each, self.text, self.refusal = context, tokens_each, reply, refusal
        self.asked: list[dict[str, Any]] = []
        super().__init__(RecorderHandler)


class RecorderHandler(BaseHTTPRequestHandler):
    """One request."""

    owner: Recorder
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """The model."""
        self.reply({"object": "list", "data": [{"id": "demo", "object": "model", "max_model_len": self.owner.context}]})

    def do_POST(self) -> None:
        """The count of the sample, or the reply that was ordered."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            assert body["prompt"] == SAMPLE
            self.reply({"count": round(SAMPLE_TOKENS * self.owner.tokens_each)})
        elif self.owner.refusal:
            self.owner.asked.append(body)
            self.reply(self.owner.refusal.document(), self.owner.refusal.status)
        else:
            self.owner.asked.append(body)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.owner.text}}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            self.reply({"id": "x", "object": "chat.completion", "created": 0, "choices": [choice], "usage": usage})

    def reply(self, document: dict[str, Any], status: int = 200) -> None:
        """A JSON reply."""
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


EDIT = "ship.py\n```\nSHIP = 'Aurora'\n```\n"
METHOD = """
    def method_{one}_{two}(self, value: int, other: str) -> int:
        return helper_{three}(value, other)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git repository of 201 files that call each other."""
    folder = tmp_path / "project"
    for one in range(200):
        path = folder / f"package_{one % 10}" / f"module_{one}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        methods = "".join(METHOD.format(one=one, two=two, three=(one * 7 + two) % 200) for two in range(8))
        path.write_text(f"class Thing{one}:{methods}\n\ndef helper_{one}(value, other):\n    return Thing{one}()\n")
    (folder / "ship.py").write_text("NAME = 'Aurora'\n")
    for line in ("init -q", "add .", "-c user.name=a -c user.email=a@b.c commit -qm files"):
        subprocess.run(["git", *line.split()], cwd=folder, check=True)
    return folder


def run_aider(aider: Path, project: Path, endpoint: Recorder, *arguments: str) -> str:
    """`loraport aider` against an endpoint; what it printed."""
    private = project.parent / "private"
    private.mkdir(exist_ok=True)
    line = [sys.executable, "-m", "loraport_cli", "aider", "--base-url", f"{endpoint.origin}/v1", *arguments]
    line += ["--yes-always", "--no-pretty", "--no-stream", "--no-gitignore", "--map-refresh", "always"]
    environment = {"PATH": os.environ["PATH"], "AIDER": str(aider), "HOME": str(private), "LORAPORT_API_KEY": "lp-x"}
    environment |= {"LORAPORT_HOME": str(private / "home")}
    done = subprocess.run(
        line,
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BOUND_S,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout and "lp-x" not in done.stdout
    return done.stdout


def count_as_aider(aider: Path, asked: list[dict[str, Any]]) -> list[int]:
    """Tokens of the prompts of requests, as Aider counts them; the sample comes first."""
    code = """
import json, sys, litellm
count = lambda **given: litellm.token_counter(model="openai/demo", **given)
sample, asked = json.load(sys.stdin)
print(json.dumps([count(text=sample), *(count(messages=body["messages"]) for body in asked)]))
"""
    done = subprocess.run(
        [str(aider.parent / "python"), "-c", code],
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        input=json.dumps([SAMPLE, asked]),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [int(tokens) for tokens in json.loads(done.stdout)]


@pytest.mark.parametrize(("context", "tokens_each"), [(4096, 1.0), (8192, 1.0), (16384, 2.0), (40960, 1.0)])
def test_an_edit_in_a_repository_of_200_files_fits(
    aider: Path, project: Path, context: int, tokens_each: float
) -> None:
    with Recorder(context, tokens_each, EDIT) as endpoint:
        said = run_aider(aider, project, endpoint, "--message", "Rename NAME to SHIP.")
    assert (project / "ship.py").read_text() == "SHIP = 'Aurora'\n"
    sample, *prompts = count_as_aider(aider, endpoint.asked)
    assert sample == SAMPLE_TOKENS  # Aider still counts as it did when the sample was counted
    assert len(prompts) == 3  # without a file, with the file that Aider found by its name, the commit message
    limit = budget(context, tokens_each)
    for body, tokens in zip(endpoint.asked, prompts, strict=True):
        assert body["max_tokens"] == limit.reply and "temperature" not in body
        assert tokens * tokens_each + body["max_tokens"] <= context
    shown = [name for name in ("package_3/module_13.py", "Thing") if name in json.dumps(endpoint.asked[0]["messages"])]
    assert bool(shown) is (limit.repo_map > 0) is (context > 4096)
    assert limit.repo_map * 0.5 < prompts[0] - 600 < limit.prompt / 2 or not limit.repo_map
    assert ("needs a context of about 16,384" in said) is (context < 16384)


def test_aider_understands_an_overflow(aider: Path, project: Path) -> None:
    """Its conversations can outgrow any context: 0.86.2 throws most of its summaries away (docs/clients.md)."""
    refusal = overflow("/v1/chat/completions", 8192, 9000, 2048)
    with Recorder(8192, 1.0, EDIT, refusal) as endpoint:
        said = run_aider(aider, project, endpoint, "--message", "Rename NAME to SHIP.", "ship.py")
    assert len(endpoint.asked) == 1, "it asked again for what cannot fit"
    assert "Model openai/demo has hit a token limit!" in said
    assert (project / "ship.py").read_text() == "NAME = 'Aurora'\n"


def prompt_tokens(served: Served) -> float:
    """Tokens of all prompts that the engine has read so far."""
    text = httpx.get(f"{served.base_url.removesuffix('/v1')}/metrics", timeout=30).text
    return sum(float(value) for value in re.findall(r"^vllm:prompt_tokens_total{.*} (\S+)$", text, re.M))


@pytest.mark.engine
def test_aider_without_a_person(aider: Path, served: Served, tmp_path: Path) -> None:
    project, private = tmp_path / "project", tmp_path / "home"
    project.mkdir()
    private.mkdir()
    (project / "ship.py").write_text("NAME = 'Aurora'\n")
    (project / "first").write_text("/tokens\n")
    environment = {"AIDER": str(aider), "LORAPORT_HOME": str(served.home.root), "HOME": str(private)}
    line = [sys.executable, "-m", "loraport_cli", "aider", "--yes-always", "--no-git", "--no-pretty"]
    # Not streamed: litellm refuses streams that repeat themselves, as models of this size may.
    line += ["--no-stream", "--load", "first", "--message", "Rename NAME to SHIP.", "ship.py"]
    before = prompt_tokens(served)
    done = subprocess.run(
        line,
        cwd=project,
        env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BOUND_S,
    )
    assert done.returncode == 0, done.stdout
    assert f"Aider with {served.adapter} at {served.base_url}, context 8,192 tokens" in done.stdout
    assert f"Model: openai/{served.adapter} with whole edit format" in done.stdout
    assert re.search(r"[2-6],\d{3} tokens max context window size", done.stdout)  # without what is kept for the reply
    assert prompt_tokens(served) > before + 100
    assert re.search(r"Tokens: [1-9].* sent|hit a token limit", done.stdout), done.stdout  # a reply, or one cut
    for trouble in ("Traceback", "litellm.", "Unknown context window", "raw.githubusercontent"):
        assert trouble not in done.stdout

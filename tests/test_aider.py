"""The real Aider, from its own environment, started by `loraport aider` against the real engine, without a person.

The models here are far too small to write code. What is shown is that Aider finds the endpoint, the model and its
context, gets a reply, and needs no internet for it.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, Served

pytestmark = [pytest.mark.engine, pytest.mark.aider]
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


def prompt_tokens(served: Served) -> float:
    """Tokens of all prompts that the engine has read so far."""
    text = httpx.get(f"{served.base_url.removesuffix('/v1')}/metrics", timeout=30).text
    return sum(float(value) for value in re.findall(r"^vllm:prompt_tokens_total{.*} (\S+)$", text, re.M))


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
    assert "6,144 tokens max context window size" in done.stdout  # 8,192 without what is kept for the reply
    assert prompt_tokens(served) > before + 100
    assert re.search(r"Tokens: [1-9].* sent|hit a token limit", done.stdout), done.stdout  # a reply, or one cut
    for trouble in ("Traceback", "litellm.", "Unknown context window", "raw.githubusercontent"):
        assert trouble not in done.stdout

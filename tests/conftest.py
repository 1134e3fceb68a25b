"""Fixtures: a private home for each test, a tiny real base, and one real endpoint for the whole session."""

import os
from pathlib import Path

import pytest

from loraport.clients.home import Home
from tests.models import make_tiny_base

ROOT = Path(__file__).parent.parent
for variable in ("OPENAI_API_BASE", "OPENAI_BASE_URL", "OPENAI_API_KEY", "LORAPORT_HOME"):
    os.environ.pop(variable, None)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home of its own for each test, also for the processes that it starts."""
    monkeypatch.setenv("LORAPORT_HOME", str(tmp_path / "home"))
    return Home(tmp_path / "home")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose template marks the assistant's turns."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "tiny-base")

"""Fixtures: a private home for each test, a tiny real base, and one real endpoint for the whole session."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest

from loraport.clients.home import Home
from tests.models import make_tiny_base

if TYPE_CHECKING:
    from tests.postgres import Postgres

ROOT = Path(__file__).parent.parent
# A shell that starts the tests in the background makes them ignore Ctrl-C, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup; a handler, unlike that, is not inherited
    signal.signal(signal.SIGHUP, lambda *_: None)
# The tests of this process are the same on every machine; only the real engine may see a GPU.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for variable in ("OPENAI_API_BASE", "OPENAI_BASE_URL", "OPENAI_API_KEY", "LORAPORT_API_KEY", "LORAPORT_HOME"):
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


@dataclass(frozen=True)
class Served:
    """The demo, trained and served as a user would, for all tests of the session."""

    base_url: str
    adapter: str
    home: Home
    ready: dict[str, Any]  # the document of `loraport serve --json`
    trained: dict[str, Any]  # the document of `loraport train --json`


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`loraport train` and `loraport serve` on the demo, with the real vLLM, once for the session."""
    home = Home(tmp_path_factory.mktemp("served") / "home")
    environment = dict(os.environ) | {"LORAPORT_HOME": str(home.root)}
    if GPUS is None:
        del environment["CUDA_VISIBLE_DEVICES"]
    else:
        environment["CUDA_VISIBLE_DEVICES"] = GPUS
    loraport = [sys.executable, "-m", "loraport_cli"]
    train = [*loraport, "train", "--config", str(ROOT / "examples/demo/train.yaml"), "--json"]
    trained = subprocess.run(train, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    serve = [*loraport, "serve", "demo", "--port", str(free_port()), "--json"]
    process = subprocess.Popen(serve, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        document = read_document(process.stdout)
        yield Served(document["base_url"], "demo", home, document, json.loads(trained.stdout))
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.fixture(scope="session")
def postgres() -> "Iterator[Postgres]":
    """A real PostgreSQL, once for the session; a test takes a database of its own."""
    from tests.postgres import Postgres

    # Not below pytest's own folder, which each pytest that starts closes to all other users, the server's too.
    with TemporaryDirectory(prefix="loraport-postgres-") as name, Postgres.started(Path(name) / "server") as running:
        yield running


def read_document(lines: Iterable[str]) -> dict[str, Any]:
    """The one JSON document of a command that goes on running; fails when the command ends before it."""
    text = ""
    for line in lines:
        text += line
        if line.rstrip() == "}":
            return dict(json.loads(text))
    raise AssertionError(f"the command ended before it was ready: {text}")


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""A gateway in a thread of the tests, in front of a real process that stands in for the engine."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from loraport.serve.gateway.app import create_app
from loraport.serve.gateway.server import Running, run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.state import EngineState, Model
from tests.conftest import free_port
from tests.serving import wait_until

CONTEXT = 1000
CHAT = "/v1/chat/completions"
MODELS = (
    Model("base", max_model_len=CONTEXT),
    Model(
        "demo", "adapter", parent="base", version="3", max_model_len=CONTEXT, verified=True, aliases=("demo:latest",)
    ),
)


def asking(content: str = "hi", **more: Any) -> dict[str, Any]:
    """A chat request of a few words."""
    return {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 4} | more


class FakeEngine:
    """The engine as a process."""

    def __init__(
        self,
        uds: Path | None = None,
        called: tuple[str, ...] = ("base", "demo", "demo@3"),
        slots: int = 1,
        **knobs: str,
    ) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        fake = [sys.executable, str(Path(__file__).with_name("fake_engine.py")), "--model", "m"]
        names = ["--served-model-name", *called, "--max-loras", str(slots)]
        where = ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], *(["--uds", str(uds)] if uds else [])]
        environment = os.environ | {f"FAKE_{name.upper()}": value for name, value in knobs.items()}
        self.process = subprocess.Popen(
            [*fake, *names, *where, "--max-model-len", str(CONTEXT)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        transport = httpx.HTTPTransport(uds=str(uds)) if uds else None
        self.client = httpx.Client(base_url=self.url, transport=transport, trust_env=False)
        wait_until(self.answers, "the fake engine")

    def answers(self) -> bool:
        """Whether it is up."""
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/health").status_code == 200
        return False

    def seen(self) -> dict[str, Any]:
        """What reached it."""
        return dict(self.client.get("/seen").json())

    def bodies(self, path: str = CHAT) -> list[str]:
        """Bodies of the requests to a route, as received."""
        return [request["body"] for request in self.seen()["requests"] if request["path"] == path]

    def end(self) -> None:
        """End it, if it has not ended."""
        self.client.close()
        self.process.kill()
        self.process.wait()


@dataclass
class Gated:
    """A gateway, its engine, and a client of it."""

    engine: FakeEngine
    state: EngineState
    running: Running
    client: httpx.Client

    def chat(self, **more: Any) -> httpx.Response:
        """A chat request through the gateway."""
        return self.client.post(CHAT, json=asking(**more))


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in OpenAI's shape; fails for another shape."""
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    return dict(error)


@contextlib.contextmanager
def gated(settings: dict[str, Any] | None = None, uds: Path | None = None, **knobs: str) -> Iterator[Gated]:
    """A gateway that is ready, in front of a fake engine with these knobs."""
    engine, state = FakeEngine(uds, **knobs), EngineState()
    try:
        state.ready(MODELS, None if uds else engine.url, str(uds) if uds else None)
        given = {"host": "127.0.0.1", "port": 0} | (settings or {})
        with (
            run_in_thread(create_app(state, GatewaySettings(**given)), "127.0.0.1", 0) as running,
            httpx.Client(base_url=running.url, trust_env=False, timeout=60) as client,
        ):
            yield Gated(engine, state, running, client)
    finally:
        engine.end()

"""`python -m loraport.serve.gateway`: the gateway alone, in front of a vLLM that runs already."""

import signal
import threading
from typing import Annotated

import typer

from loraport.clients.errors import LoraportError
from loraport.clients.home import Home
from loraport.clients.terminal import exit_with, say
from loraport.serve.gateway.app import create_app
from loraport.serve.gateway.calls import log_to
from loraport.serve.gateway.server import run_in_thread
from loraport.serve.gateway.settings import GatewaySettings
from loraport.serve.gateway.standalone import follow
from loraport.serve.gateway.state import EngineState, Phase

DRAIN_S = 30.0


def main(
    engine: Annotated[str, typer.Option(help="Base URL of the engine.")] = "http://127.0.0.1:8001",
    uds: Annotated[str | None, typer.Option(help="Unix socket of the engine.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    origin: Annotated[list[str] | None, typer.Option(help="A web page whose scripts may ask; once for each.")] = None,
) -> None:
    """Answer for an engine that runs already, until Ctrl-C or SIGTERM."""
    home = Home.default()
    state, end = EngineState(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: end.set())
    try:
        home.ensure(home.logs)
        log_to(home.logs / f"gateway-{port}.log")
        usage = home.root / "usage" / f"{port}.json"
        settings = GatewaySettings(host, port, home.keys, usage, origins=tuple(origin or ()))
        running = run_in_thread(create_app(state, settings), host, port)
    except LoraportError as error:
        exit_with(error, debug=False)
    with running:
        say(f"{running.url}/v1 answers for {uds or engine}")
        follow(state, engine, uds, end)
        state.begin(Phase.DRAINING, "it is being stopped")
        running.stop(DRAIN_S)


if __name__ == "__main__":
    typer.run(main)

"""The gateway in front of an engine that somebody else runs: its models are read from it, its health is watched.

python -m loraport.serve.gateway --engine http://127.0.0.1:8001 --port 8000
"""

import threading
from typing import Any

import httpx

from loraport.serve.gateway.state import EngineState, Model, Phase

WATCH_S = 2.0


def read_models(base_url: str, uds: str | None = None) -> list[Model]:
    """The models that an engine lists; httpx.HTTPError or ValueError where it does not.

    vLLM gives adapters no context of their own: they have their base's.
    """
    transport = httpx.HTTPTransport(uds=uds) if uds else None
    with httpx.Client(transport=transport, timeout=5, trust_env=False) as client:
        response = client.get(f"{base_url}/v1/models").raise_for_status()
    cards = response.json()["data"]
    limit = next((card["max_model_len"] for card in cards if card.get("max_model_len")), None)
    return [as_model(card, limit) for card in cards]


def as_model(card: dict[str, Any], limit: int | None) -> Model:
    """A model from vLLM's card."""
    parent = card.get("parent")
    return Model(
        id=card["id"],
        kind="adapter" if parent else "base",
        root=None if parent else card.get("root"),  # of an adapter: a path of this machine
        parent=parent,
        max_model_len=card.get("max_model_len") or limit,
        created=card.get("created") or 0,
    )


def follow(engine: EngineState, base_url: str, uds: str | None, end: threading.Event) -> None:
    """Keep the state as the engine is, until `end`. An engine that is silent is down where it was up once."""
    base_url = base_url.removesuffix("/").removesuffix("/v1")
    while True:
        try:
            models = read_models(base_url, uds)
            if engine.snapshot.phase is not Phase.READY or list(engine.snapshot.models) != models:
                engine.ready(models, base_url, uds)
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            was_up = engine.snapshot.phase in (Phase.READY, Phase.DOWN)
            phase = Phase.DOWN if was_up else Phase.STARTING
            if engine.snapshot.phase is not phase or not engine.snapshot.reason:
                engine.begin(phase, "it does not answer")
        if end.wait(WATCH_S):
            return

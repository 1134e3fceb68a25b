"""What the gateway knows of its engine: phase, address and models, told by whoever runs the engine, from any thread.

A reader takes one `Snapshot`, which never changes; a writer replaces it. Nothing is asked of the engine here.

    >>> engine = EngineState()
    >>> engine.begin(Phase.STARTING, "loading weights", expected_s=20)
    >>> engine.ready([Model("base")], base_url="http://127.0.0.1:8001")
    >>> engine.snapshot.find("base").id
    'base'
"""

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from math import ceil
from typing import Any, Literal


class Phase(StrEnum):
    """What the engine is doing; only READY takes requests."""

    STARTING = "starting"
    LOADING = "loading"
    COMPILING = "compiling"
    VERIFYING = "verifying"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    DOWN = "down"


RETRY_S = 5  # where nobody knows how long it takes


@dataclass(frozen=True)
class Model:
    """A model that requests may name. `engine_name` is what the engine calls it, where that differs from `id`.

    `defaults`: fields that go to the engine where a request does not name them (body.fill_defaults).
    """

    id: str
    kind: Literal["base", "adapter"] = "base"
    root: str | None = None
    parent: str | None = None
    version: str | None = None
    max_model_len: int | None = None
    verified: bool | None = None
    aliases: tuple[str, ...] = ()
    engine_name: str | None = None
    created: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def asked_as(self) -> str:
        """The name that goes to the engine."""
        return self.engine_name or self.id


@dataclass(frozen=True)
class Target:
    """Where the engine listens: a base URL without /v1, through the Unix socket `uds` where there is one."""

    base_url: str = "http://127.0.0.1:8001"
    uds: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """The engine at one moment. `since` and `expected_s` count on the monotonic clock."""

    phase: Phase = Phase.STARTING
    reason: str = ""
    since: float = field(default_factory=time.monotonic)
    expected_s: float | None = None
    target: Target = Target()
    models: tuple[Model, ...] = ()

    def left_s(self, now: float | None = None) -> int | None:
        """Whole seconds until the phase should be over, at least 1; None when nobody knows."""
        if self.expected_s is None:
            return None
        return max(1, ceil(self.since + self.expected_s - (time.monotonic() if now is None else now)))

    def find(self, name: str) -> Model | None:
        """The model of that id or alias."""
        return next((model for model in self.models if name == model.id or name in model.aliases), None)


def closest(name: str, known: Sequence[str]) -> str | None:
    """The known name that is most like `name`, if one is."""
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.6)), None)


class EngineState:
    """The changing side: one writer at a time, any number of readers."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self._lock = threading.Lock()
        self._snapshot = snapshot or Snapshot()

    @property
    def snapshot(self) -> Snapshot:
        """The engine as it is now."""
        return self._snapshot

    def begin(self, phase: Phase, reason: str = "", expected_s: float | None = None) -> None:
        """Enter a phase; `reason` in words, `expected_s` until the engine should be ready."""
        with self._lock:
            now = time.monotonic()
            self._snapshot = replace(self._snapshot, phase=phase, reason=reason, since=now, expected_s=expected_s)

    def ready(self, models: Sequence[Model], base_url: str | None = None, uds: str | None = None) -> None:
        """Take requests for `models` from now on, at `base_url` or where the engine was before."""
        with self._lock:
            target = self._snapshot.target
            if base_url or uds:
                target = Target((base_url or "http://engine").removesuffix("/").removesuffix("/v1"), uds)
            self._snapshot = Snapshot(Phase.READY, target=target, models=tuple(models))

    def put(self, *models: Model, drop: Collection[str] = ()) -> None:
        """Add models or replace those of the same ids, and forget those of `drop`, all from one request to the next.

        Requests under way keep what they were given.
        """
        with self._lock:
            gone = {model.id for model in models} | set(drop)
            others = [known for known in self._snapshot.models if known.id not in gone]
            self._snapshot = replace(self._snapshot, models=(*others, *models))

    def drop(self, name: str) -> None:
        """Forget a model; unknown names are fine."""
        with self._lock:
            left = tuple(known for known in self._snapshot.models if known.id != name)
            self._snapshot = replace(self._snapshot, models=left)

"""What the gateway knows of its engines: phase, address and models, told by whoever runs them, from any thread.

An endpoint has one engine or several replicas, which serve the same models. A reader takes one `Snapshot`, which never
changes; a writer replaces it. Nothing is asked of an engine here.

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
    """What an engine is doing; only READY takes requests."""

    STARTING = "starting"
    LOADING = "loading"
    COMPILING = "compiling"
    VERIFYING = "verifying"
    READY = "ready"
    RESTARTING = "restarting"
    SUSPENDED = "suspended"
    DRAINING = "draining"
    DOWN = "down"


# How near to its first request an engine is: that nearest says the phase of all.
NEAREST = (
    *(Phase.READY, Phase.DRAINING, Phase.VERIFYING, Phase.COMPILING, Phase.LOADING, Phase.STARTING),
    *(Phase.RESTARTING, Phase.SUSPENDED, Phase.DOWN),
)
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
class Replica:
    """One engine at one moment. `since` and `expected_s` count on the monotonic clock.

    `was_ready`: in the phase before this one.
    """

    phase: Phase = Phase.STARTING
    reason: str = ""
    since: float = field(default_factory=time.monotonic)
    expected_s: float | None = None
    target: Target = Target()
    was_ready: bool = False

    @property
    def answers(self) -> bool:
        """Whether it is ready, or was until all were told to stop, or to leave."""
        return self.phase is Phase.READY or (self.phase in (Phase.DRAINING, Phase.SUSPENDED) and self.was_ready)

    def left_s(self, now: float | None = None) -> int | None:
        """Whole seconds until the phase should be over; None when nobody knows, or it should be over by now."""
        if self.expected_s is None:
            return None
        left = ceil(self.since + self.expected_s - (time.monotonic() if now is None else now))
        return left if left > 0 else None

    @property
    def is_overdue(self) -> bool:
        """Whether the phase takes longer than it usually does."""
        return self.expected_s is not None and self.left_s() is None


@dataclass(frozen=True)
class Snapshot:
    """The engines at one moment, and the models that each of them answers for while it is ready."""

    replicas: tuple[Replica, ...] = field(default_factory=lambda: (Replica(),))
    models: tuple[Model, ...] = ()

    @property
    def best(self) -> Replica:
        """The engine that is ready, or will be first. What it says, the endpoint says."""
        return min(self.replicas, key=lambda replica: NEAREST.index(replica.phase))

    @property
    def phase(self) -> Phase:
        """READY while at least one engine is."""
        return self.best.phase

    @property
    def reason(self) -> str:
        """In words; empty where there is nothing to say."""
        return self.best.reason

    @property
    def since(self) -> float:
        """When that phase began."""
        return self.best.since

    @property
    def is_overdue(self) -> bool:
        """Whether that phase takes longer than it usually does."""
        return self.best.is_overdue

    def left_s(self, now: float | None = None) -> int | None:
        """Whole seconds until that phase should be over; None when nobody knows, or it should be over by now."""
        return self.best.left_s(now)

    @property
    def ready(self) -> dict[int, Target]:
        """The engines that take requests, by their numbers."""
        return {number: each.target for number, each in enumerate(self.replicas) if each.phase is Phase.READY}

    @property
    def reachable(self) -> dict[int, Target]:
        """The engines that answer: those, and while it is stopped those that were ready, for what was let in before."""
        return {number: each.target for number, each in enumerate(self.replicas) if each.answers}

    def find(self, name: str) -> Model | None:
        """The model of that id or alias."""
        return next((model for model in self.models if name == model.id or name in model.aliases), None)


def closest(name: str, known: Sequence[str]) -> str | None:
    """The known name that is most like `name`, if one is."""
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.6)), None)


def may_follow(before: Phase, after: Phase) -> bool:
    """Whether an engine may go from one phase to the other because somebody says so: what is stopped or away stays."""
    if before is Phase.DRAINING or (before is Phase.DOWN and after is Phase.SUSPENDED):
        return False
    return before is not Phase.SUSPENDED or after in (Phase.SUSPENDED, Phase.DRAINING)


class EngineState:
    """The changing side: one writer at a time, any number of readers."""

    def __init__(self, replicas: int = 1) -> None:
        self._lock = threading.Lock()
        self._snapshot = Snapshot((Replica(),) * replicas)

    @property
    def snapshot(self) -> Snapshot:
        """The engines as they are now."""
        return self._snapshot

    def begin(
        self, phase: Phase, reason: str = "", expected_s: float | None = None, replica: int | None = None
    ) -> None:
        """Enter a phase, with one replica or with all; `reason` in words, `expected_s` until it should be ready.

        After DRAINING nothing changes: what engines that still start have to say is of no use to anybody. The same with
        SUSPENDED until `resume`, except that it may be said again, with another reason, and be stopped.
        """
        with self._lock:
            self._enter(replica, phase=phase, reason=reason, expected_s=expected_s)

    def resume(self, reason: str = "", expected_s: float | None = None) -> None:
        """The engines that were suspended start again."""
        with self._lock:
            self._enter(None, is_over=True, phase=Phase.RESTARTING, reason=reason, expected_s=expected_s)

    def ready(
        self,
        models: Sequence[Model] | None = None,
        base_url: str | None = None,
        uds: str | None = None,
        replica: int = 0,
    ) -> None:
        """Take requests with this replica from now on, at `base_url` or where it was before.

        For `models` and no others; without, for those that were put.
        """
        with self._lock:
            target = self._snapshot.replicas[replica].target
            if base_url or uds:
                target = Target((base_url or "http://engine").removesuffix("/").removesuffix("/v1"), uds)
            if models is not None:
                self._snapshot = replace(self._snapshot, models=tuple(models))
            self._enter(replica, phase=Phase.READY, reason="", expected_s=None, target=target)

    def _enter(self, replica: int | None, is_over: bool = False, **fields: Any) -> None:
        """Change one replica or all, but none that must stay as it is. `is_over`: those that are suspended, alone."""
        replicas = list(self._snapshot.replicas)
        for number, known in enumerate(replicas):
            is_meant = known.phase is Phase.SUSPENDED if is_over else replica in (None, number)
            if is_meant and (is_over or may_follow(known.phase, fields["phase"])):
                was = known.phase is Phase.READY
                replicas[number] = replace(known, since=time.monotonic(), was_ready=was, **fields)
        self._snapshot = replace(self._snapshot, replicas=tuple(replicas))

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

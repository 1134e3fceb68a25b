"""The adapters of a running engine: loaded, proven, replaced, rolled back and unloaded while requests go on.

What is asked for (`demo`) and what the engine holds (`demo@v3`) are two names. A load puts the new version beside the
old one, replays its golden replies, asks base and adapters at the same moment, and only then says to the gateway that
`demo` is `demo@v3`: from one request to the next. The version before stays as `demo:prev` as long as there is room,
and one that nobody may ask any more is unloaded when its last request has its answer. A load that fails leaves
everything as it was. Where an endpoint has several engines (holders.py), all of them hold the same.

    live = Live(engine, home, base, "base", plan, version, in_flight=running.in_flight, port=8000)
    live.connect(client)                 # to an engine's socket; again after each of its starts
    live.restore(adapters)               # the first time these; without, those of before the restart
    live.load("demo@v4"), live.rollback("demo"), live.unload("demo"), live.verify("demo"), live.listing()

All of it is for any thread; changes wait for each other. An adapter is in EngineState only while its replies are right.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from loraport.clients.errors import (
    AdapterError,
    EngineError,
    ResourceError,
    UsageError,
    VerificationError,
)
from loraport.clients.home import Home
from loraport.serve.adapters.catalog import Catalog, engine_name, open_reference, require_unchanged, split_name
from loraport.serve.adapters.holders import SWEEP_S, Holders
from loraport.serve.adapters.join import join
from loraport.serve.adapters.loading import Slots
from loraport.serve.adapters.prove import (
    Loaded,
    Restored,
    Served,
    check_endpoint,
    check_fit,
    describe,
    describe_failed,
    models_of,
)
from loraport.serve.engine import versions
from loraport.serve.engine.sampling import engine_ends
from loraport.serve.gateway.state import EngineState, Model, Phase
from loraport.serve.plan.settings import Plan
from loraport.serve.proof.tolerance import serving_type
from loraport.train.adapters import Adapter
from loraport.train.base_model import Base
from loraport.train.manifest import Manifest

ROOM_S = 30.0  # that a load waits for the last requests of versions that are unloaded


def nobody(name: str) -> int:
    """Requests under way where there is no gateway."""
    return 0


def nothing(*_: str) -> None:
    """Nobody wants to know."""


class Live:
    """The adapters of one endpoint, over all starts of its engines.

    `in_flight`: requests that were given that name of the engine and are not answered yet. `on_spoiled`: told why where
    adapters work again only after the engine was started again. `on_changed`: called after each change that was asked
    for.
    """

    def __init__(
        self,
        engine: EngineState,
        home: Home,
        base: Base,
        base_name: str,
        plan: Plan,
        version: versions.Version,
        *,
        in_flight: Callable[[str], int] = nobody,
        on_spoiled: Callable[[str], None] = nothing,
        on_changed: Callable[[], None] = nothing,
        port: int = 8000,
    ) -> None:
        self.engine, self.home, self.base, self.base_name = engine, home, base, base_name
        self.plan, self.version = plan, version
        self.in_flight, self.on_spoiled, self.on_changed = in_flight, on_spoiled, on_changed
        self.catalog = Catalog(home, port)
        self.lock = threading.RLock()
        self.holders = Holders(engine, in_flight, self.lock)
        self.served: dict[str, Served] = {}
        self.failed: dict[str, tuple[Adapter, str]] = {}
        self.give_way: Callable[[], bool] = lambda: False  # let one go that comes back when it is asked for; whether so
        self.is_changing = False  # for others to see: an adapter is being loaded or proven
        self.merged: Loaded | None = None  # what is in the weights: then nothing else is served
        self.ends: frozenset[int] = frozenset()  # tokens on which the engine stops, whoever answers

    def connect(self, client: httpx.Client, plan: Plan | None = None, replica: int = 0) -> None:
        """The engine that answers here is new, holds no adapter yet, and was started with `plan`, if that changed."""
        with self.lock:
            self.plan = plan or self.plan
            kind = "cpu" if self.plan.kv_bytes is not None else "cuda"
            keeps_last_empty = versions.spare_slots(self.version, kind) > 0
            self.holders.connect(replica, Slots(client, self.plan.slots, keeps_last_empty, self.home))

    @property
    def models(self) -> list[Model]:
        """The models to tell the gateway of, beside the base."""
        served = list(self.served.values())
        return [model for each in served for model in models_of(each, self.base_name, self.context, self.ends)]

    def listing(self) -> list[dict[str, Any]]:
        """All adapters as JSON types, those that failed among them with their reason."""
        prevs = {name: self.catalog.aliases(name).prev for name in list(self.served)}
        served = [(name, each) for name, each in list(self.served.items()) if name in prevs]
        failed = [(name, entry) for name, entry in list(self.failed.items()) if name not in prevs]
        phase = self.engine.snapshot.phase
        now = {} if phase is Phase.READY else {"state": str(phase)}  # nobody is verified while nobody answers
        if self.merged:
            return [describe(Served(self.merged), None) | now]
        return [
            *(describe(each, prev.version if (prev := prevs[name]) else None) | now for name, each in served),
            *(describe_failed(adapter, reason) for _, (adapter, reason) in failed),
        ]

    def load(self, reference: str, name: str | None = None) -> Loaded:
        """Serve the adapter that a reference means, in place of the version that has its name now.

        UsageError, AdapterError, ResourceError, VerificationError, EndpointError: then nothing has changed.
        """
        with self.changing():
            return self.replace(open_reference(self.home, reference, self.version, self.base, name))

    def rollback(self, name: str) -> Loaded:
        """Serve `demo:prev` as `demo`; doing it again goes back."""
        name, _ = split_name(name)
        with self.changing():
            self.find(name)
            prev = self.catalog.aliases(name).prev
            if prev is None:
                raise AdapterError(f"{name} has no version before this one.", "load the one you want: NAME@VERSION")
            return self.replace(open_reference(self.home, prev.reference(self.home), self.version, self.base))

    def unload(self, name: str) -> None:
        """Serve an adapter no longer; requests under way are answered. `demo:prev`: only the version before."""
        name, which = split_name(name)
        with self.changing():
            if name in self.failed and name not in self.served:
                self.catalog.forget(name)
                del self.failed[name]
                return
            served = self.find(name)
            if served.prev and which in ("prev", served.prev.adapter.manifest.version):
                self.put(Served(served.latest))
                self.holders.retire(served.prev.engine_name)
            elif which in (None, "latest", served.latest.adapter.manifest.version):
                self.catalog.forget(name)
                self.drop(name)
            else:
                raise AdapterError(f"{name}@{which} is not served.", f"{served.latest.engine_name} is")

    def verify(self, name: str) -> Loaded:
        """Replay an adapter's golden replies again. VerificationError: it is served no longer."""
        name, _ = split_name(name)
        with self.changing():
            served = self.find(name)
            loaded = self.prove_held(served, served.latest.adapter)
            self.put(Served(loaded, served.prev))
            return loaded

    def restore(self, adapters: Sequence[Adapter] | None = None, replica: int = 0) -> list[Restored]:
        """Load and verify all after a start of an engine: `adapters` and no others, or those of before.

        Beside engines that are ready: all that those serve, or it is no replica (join.py).

        Where there are none, one that fails is left out, with its reason. Where base and adapters do not keep apart,
        all are: then nobody knows whose weights are whose. EndpointError where the engine does not answer, and then
        nothing is forgotten.
        """
        with self.lock, self.holders.only(replica):
            return join(self) if self.holders.others(replica) else self.restore_first(adapters)

    # What these are made of.

    def restore_first(self, adapters: Sequence[Adapter] | None) -> list[Restored]:
        """Load and verify where no other engine is ready; see `restore`."""
        before = self.served, self.failed
        wanted = list(adapters) if adapters is not None else self.known()
        if adapters is not None:  # the engine was started for these
            self.ends = engine_ends(self.base, [adapter.manifest for adapter in wanted])
        self.served, self.failed = {}, {}
        try:
            results = self.keep_apart([self.restore_one(adapter) for adapter in wanted])
            if adapters is not None and all(result.loaded for result in results):
                self.catalog.begin(self.base, wanted)
        except BaseException:
            self.served, self.failed = before
            raise
        for result in results:
            name = result.adapter.manifest.name
            if result.loaded:
                self.served[name] = Served(result.loaded)
            else:
                self.failed[name] = (result.adapter, result.error.message if result.error else "")
        stale = {model.id for model in self.engine.snapshot.models if model.kind == "adapter"}
        self.engine.put(*self.models, drop=stale)
        return results

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One change at a time, while the engine is ready."""
        with self.lock:
            phase = self.engine.snapshot.phase
            if self.merged:
                raise ResourceError(
                    f"this endpoint serves {self.merged.name} merged into its base, and takes no other adapters.",
                    "start it without --merge",
                )
            if phase is not Phase.READY or not self.holders.members:
                raise EngineError(f"the engine is {phase}: it takes no changes now.", "try again when it is ready")
            self.is_changing = True
            try:
                yield
            finally:
                self.is_changing = False
                self.on_changed()  # also after a failure: what is no longer right is dropped

    @property
    def context(self) -> int:
        """Tokens of context, as the base's model says, or the plan."""
        said = [model.max_model_len for model in self.engine.snapshot.models if model.kind == "base"]
        return next((limit for limit in said if limit), self.plan.context)

    def find(self, name: str) -> Served:
        """What is served under a name; AdapterError with the names there are."""
        if name not in self.served:
            there = f"there is: {', '.join(self.served)}" if self.served else "it serves its base alone"
            raise AdapterError(f"there is no adapter {name} at this endpoint.", there)
        return self.served[name]

    def known(self) -> list[Adapter]:
        """The adapters of before the restart, those that failed among them: they get another try."""
        served = {name: each.latest.adapter for name, each in self.served.items()}
        failed = {name: adapter for name, (adapter, _) in self.failed.items() if name not in served}
        return list((served | failed).values())  # those that were served first: room may be short

    def replace(self, adapter: Adapter) -> Loaded:
        """Check, load, prove, write down, switch, and let go of what is needed no more."""
        name, called = adapter.manifest.name, engine_name(adapter)
        self.check(adapter)
        before = self.served.get(name)
        if before and called in [each.engine_name for each in (before.latest, before.prev) if each]:
            loaded = self.prove_held(before, adapter)
            self.catalog.put(self.base, adapter)
        else:
            self.take(adapter)
            try:
                loaded = self.prove(adapter)
                self.catalog.put(self.base, adapter)
            except BaseException as error:
                self.holders.unload(called)
                self.look_after(error)
                raise
        old = [each for each in (before.latest, before.prev) if each and each.engine_name != called] if before else []
        self.failed.pop(name, None)
        self.put(Served(loaded, old[0] if old else None))
        for each in old[1:]:
            self.holders.retire(each.engine_name)
        return loaded

    def check(self, adapter: Adapter) -> None:
        """All that can be said against an adapter that is servable, before the engine sees it."""
        bases = [model for model in self.engine.snapshot.models if model.kind == "base"]
        taken = {self.base_name, *(name for model in bases for name in (model.id, *model.aliases))}
        check_endpoint(adapter, self.plan, taken)
        check_fit(adapter, self.base, self.context, self.plan.targets)

    def take(self, adapter: Adapter) -> None:
        """Have the engines hold an adapter."""
        name = engine_name(adapter)
        if name in self.holders.retired:  # its last requests are still being answered
            self.holders.retired.discard(name)
        else:
            self.make_room()
        self.holders.load(name, adapter.folder)

    def make_room(self) -> None:
        """Where all slots are taken, give up versions of before, wait for the last requests of those given up, and
        have others give way.
        """
        end = time.monotonic() + ROOM_S
        while (room := self.holders.room) is not None and room <= 0:
            spared = next((served for served in self.served.values() if served.prev), None)
            if spared and spared.prev:
                self.put(Served(spared.latest))
                self.holders.retire(spared.prev.engine_name)
            elif self.holders.retired and time.monotonic() <= end:
                time.sleep(SWEEP_S / 4)
                self.holders.sweep()
            elif not self.give_way():
                return  # Slots.load says so

    def prove(self, adapter: Adapter) -> Loaded:
        """Prove one adapter alone, then together with all that are served."""
        loaded = self.prove_alone(adapter)
        others = [served.latest.manifest for served in self.served.values()]
        self.prove_together([loaded.manifest, *(other for other in others if other.name != loaded.engine_name)])
        return loaded

    def prove_alone(self, adapter: Adapter) -> Loaded:
        """Prove one adapter, as what it is."""
        return self.holders.prove(adapter, self.base, self.base_name, serving_type(self.plan))

    def prove_together(self, manifests: list[Manifest]) -> None:
        """Base and adapters are asked at the same moment, and must keep apart."""
        self.holders.prove_together(self.base_name, manifests, serving_type(self.plan))

    def prove_held(self, served: Served, adapter: Adapter) -> Loaded:
        """Prove a version again that may be asked now; where that fails, it may no longer."""
        try:
            return self.prove(adapter)
        except VerificationError as error:
            if served.prev and served.prev.engine_name == engine_name(adapter):
                self.put(Served(served.latest))
                self.holders.retire(served.prev.engine_name)
            else:
                self.drop(adapter.manifest.name)
                self.failed[adapter.manifest.name] = (adapter, error.message)
            raise

    def look_after(self, error: BaseException) -> None:
        """After a load that failed on a CPU: are the adapters that are served still right?

        One in the wrong slot changes what the base says beside any adapter, long after its name is gone. Then nobody
        may ask for an adapter until the engine was started again.
        """
        manifests = [served.latest.manifest for served in self.served.values()]
        if not isinstance(error, VerificationError) or not self.holders.keeps_last_empty or not manifests:
            return
        try:
            self.prove_together(manifests)
        except VerificationError as mixed:
            for served in list(self.served.values()):
                self.drop(served.latest.name)
                self.failed[served.latest.name] = (served.latest.adapter, mixed.message)
            self.on_spoiled(mixed.message)

    def restore_one(self, adapter: Adapter) -> Restored:
        """Load and prove one adapter; its error is the result, an engine that is gone is raised."""
        try:
            self.check(adapter)
            require_unchanged(adapter, self.home)
            self.take(adapter)
            return Restored(adapter, self.prove_alone(adapter))
        except (AdapterError, UsageError, ResourceError, VerificationError) as error:
            self.holders.unload(engine_name(adapter))
            return Restored(adapter, error=error)

    def keep_apart(self, results: list[Restored]) -> list[Restored]:
        """The results, all failed where base and adapters do not keep apart."""
        try:
            self.prove_together([result.loaded.manifest for result in results if result.loaded])
        except VerificationError as error:
            for result in results:
                self.holders.unload(engine_name(result.adapter))
            return [Restored(result.adapter, error=result.error or error) for result in results]
        return results

    def put(self, served: Served) -> None:
        """Let the gateway give these to requests from now on: name and versions in one step."""
        self.served[served.latest.name] = served
        self.engine.put(*models_of(served, self.base_name, self.context, self.ends), drop=self.ids(served.latest.name))

    def drop(self, name: str) -> None:
        """Let nobody ask for an adapter any more, and unload it in time."""
        served = self.served.pop(name)
        self.engine.put(drop=self.ids(name))
        for loaded in (served.latest, served.prev):
            if loaded:
                self.holders.retire(loaded.engine_name)

    def ids(self, name: str) -> set[str]:
        """What the gateway knows of an adapter: its name, and those of its versions."""
        models = self.engine.snapshot.models
        return {model.id for model in models if model.kind == "adapter" and split_name(model.id)[0] == name}

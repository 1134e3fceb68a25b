"""The engines that hold an endpoint's adapters, asked as if they were one: loaded by all or by none, proven on each.

An engine holds everything that the endpoint serves before it is a member, and is one as long as it is ready. Where it
fails a load, the others are told to forget; what a restart has emptied is filled again by live.py. Where no member is
left, nothing is loaded or proven, which is an EngineError; only to forget is done with nobody as well.

    >>> holders = Holders(state, in_flight, lock)
    >>> holders.connect(0, Slots(client, most=3, keeps_last_empty=True, home=home))
    >>> holders.load("demo@v3", Path("/…/v3"))
    >>> holders.prove(adapter, base, "base", "bfloat16").verified.state
    'verified'
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from loraport.clients.errors import EngineError, LoraportError
from loraport.serve.adapters.loading import Slots
from loraport.serve.adapters.prove import Loaded, prove
from loraport.serve.gateway.state import EngineState
from loraport.serve.proof.together import check_together
from loraport.train.adapters import Adapter
from loraport.train.base_model import Base
from loraport.train.manifest import Manifest

SWEEP_S = 0.2

Result = TypeVar("Result")


class Holders:
    """The slots of each engine by its number, and the versions that are let go. Changes need the caller's `lock`.

    `in_flight`: requests that were given that name of the engines and are not answered yet.
    """

    def __init__(self, engine: EngineState, in_flight: Callable[[str], int], lock: threading.RLock) -> None:
        self.engine, self.in_flight, self.lock = engine, in_flight, lock
        self.slots: dict[int, Slots] = {}
        self.alone: int | None = None
        self.retired: set[str] = set()

    def connect(self, replica: int, slots: Slots) -> None:
        """That engine is new and holds nothing yet."""
        self.slots[replica] = slots
        if not self.others(replica):
            self.retired.clear()

    @contextmanager
    def only(self, replica: int) -> Iterator[None]:
        """Ask this engine alone meanwhile, which need not be ready yet."""
        self.alone = replica
        try:
            yield
        finally:
            self.alone = None

    @property
    def members(self) -> dict[int, Slots]:
        """The engines that are asked: those that are ready."""
        asked = self.engine.snapshot.ready if self.alone is None else [self.alone]
        return {number: slots for number, slots in self.slots.items() if number in asked}

    @property
    def present(self) -> dict[int, Slots]:
        """The members, and those that are ready beside the one that is asked alone."""
        ready = self.engine.snapshot.ready
        return {number: slots for number, slots in self.slots.items() if number in ready or number == self.alone}

    def asked(self) -> dict[int, Slots]:
        """The members; EngineError where all have gone meanwhile, for what nobody was asked nobody has proven."""
        members = self.members
        if not members:
            phase = self.engine.snapshot.phase
            raise EngineError(f"no engine is ready any more ({phase}).", "try again when one is")
        return members

    def others(self, replica: int) -> list[int]:
        """The engines that are ready, beside this one."""
        return [number for number in self.engine.snapshot.ready if number != replica]

    @property
    def room(self) -> int | None:
        """How many more adapters may be held at once; None where they take turns in the slots."""
        return min((slots.room for slots in self.members.values() if slots.room is not None), default=None)

    @property
    def keeps_last_empty(self) -> bool:
        """Whether an adapter in the wrong slot spoils an engine (loading.py)."""
        return any(slots.keeps_last_empty for slots in self.members.values())

    def load(self, name: str, folder: Path) -> None:
        """Have all hold an adapter; the error of one that refuses, and then it is taken from the others again."""
        missing = {number: slots for number, slots in self.asked().items() if name not in slots.held}
        try:
            self.each(lambda slots: slots.load(name, folder), missing)
        except BaseException:
            self.each(lambda slots: slots.unload(name), missing)
            raise

    def unload(self, name: str) -> None:
        """Have all that are there forget a name, and be it nobody: a new engine knows none."""
        self.each(lambda slots: slots.unload(name), self.present)

    def prove(self, adapter: Adapter, base: Base, base_name: str, dtype: str) -> Loaded:
        """Prove an adapter alone on each: the one whose replies differ most from training's."""
        found = self.each(lambda slots: prove(slots.client, adapter, base, base_name, dtype))
        return max(found, key=lambda loaded: loaded.verified.difference)

    def prove_together(self, base_name: str, manifests: list[Manifest], dtype: str) -> None:
        """Base and adapters are asked at the same moment, and must keep apart on each."""
        if manifests:
            self.each(lambda slots: check_together(slots.client, base_name, manifests, dtype))

    def retire(self, name: str) -> None:
        """Unload a version as soon as the last request that was given it is answered."""
        self.retired.add(name)
        self.sweep()
        if self.retired:
            threading.Thread(target=self.keep_sweeping, name="adapters", daemon=True).start()

    def sweep(self) -> None:
        """Unload what was retired and is asked no more."""
        for name in [name for name in self.retired if not self.in_flight(name)]:
            self.retired.discard(name)
            self.unload(name)

    def keep_sweeping(self) -> None:
        """Sweep until nothing is left to."""
        while self.retired:
            time.sleep(SWEEP_S)
            with self.lock:
                self.sweep()

    def each(self, work: Callable[[Slots], Result], among: Mapping[int, Slots] | None = None) -> list[Result]:
        """Do it on all engines at once, at least on one, or on those of `among`.

        The first error, which names its replica, when all are done.
        """
        asked = self.asked() if among is None else among
        with ThreadPoolExecutor(max(1, len(asked))) as pool:
            futures = {number: pool.submit(work, slots) for number, slots in asked.items()}
        for number, future in futures.items():
            error = future.exception()
            if isinstance(error, LoraportError) and self.alone is None and len(self.engine.snapshot.replicas) > 1:
                raise type(error)(f"replica {number}: {error.message}", error.hint, error.details) from error
        return [future.result() for future in futures.values()]

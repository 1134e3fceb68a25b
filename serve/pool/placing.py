"""Where a job trains, and what the engine does for it: the pool's leases, the policy and the engine, for the queue.

A job gets its GPUs in the transaction that makes it run. Where the engine has to leave for it, the trainer starts when
the engine has left; it comes back when no job has its GPUs any more. While a result waits to be handed over, no job
makes the engine leave: the result would not be served for as long as that job takes.

    >>> with store.begin() as session:
    ...     placer.look(session)
    ...     taken = placer.take(session, job_id, needs, now)     # GPUs that nobody had, None: the job waits
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from sqlalchemy.orm import Session

from loraport.clients.errors import LoraportError
from loraport.clients.terminal import say
from loraport.serve.pool.policy import Needs, Policy, Run, Window, Yield, decide
from loraport.serve.pool.pool import Pool, Room, Share, engine_holder
from loraport.serve.store.store import Store

AGAIN_S = 30.0  # after an engine could not come back


class Serving(Protocol):
    """The engines of this endpoint, as a tenant of the GPUs."""

    @property
    def gpus(self) -> dict[int, int]:
        """Bytes that the engines hold or will hold, by number of the GPU; empty where they use none."""

    def suspend(self, reason: str, expected_s: float | None) -> None:
        """Let running requests end, then end the engines and free their GPUs; requests get 503 until `resume`."""

    def resume(self) -> None:
        """Bring the engines back, with all adapters verified. Returns when they are ready; twice is fine."""


class Placer:
    """The pool and the engine behind one port. `look`, then `take`, are of one transaction and one thread."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        serving: Serving,
        policy: Policy = Policy.AUTO,
        window: Window | None = None,
        port: int = 0,
    ) -> None:
        self.store, self.pool, self.serving = store, pool, serving
        self.policy, self.window, self.port = policy, window, port
        self.rooms: list[Room] = []
        self.lock = threading.Lock()  # of who suspends or resumes
        self.is_away = self.is_over = False
        self.results = 0  # to be handed over
        self.counting = threading.Lock()
        self.returning: threading.Thread | None = None
        self.not_before = 0.0

    def look(self, session: Session) -> None:
        """See what is free now; what follows goes by it, and `take` looks again."""
        self.rooms = self.pool.free(session)

    @property
    def most_gpus(self) -> int:
        """GPUs of the largest node."""
        return max(Counter(room.node for room in self.rooms).values(), default=0)

    def count_free(self) -> dict[str, int]:
        """GPUs that no job has, by node."""
        found = dict.fromkeys((room.node for room in self.rooms), 0)
        for room in self.rooms:
            found[room.node] += not room.jobs
        return found

    def take(self, session: Session, job_id: str, needs: Needs, now: float, avoid: str | None = None) -> int | None:
        """Lease what a job needs, not on the node `avoid`: how many GPUs it has that no job had. None: it waits."""
        rooms = [room for room in self.rooms if room.node != avoid]
        home = self.rooms[0].node if self.rooms else None
        decision = decide(needs, rooms, self.serving.gpus, self.policy, self.window, now, engine_node=home)
        if isinstance(decision, Yield) and self.results:
            return None
        if not isinstance(decision, (Run, Yield)):
            return None
        if isinstance(decision, Yield):
            self.pool.give_back(session, engine_holder(self.port))
        if not self.pool.take(session, job_id, decision.share):
            return None
        before = sum(self.count_free().values())
        self.look(session)
        return before - sum(self.count_free().values())

    def share_of(self, job_id: str) -> Share | None:
        """What a job has leased."""
        with self.store.read() as session:
            return self.pool.share_of(session, job_id)

    def make_room(self, expected_s: float | None) -> None:
        """Have the engine leave, where jobs have its GPUs; returns when it has. LoraportError where it cannot."""
        with self.lock:
            if self.is_over or self.is_away or self.may_be_here():
                return
            self.is_away = True
            try:
                self.serving.suspend("a fine-tuning job trains", expected_s)
            except BaseException:
                self.is_away = False
                raise

    def adopt(self) -> None:
        """At the start of a server: the engine stays away where a job that survived has its GPUs."""
        if not self.may_be_here():
            self.make_room(None)

    def may_be_here(self) -> bool:
        """Whether the engine can have its GPUs; they are leased to it then."""
        with self.store.begin() as session:
            rooms = self.pool.free(session)
            if any(room.is_cpu for room in rooms):
                return self.policy in (Policy.AUTO, Policy.COEXIST) or not any(room.jobs for room in rooms)
            return self.pool.seat(session, self.port, self.serving.gpus)

    def is_out_of_window(self, share: Share, now: float) -> bool:
        """Whether a job that the engine left for has to leave now, because its window is over."""
        if self.policy is not Policy.WAIT or self.window is None or self.window.holds(now):
            return False
        return self.is_away and (not share.gpus or any(gpu in self.serving.gpus for gpu in share.gpus))

    def tend(self, when_back: Callable[[], None]) -> None:
        """Bring the engine back, if it is away and no job has its GPUs: in a thread, which calls `when_back`."""
        if not self.is_away or time.monotonic() < self.not_before:
            return
        if (self.returning and self.returning.is_alive()) or not self.may_be_here():
            return
        self.returning = threading.Thread(target=self.bring_back, args=(when_back,), name="engine-back", daemon=True)
        self.returning.start()

    def bring_back(self, when_back: Callable[[], None]) -> None:
        """Resume the engine; what hinders it is said, and tried again."""
        with self.lock:
            try:
                if self.may_be_here():  # else a job has got its GPUs meanwhile
                    self.serving.resume()
                    self.is_away = False
            except LoraportError as error:
                self.not_before = time.monotonic() + AGAIN_S
                say(f"warning: the engine is not back yet: {error.message}", "yellow")
        when_back()

    def let_back(self) -> None:
        """Resume the engine, whatever the tables say of its GPUs: trainers of this server have none any more.

        From now on it leaves for nobody. Where it could not come back it `is_away` still: to be called again.
        """
        with self.lock:
            self.is_over = True
            if not self.is_away:
                return
            try:
                self.serving.resume()
                self.is_away = False
            except LoraportError as error:
                say(f"warning: the engine is not back: {error.message}", "yellow")

    def add_results(self, count: int) -> None:
        """So many results more wait to be handed over, or fewer."""
        with self.counting:
            self.results += count

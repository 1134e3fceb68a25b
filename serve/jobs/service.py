"""The queue of fine-tuning jobs: what waits is checked, started when it is its turn and there are GPUs, and followed.

One loop looks at the tables, whenever something was written or a second has passed: they are the truth, so nothing is
lost that a killed server knew. What runs is carried by DBOS (durable.py). A server that is stopped has its trainers
keep a checkpoint, and their jobs go on at its next start; after a `kill -9` trainers go on, and the next server follows
them. One process of a home, or of a PostgreSQL, may have a queue: who starts it sees to that.

    >>> queue = Queue(store, home, runner=LocalRunner(home), pool=Pool([this_machine()]), serving=engines,
    ...               hand_over=models, base="reader-9m")
    >>> queue.start()
    >>> queue.wake()
    >>> queue.close()
"""

import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from sqlalchemy import select

from loraport.clients.errors import ResourceError
from loraport.clients.home import Home
from loraport.clients.terminal import say
from loraport.serve.jobs.admission import admit
from loraport.serve.jobs.attempt import Attempts
from loraport.serve.jobs.checking import Checker, Checking
from loraport.serve.jobs.durable import Durable
from loraport.serve.jobs.housekeeping import Housekeeping
from loraport.serve.jobs.leftovers import sweep_leases
from loraport.serve.jobs.parts import Parts
from loraport.serve.jobs.seams import HandOver
from loraport.serve.jobs.settings import QueueSettings
from loraport.serve.jobs.validate import Validator
from loraport.serve.pool.placing import Placer, Serving
from loraport.serve.pool.policy import Policy, Window
from loraport.serve.pool.pool import Pool
from loraport.serve.runners.seams import Runner
from loraport.serve.store.store import Store
from loraport.serve.store.tables import Job, Status

LEAVE_S = 10.0  # for what is under way to see that the server ends
NOBODY_S = 3.0  # after which a trainer that still runs is stopped from here too: twice is fine
IDLE_S = 30.0  # between two looks whether all that runs is followed
BREATH_S = 0.02  # between two looks, however often somebody knocks


class Queue:
    """The queue of one home. `start` before the engines start: where a survivor trains on their GPU, they stay away.

    `command`: of a trainer, from its job's folder; None: `loraport train`. `chores` are done every minute. `is_owner`:
    whether this server has the queue for certain, else nothing is begun.
    """

    def __init__(
        self,
        store: Store,
        home: Home,
        *,
        runner: Runner,
        pool: Pool,
        serving: Serving,
        hand_over: HandOver,
        base: Path | str,
        settings: QueueSettings | None = None,
        policy: Policy = Policy.AUTO,
        window: Window | None = None,
        port: int = 0,
        command: Callable[[Path], Sequence[str]] | None = None,
        validator: Checker | None = None,
        chores: Sequence[Callable[[], object]] = (),
        is_owner: Callable[[], bool] = lambda: True,
    ) -> None:
        settings = settings or QueueSettings()
        placer = Placer(store, pool, serving, policy, window, port)
        self.parts = Parts(store, home, runner, placer, hand_over, settings, command)
        self.attempts = Attempts(self.parts)
        self.durable = Durable(store.url, home, self.attempts)
        self.checking = Checking(self.parts, validator or Validator(store, home, base, settings, smallest_gpu(pool)))
        self.housekeeping = Housekeeping(self.parts, self.durable, chores)
        self.is_owner = is_owner
        self.idle: set[str] = set()  # jobs that run and that nobody followed when it was looked last
        self.next_at = 0.0
        self.has_begun = False
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Go on with what an earlier server left, and begin to look; as soon as the store can be used, if not now."""
        try:
            self.take_over()
        except ResourceError as error:
            self.parts.complain(error)
        self.thread = threading.Thread(target=self.loop, name="queue", daemon=True)
        self.thread.start()

    def take_over(self) -> None:
        """What has to be done before the first look. ResourceError where the store cannot be used: do it again."""
        sweep_leases(self.parts, spared=None)  # also of engines: there is no other server, and those here have none yet
        self.parts.placer.adopt()
        self.durable.start()
        self.go_on()
        self.has_begun = True

    def go_on(self) -> None:
        """Have all jobs that run followed, also those that DBOS never heard of because the server was killed."""
        with self.parts.store.read() as session:
            asked = select(Job.id, Job.attempt).where(Job.status == Status.RUNNING)
            running: dict[str, int] = dict(session.execute(asked).all())
        idle = running.keys() - self.durable.under_way.jobs
        for job_id in idle:
            self.durable.ensure(job_id, running[job_id], is_stuck=job_id in self.idle)
        self.idle, self.next_at = set(idle), time.monotonic() + IDLE_S

    def wake(self) -> None:
        """Something was written that the queue should see now. From any thread; costs nothing."""
        self.parts.wake()

    def loop(self) -> None:
        """Look, until the server ends."""
        while not self.is_ending:
            self.parts.knock.wait(self.parts.settings.tick_s)
            self.parts.knock.clear()
            if not self.is_owner():
                continue
            try:
                if not self.has_begun:
                    self.take_over()
                self.look()
            except ResourceError as error:
                self.parts.complain(error)
            except Exception as bug:
                say(f"error: the queue has a bug: {''.join(traceback.format_exception(bug))}", "red")
                self.parts.stopping.wait(self.parts.settings.tick_s)
            self.parts.stopping.wait(BREATH_S)

    @property
    def is_ending(self) -> bool:
        """Whether nothing new is to be begun."""
        return self.parts.stopping.is_set() or self.parts.leaving.is_set()

    def look(self) -> None:
        """One look at the tables: checks, starts, the engine, and what has to be cleaned up now and then."""
        self.checking.tend()
        for job_id, attempt in admit(self.parts.store, self.parts.placer, self.parts.settings, time.time()):
            self.durable.ensure(job_id, attempt)
        self.parts.placer.tend(self.wake)
        if time.monotonic() > self.next_at:
            self.go_on()
        self.housekeeping.tend()

    def rest(self) -> None:
        """Begin nothing new; trainers keep a checkpoint and end. `close` is to follow."""
        self.parts.stopping.set()
        self.parts.wake()

    def close(self, stop_trainers: bool = True) -> None:
        """End the queue. Trainers keep a checkpoint and end, and their jobs are queued; or they go on without us."""
        self.durable.be_brief()
        if stop_trainers:
            self.parts.stopping.set()
            self.stop_trainers()
        self.parts.leaving.set()
        self.parts.wake()
        threads = [self.thread, *(thread for _, thread in self.checking.under_way.values())]
        for thread in threads:
            if thread:
                thread.join(LEAVE_S)
        self.durable.close()

    def abandon(self) -> None:
        """End as one whose jobs are another server's now: nothing is written of them. Their trainers here keep a
        checkpoint and end, and the engine comes back.
        """
        self.close(stop_trainers=False)
        self.stop_each(set(self.attempts.training))
        self.parts.placer.let_back()

    def stop_trainers(self) -> None:
        """Wait until whoever follows a trainer has stopped it; stop those that nobody does, for want of a database.

        DBOS ends a workflow that cannot write a step down, so that a trainer may have nobody though none is under way.
        """
        self.durable.under_way.wait(NOBODY_S)
        self.stop_each(set(self.attempts.training))
        self.durable.under_way.wait(LEAVE_S)

    def stop_each(self, jobs: Collection[str]) -> None:
        """Have the trainers of jobs keep a checkpoint, all at once, and wait until they are gone."""
        stopping = [
            threading.Thread(target=self.parts.runner.stop, args=(job_id, self.parts.settings.grace_s), daemon=True)
            for job_id in jobs
        ]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()


def smallest_gpu(pool: Pool) -> int | None:
    """Bytes of the smallest GPU of the pool; None where there is none."""
    return min((gpu.total for machine in pool.machines if not machine.is_cpu for gpu in machine.gpus), default=None)

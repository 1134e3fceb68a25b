"""What the parts of the queue share: the store, the home, the runner, GPUs, the hand-over, settings, and how it ends.

>>> parts = Parts(store, home, runner, placer, hand_over, QueueSettings())
>>> parts.patient(lambda: load_job(store, job_id))      # waits where the database cannot be reached
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from loraport.clients.errors import ResourceError
from loraport.clients.home import Home
from loraport.clients.terminal import say
from loraport.serve.jobs.durable import Leaving
from loraport.serve.jobs.seams import HandOver
from loraport.serve.jobs.settings import QueueSettings
from loraport.serve.pool.placing import Placer
from loraport.serve.runners.seams import Runner
from loraport.serve.store.store import Store

T = TypeVar("T")
AGAIN_S = 1.0  # after the store could not be used
COMPLAIN_S = 60.0  # between two words about that


@dataclass
class Parts:
    """`stopping`: trainers are to be stopped, their jobs go on at the next start. `leaving`: leave all as it is, now.

    `command`: of a trainer, from its job's folder; None: `loraport train`. `knock` wakes the queue.
    """

    store: Store
    home: Home
    runner: Runner
    placer: Placer
    hand_over: HandOver
    settings: QueueSettings
    command: Callable[[Path], Sequence[str]] | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    leaving: threading.Event = field(default_factory=threading.Event)
    knock: threading.Event = field(default_factory=threading.Event)
    complained: float = -COMPLAIN_S

    def wake(self) -> None:
        """Have the queue look now."""
        self.knock.set()

    def pause(self, seconds: float | None = None) -> None:
        """Wait a moment; Leaving when the server ends."""
        if self.leaving.wait(self.settings.poll_s if seconds is None else seconds):
            raise Leaving

    def patient(self, do: Callable[[], T]) -> T:
        """Do something with the store, again while it cannot be used; Leaving where the server ends by then."""
        while True:
            try:
                return do()
            except ResourceError as error:
                self.complain(error)
                if self.stopping.wait(AGAIN_S) or self.leaving.is_set():
                    raise Leaving from error

    def complain(self, error: ResourceError) -> None:
        """Say what is lacking, once a minute."""
        if time.monotonic() - self.complained >= COMPLAIN_S:
            self.complained = time.monotonic()
            say(f"warning: fine-tuning waits: {error.message} {error.hint}", "yellow")

"""What has to be cleaned up now and then: leftovers of jobs that are over, DBOS's memory, others' chores.

Not by DBOS's schedules: each run of one is rows of its database, and it looks for changes of them only every so often;
what is done here depends on nothing but the tables, and may be missed.

    >>> Housekeeping(parts, durable).tend()
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from loraport.clients.errors import LoraportError
from loraport.clients.terminal import say
from loraport.serve.jobs.durable import Durable
from loraport.serve.jobs.leftovers import SWEEPS
from loraport.serve.jobs.parts import Parts

EVERY_S = 60.0
REMEMBERED_S = 24 * 3600.0  # by DBOS, of what is over


class Housekeeping:
    """Cleans up every minute, in a thread of its own. `chores`: of others, without arguments; the list may grow."""

    def __init__(self, parts: Parts, durable: Durable, chores: Sequence[Callable[[], object]] = ()) -> None:
        self.parts, self.durable, self.chores = parts, durable, chores
        self.next_at = time.monotonic() + EVERY_S
        self.thread: threading.Thread | None = None

    def tend(self) -> None:
        """Begin to clean up, if it is time and nobody does."""
        if time.monotonic() < self.next_at or (self.thread and self.thread.is_alive()):
            return
        self.next_at = time.monotonic() + EVERY_S
        self.thread = threading.Thread(target=self.clean_up, name="housekeeping", daemon=True)
        self.thread.start()

    def clean_up(self) -> None:
        """All chores; one that fails keeps none of the others."""
        ours: list[Callable[[], object]] = [partial(sweep, self.parts) for sweep in SWEEPS]
        for chore in (*ours, self.forget, *self.chores):
            if self.parts.leaving.is_set():
                return
            try:
                chore()
            except LoraportError as error:
                say(f"warning: cleaning up after fine-tuning jobs: {error.message}", "yellow")
            except Exception as bug:
                say(f"warning: cleaning up after fine-tuning jobs: {type(bug).__name__}: {bug}", "yellow")

    def forget(self) -> None:
        """Have DBOS forget what is long over."""
        self.durable.forget(time.time() - REMEMBERED_S)

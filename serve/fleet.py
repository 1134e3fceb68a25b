"""The engines of an endpoint, one or several replicas of it: started together, each kept alive in a thread of its own.

The endpoint is ready with the first of them; the others join when they are. What happens to one is its keeper's affair
(supervise.py), as long as another one is there: the endpoint is down when all are.

    >>> fleet = Fleet([Keeper(launch, home, state, bring_up) for launch in launches])
    >>> fleet.start()                        # the first that is ready
    >>> fleet.watch()                        # until all stay down, which is an EngineError
    >>> fleet.close()
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import NoReturn

from loraport.clients.errors import LoraportError
from loraport.clients.terminal import console, say
from loraport.serve.supervise import Keeper, Running

END_S = 5.0  # for the threads to see that all is over
HEAR_S = 0.5  # until a signal is heard at the latest


class Fleet:
    """Keepers and their threads. `changed` guards what the threads tell the caller's."""

    def __init__(self, keepers: list[Keeper]) -> None:
        self.keepers = keepers
        self.threads = [
            threading.Thread(target=self.keep, args=(keeper,), name=keeper.launch.name, daemon=True)
            for keeper in keepers
        ]
        self.changed = threading.Condition()
        self.ready: list[Running] = []  # first starts that came off
        self.failed: list[LoraportError] = []  # and those that did not
        self.down: list[LoraportError] = []
        self.lost: dict[int, str] = {}  # why engines stay down, by their numbers
        self.bug: BaseException | None = None

    def start(self) -> Running:
        """Start all, and wait for the first that is ready; the first error where none will be."""
        for thread in self.threads:
            thread.start()
        self.wait(lambda: bool(self.ready) or len(self.failed) == len(self.keepers))
        if not self.ready:
            raise self.failed[0]
        return self.ready[0]

    def watch(self) -> NoReturn:
        """Wait until all stay down; the error of the last one."""
        self.wait(lambda: len(self.down) == len(self.keepers))
        raise self.down[-1]

    def spoil(self, reason: str) -> None:
        """Have all engines replaced: what they hold is wrong. From any thread."""
        for keeper in self.keepers:
            keeper.spoil(reason)

    def let_be(self) -> None:
        """Look after the engines no longer: what ends now stays so."""
        for keeper in self.keepers:
            keeper.let_be()

    def close(self) -> None:
        """End all engines at the same time."""
        self.let_be()
        with self.changed:
            is_quiet = len(self.ready) == len(self.keepers)  # else a start may be on the screen
            self.changed.notify_all()
        words = "stopping the engines" if len(self.keepers) > 1 else "stopping the engine"
        with console.status(words) if is_quiet else nullcontext(), ThreadPoolExecutor(len(self.keepers)) as pool:
            list(pool.map(Keeper.close, self.keepers))
        for thread in self.threads:
            if thread.is_alive():
                thread.join(END_S)

    # What these are made of.

    def keep(self, keeper: Keeper) -> None:
        """The thread of a keeper: its first start, and then as long as it lives."""
        try:
            self.begin(keeper)
            keeper.watch()
        except LoraportError as error:
            self.give_up(keeper, error)
        except BaseException as error:
            if not keeper.over.is_set():  # an engine that is ended breaks whatever was under way
                self.tell(error)

    def begin(self, keeper: Keeper) -> None:
        """The first start. One that fails is tried again, but only beside one that came off: else all would fail."""
        try:
            running = keeper.start()
        except LoraportError as error:
            keeper.end()
            self.tell(error)
            with self.changed:
                self.changed.wait_for(lambda: self.ready or keeper.over.is_set())
            keeper.recover(error)
        else:
            self.tell(running)

    def give_up(self, keeper: Keeper, error: LoraportError) -> None:
        """An engine stays down."""
        with self.changed:
            self.down.append(error)
            self.lost[keeper.launch.replica] = error.message
            left = len(self.keepers) - len(self.down)
            self.changed.notify_all()
        if left and not keeper.over.is_set():
            keeper.say(f"{error.message} {left} of {len(self.keepers)} go on without it.", "bold red")

    def tell(self, news: Running | BaseException) -> None:
        """How a first start went."""
        with self.changed:
            if isinstance(news, Running):
                self.ready.append(news)
            elif isinstance(news, LoraportError):
                self.failed.append(news)
            else:
                self.bug = news
            count = len(self.ready)
            self.changed.notify_all()
        if isinstance(news, Running) and count > 1:
            took = sum(news.timeline.seconds.values())
            say(f"{news.launch.name} joins after {took:.1f} s: {count} of {len(self.keepers)} answer.", "green")

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait for what the threads tell; a signal ends this as whatever its handler raises, a bug as it is.

        By short waits: a signal that comes just before Python begins to wait for a lock does not end that wait.
        """
        with self.changed:
            while not self.changed.wait_for(lambda: self.bug or done(), HEAR_S):
                pass
        if self.bug:
            raise self.bug

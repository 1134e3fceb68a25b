"""Ctrl-C, SIGTERM and the end of the terminal as one exception, raised in the main thread wherever it waits.

Only `loraport serve` listens so; the engines are ended by its clean-up, not by the signal (engine/guard.py).

    >>> with stop_signals():
    ...     serve_until_somebody_stops_it()  # raises Stop
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop(BaseException):
    """Ctrl-C or SIGTERM: its `number`. Not an Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and the end of the terminal into Stop."""

    def raise_stop(number: int, frame: FrameType | None) -> None:
        raise Stop(number)

    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup, `&`
    before = {number: signal.signal(number, raise_stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ignored_signals() -> Iterator[None]:
    """Let nothing interrupt the clean-up, which ends by itself within seconds."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Which server runs the queue of a home: a locked file, which says where that server is. The kernel lets go at its end.

Light, because `loraport serve` asks before anything else. Of a PostgreSQL, see ownership.py too.

    >>> lock = HomeLock(Home.default())
    >>> lock.take("http://127.0.0.1:8000/v1") or lock.owner()
    True
"""

import fcntl
import json
import os
from contextlib import suppress

from loraport.clients.home import Home

LOCK = "jobs.lock"


class HomeLock:
    """The lock of a home. `take` until it is ours."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.descriptor: int | None = None

    def take(self, url: str) -> bool:
        """Have it, and write down for others that our server is at `url`; False where another has it."""
        path = self.home.ensure(self.home.root) / LOCK
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self.descriptor = descriptor
        with suppress(OSError):  # a disk that is full: others hear less
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"url": url, "pid": os.getpid()}).encode(), 0)
        return True

    def owner(self) -> str | None:
        """The URL of the server that has it; None where it has not said."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads((self.home.root / LOCK).read_text(encoding="utf-8"))["url"])
        return None

    def drop(self) -> None:
        """Give it back, if it is ours."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

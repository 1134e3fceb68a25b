"""`loraport serve` as a process, for the tests: started, waited for, ended; and what it leaves behind, if anything."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from loraport.clients.home import Home
from loraport.serve.engine.leftovers import read_traces, session_of
from tests.conftest import free_port, read_document

FAKE = shlex.join([sys.executable, str(Path(__file__).with_name("fake_engine.py"))])
PATIENCE_S = 180.0


def wait_until(true: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
    """Wait for a condition; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what}"
        time.sleep(0.02)


class Serving:
    """A running `loraport serve ADAPTER... --json`, with what it printed."""

    def __init__(self, home: Home, *arguments: str, port: int | None = None, **knobs: str) -> None:
        self.home, self.port = home, port or free_port()
        command = [sys.executable, "-m", "loraport_cli", "serve", "--port", str(self.port), "--json", *arguments]
        environment = os.environ | {"LORAPORT_HOME": str(home.root)}
        environment |= {f"FAKE_{name.upper()}": value for name, value in knobs.items()}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.said: list[str] = []
        self.reader = threading.Thread(target=self.read_errors, daemon=True)
        self.reader.start()

    def read_errors(self) -> None:
        """Keep standard error from filling up."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())

    @property
    def text(self) -> str:
        """What it said to people so far."""
        return "\n".join(self.said)

    def ready(self) -> dict[str, Any]:
        """Its document; fails with what it said when it ends before."""
        assert self.process.stdout is not None
        try:
            return read_document(self.process.stdout)
        except AssertionError:
            self.end()
            raise AssertionError(self.text) from None

    def end(self) -> int:
        """Wait for its end; return its exit status. It is ended and the test fails when that takes too long."""
        try:
            status = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(PATIENCE_S)
            raise AssertionError(f"it did not end:\n{self.text}") from None
        self.reader.join(PATIENCE_S)
        return status

    def processes(self) -> list[psutil.Process]:
        """Guard and engine processes, from the trace that serve leaves while it runs; the guard is the first."""
        wait_until(lambda: bool(read_traces(self.home)), "a trace of the engine")
        return session_of(read_traces(self.home)[0])


@contextlib.contextmanager
def serving(home: Home, *arguments: str, port: int | None = None, **knobs: str) -> Iterator[Serving]:
    """A `Serving` that is ended afterwards, with everything that it started."""
    running = Serving(home, *arguments, port=port, **knobs)
    seen: list[psutil.Process] = []
    try:
        yield running
    finally:
        if running.process.poll() is None:
            seen = [process for trace in read_traces(home) for process in session_of(trace)]
            running.process.send_signal(signal.SIGTERM)
            running.end()
        assert all_gone(seen)


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether all of these have ended, waiting a while for it."""
    _, left = psutil.wait_procs(processes, timeout=PATIENCE_S)
    return not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]

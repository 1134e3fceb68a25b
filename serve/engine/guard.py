"""The guard: a small process between `loraport serve` and the engine, which lives and dies with both.

It runs in a session of its own, holds one end of a pipe whose other end `loraport serve` holds, and is the subreaper
of everything that the engine starts. When the pipe closes, for whatever reason (kill -9 included), or on SIGTERM, it
ends every process of the engine: SIGTERM to the first, a grace period, SIGKILL to all that is left. When the engine
ends by itself, the guard ends what it left behind and exits with its status. When the guard itself is killed, the
kernel sends the engine's first process SIGTERM; what outlives even that is found by the next start (leftovers.py).

Standard library only, and run as a file with -I -S: it starts in milliseconds and shares nothing with its parent.

    python -I -S guard.py PIPE_FD GRACE_SECONDS COMMAND...
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_S = 0.05
LEFTOVER_GRACE_S = 0.5  # for what the engine leaves behind; vLLM ends its own processes
IGNORED = (signal.SIGINT, signal.SIGHUP)  # they are for `loraport serve`, which then closes the pipe


def prctl(option: int, value: int) -> None:
    """prctl(2); Linux only, like vLLM."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """Process ids of everything below this process, zombies aside, from /proc."""
    children: dict[int, list[tuple[int, str]]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            state, parent = text.rpartition(")")[2].split()[:2]
            children.setdefault(int(parent), []).append((int(folder.name), state))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        for pid, state in children.get(waiting.pop(), ()):
            waiting.append(pid)
            if state != "Z":
                found.append(pid)
    return found


def send(pids: list[int], number: int) -> None:
    """Send a signal to processes, some of which may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap(engine: int) -> int | None:
    """Collect every child that has ended; return the engine's wait status if it is among them, else None."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            status = wait_status if pid == engine else status
    return status


def end_engine(engine: int, grace: float) -> None:
    """Ask the engine to end; then ask what is left; then force it. Each step begins when the one before is done."""
    send([engine], signal.SIGTERM)
    if wait_for(lambda: engine not in descendants(), grace):
        send(descendants(), signal.SIGTERM)
        wait_for(lambda: not descendants(), LEFTOVER_GRACE_S)
    while descendants():
        send(descendants(), signal.SIGKILL)
        wait_for(lambda: not descendants(), LEFTOVER_GRACE_S)


def wait_for(done: Callable[[], bool], seconds: float) -> bool:
    """Collect children until `done`, at most `seconds`; return whether it is."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
        reap(0)
    return True


def start(command: list[str]) -> int:
    """Start the engine; it is sent SIGTERM when the guard dies."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for ignored in IGNORED:
            signal.signal(ignored, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    os._exit(127)


def main(pipe: int, grace: float, command: list[str]) -> int:
    """Hold the engine until it ends, the pipe closes or a signal comes; return the exit status for the guard."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    stop: list[bool] = []
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    for ignored in IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    os.set_inheritable(pipe, False)
    engine = start(command)
    while True:
        ready, _, _ = select.select([pipe, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
        status = reap(engine)
        if status is not None or stop or pipe in ready:
            break
    end_engine(engine, grace)
    if status is None:
        return 0
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))

"""Engines that a `kill -9` left behind: found by the next start, ended, and told about.

Two traces lead to them. `run/<port>.engine` (`<port>-1.engine` of the second replica), written as soon as the guard
runs, names guard and owner; everything the engine starts shares the guard's session, even when the guard is gone. And
the environment of each process holds MARKER, where the process did not overwrite it with a new title (vLLM's engine
process does).
"""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from loraport.clients.endpoint import is_alive
from loraport.clients.home import Home, write_json
from loraport.serve.engine.connect import files_name

MARKER = "LORAPORT_ENGINE"
GRACE_S = 2.0


@dataclass(frozen=True)
class EngineTrace:
    """Who runs an engine: (process id, creation time) of `loraport serve` and of the guard, whose id is the session."""

    port: int
    owner: tuple[int, float]
    guard: tuple[int, float]
    replica: int = 0

    def path(self, home: Home) -> Path:
        """Where the trace lies."""
        return home.run / f"{files_name(self.port, self.replica)}.engine"

    def write(self, home: Home) -> None:
        """Leave the trace."""
        home.ensure(home.run)
        write_json(self.path(home), asdict(self))


def read_traces(home: Home) -> list[EngineTrace]:
    """All traces, by port and replica; unreadable ones are as good as none."""
    traces = []
    for path in home.run.glob("*.engine") if home.run.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError):
            found = json.loads(path.read_text(encoding="utf-8"))
            owner, guard = found["owner"], found["guard"]
            replica = int(found.get("replica", 0))
            traces.append(EngineTrace(found["port"], (owner[0], owner[1]), (guard[0], guard[1]), replica))
    return sorted(traces, key=lambda trace: (trace.port, trace.replica))


def marker(home: Home, owner: tuple[int, float]) -> str:
    """Value of MARKER in an engine's environment."""
    return f"{owner[0]}:{owner[1]}:{home.root}"


def session_of(trace: EngineTrace) -> list[psutil.Process]:
    """Living processes of the guard's session, the guard first if it lives.

    A session id cannot be given out again while a process has it, so a session of that number whose leader is another
    process than the guard is not ours.
    """
    leader = trace.guard[0]
    if psutil.pid_exists(leader) and not is_alive(trace.guard):
        with contextlib.suppress(psutil.Error):
            if psutil.Process(leader).status() != psutil.STATUS_ZOMBIE:
                return []
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = os.getsid(process.pid) == leader and process.create_time() >= trace.guard[1] - 0.1
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return sorted(members, key=lambda process: process.pid != leader)


def marked(home: Home) -> list[psutil.Process]:
    """Living processes that carry this home's MARKER of an owner that is gone."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            pid, created, root = process.environ().get(MARKER, "").split(":", 2)
            orphaned = root == str(home.root) and not is_alive((int(pid), float(created)))
            if orphaned and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_leftovers(home: Home) -> int:
    """End engines of this home whose `loraport serve` is gone; return how many processes that were."""
    orphaned = [trace for trace in read_traces(home) if not is_alive(trace.owner)]
    ended = end(session_of(trace) for trace in orphaned) + end([marked(home)])
    for trace in orphaned:
        trace.path(home).unlink(missing_ok=True)
    return ended


def end(groups: Iterable[list[psutil.Process]]) -> int:
    """SIGTERM to all, SIGKILL to those that are left after the grace period; return how many there were."""
    processes = [process for group in groups for process in group if process.pid != os.getpid()]
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=GRACE_S)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=GRACE_S)
    return len(processes)

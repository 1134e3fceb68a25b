"""A short program run for a job: its rows are checked, its training is planned. Bounded in time and memory.

It ends with this server, is nicer than the gateway, and the first that the kernel ends where memory is short. The
trainer itself is no such program: local.py.

    >>> run([sys.executable, "-c", "print(1)"], folder, "check", Bounds(60.0, 1 << 30), lambda: False)
    Ran(code=0, out='1\\n', said=())
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraport.clients.errors import os_errors
from loraport.serve.jobs.words import last_lines
from loraport.serve.runners.local import may_know

POLL_S = 0.1
LONGEST_OUT = 1 << 24
# What the program begins with: it dies with the server (PR_SET_PDEATHSIG), is the first to go, and has its bounds.
# Data and not address space, because libraries reserve far more of that than they use.
BEGIN = """
import ctypes, os, resource, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]): os._exit(1)
os.nice(10)
open("/proc/self/oom_score_adj", "w").write("900")
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]),) * 2)
os.execv(sys.argv[3], sys.argv[3:])
"""


@dataclass(frozen=True)
class Bounds:
    """What a program may take: seconds, and bytes of its own memory."""

    seconds: float
    data_bytes: int


@dataclass(frozen=True)
class Ran:
    """How a program ended: its exit code, 128 + n of a signal, None where it was ended; what it printed, last words."""

    code: int | None
    out: str
    said: Sequence[str]
    is_late: bool = False


def run(
    command: Sequence[str],
    folder: Path,
    name: str,
    bounds: Bounds,
    is_over: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
) -> Ran:
    """Run a program; its words go to `folder/name.log`. `is_over`: asked now and then whether nobody wants it any more.

    The thread that calls has to live as long as the program: the program ends with it.
    """
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    began = time.monotonic()
    with os_errors("writing", out), out.open("wb") as output, log.open("wb") as errors:
        begin = [sys.executable, "-I", "-S", "-c", BEGIN, str(os.getpid()), str(bounds.data_bytes)]
        process = subprocess.Popen(
            [*begin, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=known() | dict(environment or {}),
            start_new_session=True,
        )
    is_late = False
    try:
        while process.poll() is None and not is_over():
            if is_late := time.monotonic() - began > bounds.seconds:
                break
            time.sleep(POLL_S)
    finally:
        ended = process.poll()
        if ended is None:
            process.kill()
            process.wait()
    with out.open("rb") as file:
        text = file.read(LONGEST_OUT).decode(errors="replace")
    code = None if ended is None else ended if ended >= 0 else 128 - ended
    return Ran(code, text, last_lines(log), is_late)


def known() -> dict[str, str]:
    """What such a program may know of the server's environment: what a trainer may."""
    return {name: value for name, value in os.environ.items() if may_know(name, value)}

"""Programs of others: found, run to their end with nothing left behind, asked for their version.

>>> run_program([find_executable("guidellm", "--guidellm"), "--version"], Path("log"), {})
"""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from shutil import which
from typing import Any

from loraport.clients.errors import ResourceError, UsageError

LONGEST_RUN_S = 900.0
LAST_LINES = 12
ASK_VERSION = "import sys; from importlib.metadata import distribution as d; print(d(sys.argv[1]).version)"


def flags(options: dict[str, Any]) -> list[str]:
    """`--name value` for each."""
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def find_executable(given: str, option: str) -> str:
    """A program by its path or in PATH; UsageError where there is none."""
    found = which(given)
    if not found:
        raise UsageError(f"there is no program {given!r}.", f"{option} is the path of its executable")
    return found


def run_program(command: Sequence[str], log: Path, variables: dict[str, str]) -> None:
    """Run a program to its end, what it says in `log`; ResourceError when it fails. Nothing of it is left behind."""
    with log.open("wb") as words:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            env=dict(os.environ) | variables,
            start_new_session=True,
        )
        try:
            code = process.wait(LONGEST_RUN_S)
        except subprocess.TimeoutExpired:
            raise ResourceError(
                f"{Path(command[0]).name} took longer than {LONGEST_RUN_S:.0f} s.", "", tail(log)
            ) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        raise ResourceError(
            f"{Path(command[0]).name} ended with exit code {code}.", "its last words stand above", tail(log)
        )


def tail(log: Path) -> tuple[str, ...]:
    """The last lines of a log."""
    return tuple(log.read_text(errors="replace").splitlines()[-LAST_LINES:])


def installed_version(executable: str, names: Sequence[str]) -> str | None:
    """Version of the first of these packages in the environment of an executable; None where it does not tell."""
    python = Path(executable).parent / "python"
    for name in names:
        with suppress(OSError, subprocess.SubprocessError):
            asked = subprocess.run([python, "-c", ASK_VERSION, name], capture_output=True, text=True, timeout=60)
            if asked.returncode == 0:
                return asked.stdout.strip()
    return None

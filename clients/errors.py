"""Every error that a person is meant to see, and the exit code of each.

    LoraportError              1  a bug of ours, when nothing more precise is raised
    ├── UsageError             2  wrong usage: a flag, a path, a name
    │   └── ConfigError        2  a run configuration that cannot be read or contradicts itself
    ├── Refused                3  refused with a reason, before or instead of doing harm
    │   ├── DataError          3  rows that cannot be trained on; names file and line
    │   ├── BaseModelError     3  a base model that is missing, gated, incomplete or of an unknown kind
    │   ├── AdapterError       3  an adapter that is missing, damaged or belongs to another base
    │   ├── ResourceError      3  port, disk, memory: this machine cannot do it now
    │   ├── EngineError        3  the engine refused or died; carries its last lines
    │   ├── VerificationError  3  the served adapter does not answer as it did in training
    │   └── EndpointError      3  the endpoint does not answer, or answers with an error
    └── Shortfall              4  a verdict: it ran, and the result fell short

An error is one sentence that says what is wrong and a hint that says what to do. Errors of other libraries become
one of these once, at the boundary where they arise.

    >>> raise ResourceError("port 8000 is in use by process 4711 (vllm).", "stop it, or choose another: --port 8001")
"""

import contextlib
import errno
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


class LoraportError(Exception):
    """`message`: one sentence, with a full stop. `hint`: what to do now. `details`: lines of evidence, if any."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "", details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details


class UsageError(LoraportError):
    """Wrong usage: a flag, a path, a name. `param`: the setting at fault, where it is one."""

    exit_code = 2
    param: str | None = None


class ConfigError(UsageError):
    """A run configuration that cannot be read or contradicts itself."""


class Refused(LoraportError):
    """Refused with a reason, before or instead of doing harm."""

    exit_code = 3


class DataError(Refused):
    """Rows that cannot be trained on; the message names the file and the line. `file` and `row` (its line, or number,
    from 1) say it to programs, where one row is at fault.
    """

    file: str = ""
    row: int | None = None


class BaseModelError(Refused):
    """A base model that is missing, gated, incomplete or of an unknown kind."""


class AdapterError(Refused):
    """An adapter that is missing, damaged or belongs to another base."""


class ResourceError(Refused):
    """Port, disk or memory: this machine cannot do it now."""


class EngineError(Refused):
    """The engine refused to start or died; `details` are its last lines."""


class VerificationError(Refused):
    """The served adapter does not answer as it did in training."""


class EndpointError(Refused):
    """The endpoint does not answer, or answers with an error."""


class Shortfall(LoraportError):
    """A verdict: everything ran, and the result fell short."""

    exit_code = 4


@contextlib.contextmanager
def os_errors(doing: str, path: Path, hint: str = "check the path") -> Iterator[None]:
    """Turn the operating system's errors while `doing` something with `path` into ours.

    A full disk and a read-only place are refusals about this machine; the rest names the path as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no disk space left while {doing} {path}.",
                "free some space, or set LORAPORT_HOME to a folder on another disk",
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ResourceError(
                f"no permission while {doing} {path}.", "check who owns it, or set LORAPORT_HOME elsewhere"
            ) from error
        raise ResourceError(f"{error.strerror or error} while {doing} {path}.", hint) from error


def http_errors(name: str) -> tuple[type[Exception], ...]:
    """The exception class `name` of httpx and, where it is installed, of httpx2.

    openai 3 and huggingface_hub 2 speak through httpx2, their predecessors and we through httpx.
    """
    found = [import_module(library) for library in ("httpx", "httpx2") if find_spec(library)]
    return tuple(getattr(library, name) for library in found)

"""The way to the engine: a Unix socket in a folder that only its owner enters, so that nothing goes past the gateway.

>>> with connect(socket_path(home, 8000)) as client:
...     client.get("/health").status_code
200
"""

import hashlib
import os
import socket as sockets
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx

from loraport.clients.errors import EndpointError, ResourceError
from loraport.clients.home import Home

BASE_URL = "http://engine"  # HTTP needs a name; the socket decides where it goes
LONGEST = 100  # bytes of a socket's path; the kernel takes 107
WAIT_S = 120.0
# Idle connections are dropped before vLLM drops them (5 s), so that no request meets one that is just being closed.
LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=2.0)


def files_name(port: int, replica: int) -> str:
    """What files of an engine are called: `8000`; `8000-1` of the second replica."""
    return f"{port}-{replica}" if replica else str(port)


def socket_path(home: Home, port: int, replica: int = 0) -> Path:
    """Where an engine behind `port` listens: in the home, or in a private folder of this machine's.

    The second where the home's path is too long for a socket, or its file system holds none or cannot keep others out
    (some network and FUSE file systems, shared folders of virtual machines). ResourceError where there is no such
    folder that is not somebody else's.
    """
    with suppress(OSError):  # it may have come with a copied home, open to all
        home.ensure(home.run).chmod(0o700)
    name = files_name(port, replica)
    if not home.run.stat().st_mode & 0o077 and can_hold(home.run, name):
        return home.run / f"{name}.sock"
    refused: ResourceError | None = None
    for folder in private_folders(home):
        try:
            make_private(folder)
        except ResourceError as error:
            refused = refused or error
            continue
        if can_hold(folder, name):
            return folder / f"{name}.sock"
    raise refused or ResourceError(
        f"neither {home.run} nor {tempfile.gettempdir()} can hold a Unix socket.",
        "set TMPDIR to a folder with a short path on a disk of this machine",
    )


def private_folders(home: Home) -> Iterator[Path]:
    """Folders for the sockets of a home outside it. /tmp first: the other one goes when its owner logs out."""
    name = f"loraport-{os.getuid()}-{hashlib.sha256(os.fsencode(home.root)).hexdigest()[:16]}"
    yield Path(tempfile.gettempdir()) / name
    if os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(os.environ["XDG_RUNTIME_DIR"]) / name


def make_private(folder: Path) -> None:
    """Make a folder that only its owner enters; ResourceError where somebody else was there before."""
    with suppress(OSError):  # then it holds no socket either
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
            raise ResourceError(
                f"{folder} belongs to others or is open to them.", "remove it, or set LORAPORT_HOME to a shorter path"
            )


def can_hold(folder: Path, name: str) -> bool:
    """Whether a socket can be bound there: tried, because no file system says so."""
    probe = folder / f".{name}.probe"
    if len(os.fsencode(folder / f"{name}.sock")) > LONGEST:
        return False
    try:
        probe.unlink(missing_ok=True)
        with sockets.socket(sockets.AF_UNIX) as trial:
            trial.bind(str(probe))
        return True
    except OSError:
        return False
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def connect(socket: Path) -> httpx.Client:
    """A client of the engine on that socket; paths begin with a slash: /health, /v1/models."""
    transport = httpx.HTTPTransport(verify=False, uds=str(socket), limits=LIMITS)
    return httpx.Client(transport=transport, base_url=BASE_URL, timeout=WAIT_S, trust_env=False)


def no_answer(path: str, error: Exception, wait_s: float) -> EndpointError:
    """The error for a request that the engine did not answer: in words for people, not those of the HTTP library."""
    if isinstance(error, httpx.TimeoutException):
        return EndpointError(
            f"the engine did not answer {path} within {wait_s:.0f} s.",
            "it is busy, or hangs: try again when fewer requests run",
        )
    return EndpointError(f"the engine did not answer {path}: it is gone.", "is it starting again? its log says why")

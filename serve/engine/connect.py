"""The way to the engine: a Unix socket in a folder that only its owner enters, so that nothing goes past the gateway.

>>> with connect(socket_path(home, 8000)) as client:
...     client.get("/health").status_code
200
"""

import hashlib
import os
import tempfile
from pathlib import Path

import httpx

from loraport.clients.errors import ResourceError
from loraport.clients.home import Home

BASE_URL = "http://engine"  # HTTP needs a name; the socket decides where it goes
LONGEST = 100  # bytes of a socket's path; the kernel takes 107
WAIT_S = 120.0
# Idle connections are dropped before vLLM drops them (5 s), so that no request meets one that is just being closed.
LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=2.0)


def socket_path(home: Home, port: int) -> Path:
    """Where the engine behind `port` listens: in the home, or in /tmp where the home's path is too long for a socket.

    ResourceError where the folder in /tmp is somebody else's.
    """
    path = home.run / f"{port}.sock"
    if len(os.fsencode(path)) <= LONGEST:
        home.ensure(home.run).chmod(0o700)  # it may have come with a copied home, open to all
        return path
    name = hashlib.sha256(os.fsencode(home.root)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"loraport-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise ResourceError(
            f"{folder} belongs to others or is open to them.", "remove it, or set LORAPORT_HOME to a shorter path"
        )
    return folder / path.name


def connect(socket: Path) -> httpx.Client:
    """A client of the engine on that socket; paths begin with a slash: /health, /v1/models."""
    transport = httpx.HTTPTransport(verify=False, uds=str(socket), limits=LIMITS)
    return httpx.Client(transport=transport, base_url=BASE_URL, timeout=WAIT_S, trust_env=False)

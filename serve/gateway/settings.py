"""What the gateway is told once, when it is made: where it listens, its bounds, its files.

>>> GatewaySettings(host="127.0.0.1", port=8000).is_loopback
True
"""

import ipaddress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine alone; a port behind it is not expected."""
    name = host.strip("[]").partition("%")[0].lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


@dataclass(frozen=True)
class GatewaySettings:
    """Address, bounds and files of a gateway. Times are in seconds, sizes in bytes.

    `keys_path` and `usage_path` may be None: then there are no keys (so only loopback is answered), and usage is not
    kept. `origins`: web pages (https://chat.example) whose scripts may ask, each with a key; none by default.
    """

    host: str
    port: int
    keys_path: Path | None = None
    usage_path: Path | None = None
    body_bytes: int = 16 << 20
    header_bytes: int = 32 << 10
    json_depth: int = 64
    body_s: float = 60.0  # between two pieces of a request's body
    connect_s: float = 5.0
    idle_s: float = 300.0  # between two chunks of a stream, on either side
    reply_s: float = 3600.0  # until the first byte of a reply that is not streamed
    tokenize_s: float = 10.0
    origins: tuple[str, ...] = ()
    flush_s: float = 10.0  # between two writings of the usage file, and two looks for clients that have stopped reading

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine can reach the gateway."""
        return is_loopback(self.host)

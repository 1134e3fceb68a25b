"""API keys: made, listed, revoked, and looked up. The file holds names, limits and SHA-256 hashes, never a key.

A key is 256 random bits, so a plain hash is enough: there is nothing to guess. The file has mode 0600; changes are made
under a lock and appear by one rename; a running gateway sees them at the next request.

    >>> text, key = create(Home.default().keys, "laptop", adapters=["demo"], requests_per_minute=60)
    >>> text[:3], key.name
    ('lp-', 'laptop')
"""

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from loraport.clients.errors import ConfigError, LoraportError, UsageError, os_errors
from loraport.clients.home import write_json

PREFIX = "lp-"
OWNER = "this machine"  # who started the gateway; no name that a key in a file may have
RANDOM_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Key:
    """What is known of a key. `adapters`: models it may use, the base only where named; None: all.

    `created`, `revoked` and `expires` are seconds since the epoch.
    """

    name: str
    sha256: str
    created: float
    adapters: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    concurrency: int | None = None
    is_admin: bool = False
    revoked: float | None = None
    expires: float | None = None

    def is_living(self, now: float | None = None) -> bool:
        """Whether it still opens anything: neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or (now or time.time()) < self.expires)

    def may_use(self, *names: str) -> bool:
        """Whether a model of any of these names is this key's."""
        return self.adapters is None or any(name in self.adapters for name in names)


def digest(text: str) -> str:
    """SHA-256 of a key."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def read(path: Path) -> list[Key]:
    """All keys of a file, the revoked among them; none where there is no file, ConfigError where it is damaged."""
    try:
        with os_errors("reading", path):
            fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"keys": []}
        return [key_of(entry) for entry in fields["keys"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a file of API keys.", "restore it, or delete it and make new keys") from error


def key_of(entry: dict[str, Any]) -> Key:
    """A key from its JSON."""
    adapters = entry.get("adapters")
    return Key(**{**entry, "adapters": None if adapters is None else tuple(adapters)})


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[Key]]:
    """The keys, to be changed in place; written back when the block ends well. One process at a time."""
    with os_errors("writing", path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = read(path)
            yield keys
            write_json(path, {"keys": [asdict(key) for key in keys]}, is_private=True)
        finally:
            os.close(lock)


def create(
    path: Path,
    name: str,
    *,
    adapters: list[str] | None = None,
    requests_per_minute: int | None = None,
    concurrency: int | None = None,
    is_admin: bool = False,
    lifetime_s: float | None = None,
) -> tuple[str, Key]:
    """(the key, shown this once; what is kept of it). UsageError for a name that cannot be or is taken.

    `lifetime_s`: seconds until it expires; None: never.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a name for a key.", "use letters, digits, dots, dashes and _, at most 64")
    for flag, limit in (("requests per minute", requests_per_minute), ("concurrency", concurrency)):
        if limit is not None and limit < 1:
            raise UsageError(f"{limit} is not a limit for {flag}.", "use 1 or more, or none")
    text = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    allowed = None if adapters is None else tuple(adapters)
    now = time.time()
    expires = None if lifetime_s is None else now + lifetime_s
    key = Key(name, digest(text), now, allowed, requests_per_minute, concurrency, is_admin, expires=expires)
    with changing(path) as keys:
        if any(known.name == name and known.revoked is None for known in keys):
            raise UsageError(f"there is a key named {name} already.", "revoke it first, or choose another name")
        keys.append(key)
    return text, key


def revoke(path: Path, name: str) -> Key:
    """End a key; the running gateway refuses it from its next request on. UsageError when there is none."""
    with changing(path) as keys:
        at = next((i for i, key in enumerate(keys) if key.name == name and key.revoked is None), None)
        if at is None:
            raise UsageError(f"there is no key named {name}.", hint_for(name, keys))
        keys[at] = replace(keys[at], revoked=time.time())
        return keys[at]


def hint_for(name: str, keys: list[Key]) -> str:
    """What to say to somebody who named a key that is not there."""
    living = [key.name for key in keys if key.revoked is None]
    if not living:
        return "there are no keys; `loraport keys create NAME` makes one"
    if any(key.name == name for key in keys):
        return f"it was revoked already; the keys are: {', '.join(living)}"
    near = next(iter(get_close_matches(name, living, n=1)), None)
    return f"{f'did you mean {near}? ' if near else ''}the keys are: {', '.join(living)}"


class Ring:
    """The keys of a running gateway, read again when the file changes.

    Once there was a key, keys are asked for: a file that vanishes or is damaged later opens nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.keys: list[Key] = []
        self.asks = False
        self.own: Key | None = None
        self._seen: tuple[int, int, int] | None = None
        if path is not None:
            self.take(read(path))

    def issue(self) -> str:
        """An admin key that lives as long as this gateway and is in no file of keys: for commands of its owner."""
        text = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
        self.own = Key(OWNER, digest(text), time.time(), is_admin=True)
        return text

    def take(self, found: list[Key]) -> None:
        """Use these keys from now on."""
        self.keys = [key for key in found if key.revoked is None]
        self.asks = self.asks or bool(found)
        self._seen = self.stamp()

    def refresh(self) -> None:
        """Read the file where it has changed; a damaged one changes nothing but that keys are asked for."""
        if self.path is None or self.stamp() == self._seen:
            return
        try:
            self.take(read(self.path))
        except LoraportError:
            self.asks = True

    def stamp(self) -> tuple[int, int, int] | None:
        """What changes when the file does."""
        try:
            info = self.path.stat() if self.path else None
        except OSError:
            return None
        return (info.st_mtime_ns, info.st_size, info.st_ino) if info else None

    def find(self, text: str) -> Key | None:
        """The living key that `text` is; every hash is compared, each in constant time."""
        self.refresh()
        asked, found = digest(text), None
        for key in (*self.keys, *([self.own] if self.own else [])):
            if hmac.compare_digest(key.sha256, asked):
                found = key
        return found if found and found.is_living() else None

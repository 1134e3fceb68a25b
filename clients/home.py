"""Where Loraport keeps things: `LORAPORT_HOME`, by default ~/.loraport, readable by its owner alone.

adapters/<name>/<version>/   immutable adapter folders; a new training is a new version
cache/                       the engine's compile cache and the like (it can execute code: private)
logs/                        one log per engine start
keys.json                    API keys, hashed
run/<port>.json              the endpoint that `loraport serve` holds open now

>>> Home.default().adapters
PosixPath('/home/me/.loraport/adapters')
"""

import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import ResourceError, os_errors


@dataclass(frozen=True)
class Home:
    """The folder that holds adapters, caches, logs and the record of running endpoints."""

    root: Path

    @classmethod
    def default(cls) -> "Home":
        """`LORAPORT_HOME` where it is set, else ~/.loraport."""
        return cls(Path(os.environ.get("LORAPORT_HOME") or Path.home() / ".loraport").expanduser().absolute())

    @property
    def adapters(self) -> Path:
        """Adapter folders, by name and version."""
        return self.root / "adapters"

    @property
    def cache(self) -> Path:
        """Caches that survive restarts."""
        return self.root / "cache"

    @property
    def logs(self) -> Path:
        """Logs of engine starts."""
        return self.root / "logs"

    @property
    def run(self) -> Path:
        """Records of endpoints that are open now."""
        return self.root / "run"

    @property
    def keys(self) -> Path:
        """The file of API keys, hashed."""
        return self.root / "keys.json"

    def ensure(self, folder: Path) -> Path:
        """Make `folder` inside home with mode 0700 and return it."""
        with os_errors("making", folder, "LORAPORT_HOME must be a folder that can be made and written"):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder


def write_json(path: Path, document: Any, is_private: bool = False) -> None:
    """Write `document` to `path` as JSON, whole or not at all."""
    write_whole(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode(), is_private)


def write_whole(path: Path, content: bytes, is_private: bool = False) -> None:
    """Write `content` to `path` so that a reader sees what was there before or all of it, never half.

    That holds for threads and processes that write at once, and for a machine that loses power. `is_private`: the file
    gets mode 0600, wherever it lies.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with os_errors("writing", path):
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            with os.fdopen(os.open(partial, flags, 0o600 if is_private else 0o666), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def require_disk(path: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse when the file system that will hold `path` has less than `needed_bytes` free."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ResourceError(
            f"{purpose} needs {needed_bytes / 2**20:,.0f} MiB on disk, {existing} has {free / 2**20:,.0f} MiB free.",
            "free some space, or set LORAPORT_HOME to a folder on another disk",
        )

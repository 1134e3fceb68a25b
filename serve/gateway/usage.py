"""What each key has used: requests and tokens, in memory, written to a file now and then.

Tokens are those that the engine reports as `usage` at the end of its reply. A stream has them when they are asked for:
by the client, or by us where it leaves that open (body.py). Replies without are counted as `uncounted`.
"""

import asyncio
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import LoraportError
from loraport.clients.home import write_json

TAIL_BYTES = 8 << 10  # of a reply, which hold its usage
# A quote that is escaped stands inside a text of the reply.
USAGE = re.compile(rb'(?<!\\)"usage"\s*:\s*(?=\{)')
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Tokens:
    """Tokens of one request, in and out."""

    prompt: int
    completion: int


def read_usage(tail: bytes) -> Tokens | None:
    """The last `usage` in the end of a reply, in the words of any of the APIs."""
    for found in reversed(list(USAGE.finditer(tail))):
        try:
            fields, _ = DECODER.raw_decode(tail[found.end() :].decode("utf-8", "replace"))
        except ValueError:
            continue
        prompt = fields.get("prompt_tokens", fields.get("input_tokens"))
        completion = fields.get("completion_tokens", fields.get("output_tokens"))
        if isinstance(prompt, int):
            return Tokens(prompt, completion if isinstance(completion, int) else 0)
    return None


@dataclass
class Used:
    """Sums of one key; `last`: its latest request, in seconds since the epoch."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    refused: int = 0
    last: int = 0


class Usage:
    """Sums by name of key, going on where the file of an earlier run ended; an unreadable file starts anew."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.by_key: dict[str, Used] = {}
        self.is_written = True
        for name, fields in (read_file(path) if path else {}).items():
            self.by_key[name] = Used(**fields)

    def count(self, key: str, status: int, tokens: Tokens | None, *, replies: bool = True) -> None:
        """Add a request that is over; `replies`: to a route whose replies are written by the model."""
        used = self.by_key.setdefault(key, Used())
        used.requests += 1
        used.last = int(time.time())
        used.refused += status >= 400 and status != 499  # who hung up was not refused
        if tokens is not None:
            used.prompt_tokens += tokens.prompt
            used.completion_tokens += tokens.completion
        elif replies and status < 400:
            used.uncounted += 1
        self.is_written = False

    def document(self) -> dict[str, Any]:
        """The sums as JSON types."""
        return {name: asdict(used) for name, used in sorted(self.by_key.items())}

    def flush(self) -> None:
        """Write the sums where they have changed, at once."""
        if not self.is_written:
            self.write(self.document())

    async def flush_aside(self) -> None:
        """The same in a thread: a slow disk must hold no stream up. The sums are taken here, where they change."""
        if not self.is_written:
            await asyncio.to_thread(self.write, self.document())

    def write(self, document: dict[str, Any]) -> None:
        """Write sums. A full disk costs no request: the next flush tries again."""
        self.is_written = True
        try:
            if self.path is not None:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_json(self.path, document, is_private=True)
        except (LoraportError, OSError):
            self.is_written = False


def read_file(path: Path) -> dict[str, dict[str, int]]:
    """Sums of an earlier run, each number checked."""
    names = set(asdict(Used()))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): {n: int(v) for n, v in fields.items() if n in names} for key, fields in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def read_folder(folder: Path) -> dict[str, Used]:
    """Sums by name of key over all gateways of this machine, one file each; as of their latest writing."""
    sums: dict[str, Used] = {}
    for path in sorted(folder.glob("*.json")):
        for name, fields in read_file(path).items():
            sum_, one = sums.setdefault(name, Used()), Used(**fields)
            for field, value in asdict(one).items():
                setattr(sum_, field, max(sum_.last, value) if field == "last" else getattr(sum_, field) + value)
    return sums

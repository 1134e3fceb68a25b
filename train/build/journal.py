"""What an endpoint has answered so far: appended and synced line by line, so that `kill -9` loses no answer.

A line's key is a hash of all that went into the question; an answer is used again only for exactly the same one. The
file is locked while it is written to: two runs in one folder would ask everything twice.

    >>> with Journal(Path("asked.jsonl")) as journal:
    ...     journal.get(key) or journal.put(key, {"pairs": []})
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from loraport.clients.errors import ResourceError, os_errors


def key_of(*parts: str) -> str:
    """A name for a question: a hash of everything in it."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:32]


class Journal:
    """Answers by key. `reused`: how many of them were there before this run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, dict[str, Any]] = {}
        self.file: IO[str] | None = None
        self.reused = 0

    def __enter__(self) -> Self:
        with os_errors("opening", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise ResourceError(
                f"another run is writing to {self.path.parent}.", "wait for it, or choose another --out"
            ) from error
        self.read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.file:
            self.file.close()

    def read(self) -> None:
        """Take in the lines that are there; a last one that was cut off is ended, and asked again."""
        assert self.file
        self.file.seek(0)
        text = self.file.read()
        for line in text.split("\n"):
            try:
                entry = json.loads(line) if line else None
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("key"), str):
                self.answers[entry["key"]] = entry
        if text and not text.endswith("\n"):
            self.file.write("\n")

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer of an earlier run."""
        found = self.answers.get(key)
        self.reused += found is not None
        return found

    def put(self, key: str, answer: dict[str, Any]) -> dict[str, Any]:
        """Keep an answer, on the disk before this returns."""
        assert self.file
        entry = {"key": key, **answer}
        with os_errors("writing", self.path):
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        self.answers[key] = entry
        return entry

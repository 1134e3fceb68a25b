"""JSON documents of benches, read back: one for each file, or all that a report holds together.

>>> [part.kind for part in read_parts([Path("bench/report.json"), Path("startup.json")])]
['throughput', 'lora-tax', 'startup']
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import DataError, UsageError

REPORT = "report"  # the kind that holds others


@dataclass(frozen=True)
class Part:
    """One document. `status`: done, cut, failed or skipped; without a `document` the `reason` says why."""

    name: str
    status: str
    document: dict[str, Any] | None
    reason: str = ""

    @property
    def kind(self) -> str:
        """Which bench wrote it; its name where none did."""
        return str(self.document["bench"]) if self.document else self.name

    def to_json(self) -> dict[str, Any]:
        """For a report's JSON."""
        return dict(vars(self))

    @classmethod
    def parse(cls, found: dict[str, Any]) -> "Part":
        """From what `to_json` made."""
        return cls(*(found[name] for name in ("name", "status", "document", "reason")))


def read_document(path: Path) -> dict[str, Any]:
    """What a bench wrote; UsageError where there is no such file, DataError where it is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "give a file that a bench wrote") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON document: {error}.", "give a file that a bench wrote with --out") from error
    if not isinstance(found, dict) or not isinstance(found.get("bench"), str):
        raise DataError(f"{path} is not of a bench: it has no `bench`.", "give a file that a bench wrote with --out")
    return found


def read_parts(paths: Sequence[Path]) -> list[Part]:
    """The documents of all files, those inside reports one by one; names are made unique."""
    found: list[Part] = []
    for path in paths:
        document = read_document(path)
        try:
            inside = [Part.parse(each) for each in document["parts"]] if document["bench"] == REPORT else None
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is a damaged report: {error!r}.", "make it again") from error
        found += [part_of(path.stem, document)] if inside is None else inside
    return [
        Part(name, part.status, part.document, part.reason) for name, part in zip(unique(found), found, strict=True)
    ]


def part_of(name: str, document: dict[str, Any]) -> Part:
    """A document as a part: cut where it says itself that it is not complete."""
    return Part(name, "done" if document.get("complete", True) else "cut", document)


def unique(parts: Sequence[Part]) -> list[str]:
    """Names of parts, numbered where two have the same."""
    names = [part.name for part in parts]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: at + 1].count(name)})" for at, name in enumerate(names)
    ]

"""`--fix`: a cleaned copy of rows as chat JSONL, and what was changed, row by row.

Two steps. First each row is mended where its meaning is plain: special tokens at the ends of a text are removed (they
were left behind by a template), those inside get a blank after their first character, so that they are text again;
empty turns at the end and empty system messages are removed. Then the mended rows are checked as any file is. What is
still an error is left out, and so are exact copies but the first, and rows that the evaluation asks again.
Near-copies and contradictions stay: which of them is right is not for a program to say.

    >>> fix(find_source("rows.jsonl"), None, encoder, Limits(2048), Path("clean.jsonl")).kept
    998
"""

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from loraport.clients.errors import DataError, UsageError, os_errors
from loraport.clients.rows import BadRow, Message, Row, Source, convert, detect, iter_rows
from loraport.clients.rows.files import Broken, read_records
from loraport.clients.rows.source import suffix_of
from loraport.train.data.check import Limits, check
from loraport.train.data.findings import LISTED, Finding, Place
from loraport.train.data.survey import kind_of, whole_file
from loraport.train.data.tokens import Encoder

TURNS, TEXTS = ("messages", "conversations"), ("content", "value")  # what formats call turns and their texts
HEAD = 20  # records that tell a file's format
CHANGES = {
    "token_removed": "special tokens at the start or end of a text removed",
    "token_broken": "special tokens inside a text broken up by a blank",
    "turn_removed": "empty turns removed",
}


@dataclass
class Fixed:
    """What was done: `kept` rows, and which were `changed` how, or `dropped` for what kind of finding.

    `remaining`: errors that the copy cannot mend, because they are in the evaluation rows.
    """

    out: Path
    kept: int = 0
    changed: dict[str, list[Place]] = field(default_factory=dict)
    dropped: dict[str, list[Place]] = field(default_factory=dict)
    remaining: list[Finding] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For JSON; at most LISTED rows a reason."""
        return {
            "file": str(self.out),
            "rows": self.kept,
            "changed": listed(self.changed),
            "dropped": listed(self.dropped),
        }


def listed(reasons: dict[str, list[Place]]) -> dict[str, Any]:
    """Rows by reason, with their number, for JSON."""
    return {
        reason: {"count": len(places), "rows": [place.document() for place in places[:LISTED]]}
        for reason, places in reasons.items()
    }


def check_target(out: Path, force: bool) -> None:
    """UsageError when the copy would overwrite something, or cannot lie there."""
    if out.is_dir() or (out.exists() and not force):
        raise UsageError(f"{out} exists already.", "choose another file for --fix, or overwrite it with --force")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {out.absolute().parent}.", "make it first")
    if suffix_of(out) != ".jsonl" or out.suffix == ".gz":
        raise UsageError(f"--fix writes JSONL, and {out} is named otherwise.", "give a name that ends in .jsonl")


def refuse_own_rows(out: Path, *sources: Source | None) -> None:
    """UsageError when the copy would replace rows that it is made of: what --fix leaves out would be lost."""
    for path in (path for source in sources if source for path in source.files):
        if out.exists() and out.samefile(path):
            raise UsageError(f"--fix would overwrite the rows in {path}.", "choose another file for the cleaned copy")


def fix(
    source: Source,
    eval_source: Source | None,
    encoder: Encoder,
    limits: Limits,
    out: Path,
    format: str = "auto",
    method: str = "auto",
) -> Fixed:
    """Write the cleaned copy `out`; DataError when no row would be left, and then nothing is written."""
    fixed = Fixed(out)
    mended, partial = (out.with_name(f".{out.stem}.{name}.jsonl") for name in ("mended", "partial"))
    try:
        with os_errors("writing", out):
            origins = write_mended(source, format, encoder, mended, fixed)
            drop = rows_to_drop(mended, eval_source, encoder, limits, fixed, method) if len(origins) else {}
            for line, finding in drop.items():
                fixed.dropped.setdefault(finding, []).append(origins.place(line))
            fixed.kept = len(origins) - len(drop)
            if not fixed.kept:
                raise DataError(f"no row of {source.name} would be left: nothing was written.", "see the findings")
            copy_lines(mended, partial, drop)
            partial.replace(out)
    finally:
        mended.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    for places in (*fixed.changed.values(), *fixed.dropped.values()):
        places.sort(key=lambda place: (place.file, place.row))
    return fixed


@dataclass
class Origins:
    """Where each line of the mended file came from."""

    files: list[str] = field(default_factory=list)
    file_numbers: "array[int]" = field(default_factory=lambda: array("i"))
    lines: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, file: str, line: int) -> None:
        """The next line came from there."""
        if not self.files or self.files[-1] != file:
            self.files.append(file)
        self.file_numbers.append(len(self.files) - 1)
        self.lines.append(line)

    def place(self, line: int) -> Place:
        """The origin of a line, counted from 1."""
        return Place("train", self.files[self.file_numbers[line - 1]], self.lines[line - 1])

    def __len__(self) -> int:
        return len(self.lines)


def write_mended(source: Source, format: str, encoder: Encoder, mended: Path, fixed: Fixed) -> Origins:
    """Write all rows that can be read, mended; note what was changed and which rows could not be read."""
    origins = Origins()
    kinds: set[str] = set()
    with mended.open("w", encoding="utf-8") as handle:
        for row in mended_rows(source, format, fixed):
            if isinstance(row, BadRow):
                place = Place("train", row.source, row.line)
                fixed.dropped.setdefault(kind_of(row), []).append(place)
                continue
            clean = mend(row, encoder.template.specials, fixed)
            kinds.add("pairs" if clean.rejected else "conversations" if clean.text is None else "documents")
            if len(kinds) > 1:
                raise DataError(f"{source.name} holds {' and '.join(sorted(kinds))}.", "fix them in two runs")
            handle.write(json.dumps(document_of(clean), ensure_ascii=False) + "\n")
            origins.add(row.source, row.line)
    return origins


def document_of(row: Row) -> dict[str, Any]:
    """A row as it stands in a JSONL file."""
    if row.text is not None:
        return {"text": row.text}
    if row.rejected is not None:
        asked = {"messages": row.messages[:-1]} | ({"tools": row.tools} if row.tools else {})
        return {"input": asked, "preferred_output": row.messages[-1:], "non_preferred_output": [row.rejected]}
    return {"messages": row.messages} | ({"tools": row.tools} if row.tools else {})


def mended_rows(source: Source, format: str, fixed: Fixed) -> Iterator[Row | BadRow]:
    """The rows of all files; those that are refused are tried once more without their empty turns."""
    for path in source.files:
        records = read_records(path)
        try:
            known = detect(record for _, record in islice(read_records(path), HEAD)) or "chat"
            for row in iter_rows(Source(str(path), (path,)), format):
                if isinstance(row, BadRow):
                    record = next((record for line, record in records if line == row.line), None)
                    row = without_empty_turns(record, known if format == "auto" else format, row, fixed)
                yield row
        except DataError as error:
            yield whole_file(path, error)


def without_empty_turns(record: Any, format: str, bad: BadRow, fixed: Fixed) -> Row | BadRow:
    """A refused record once more, without the empty turns at its end; `bad` when that does not help."""
    key = next((key for key in TURNS if isinstance(record, dict) and isinstance(record.get(key), list)), None)
    if key is None or isinstance(record, Broken):
        return bad
    turns = list(record[key])
    while turns and is_empty(turns[-1]):
        turns.pop()
    try:
        row = convert(record | {key: turns}, format, bad.source, bad.line)
    except DataError:
        return bad
    fixed.changed.setdefault("turn_removed", []).append(Place("train", bad.source, bad.line))
    return row


def is_empty(turn: Any) -> bool:
    """Whether a turn says and calls nothing."""
    if not isinstance(turn, dict) or turn.get("tool_calls"):
        return False
    return not any(str(turn.get(key) or "").strip() for key in TEXTS)


def mend(row: Row, specials: re.Pattern[str] | None, fixed: Fixed) -> Row:
    """The row with special tokens broken up or removed, and without empty system messages."""
    done: set[str] = set()

    def clean(text: str) -> str:
        if specials is None or not specials.search(text):
            return text
        shorn = strip_tokens(text, specials)
        broken = break_tokens(shorn, specials)
        done.update(name for name, was in (("token_removed", shorn != text), ("token_broken", broken != shorn)) if was)
        return broken

    def mend_message(message: Message) -> Message:
        return message | {key: clean(message[key]) for key in ("content", "reasoning_content") if key in message}

    messages: list[Message] = []
    for message in row.messages:
        if message["role"] == "system" and not message["content"].strip():
            done.add("turn_removed")
        else:
            messages.append(mend_message(message))
    text = clean(row.text) if row.text is not None else None
    mended = replace(row, messages=messages, text=text, rejected=mend_message(row.rejected) if row.rejected else None)
    for change in done:
        fixed.changed.setdefault(change, []).append(Place("train", row.source, row.line))
    return mended


def strip_tokens(text: str, specials: re.Pattern[str]) -> str:
    """`text` without special tokens, and the space around them, at its ends."""
    either = rf"(?:\s*(?:{specials.pattern}))+\s*\Z|\A\s*(?:(?:{specials.pattern})\s*)+"
    return re.sub(either, "", text)


def break_tokens(text: str, specials: re.Pattern[str]) -> str:
    """`text` with a blank behind the first character of each special token; one of a single character is removed."""
    while specials.search(text):
        text = specials.sub(lambda found: f"{found[0][0]} {found[0][1:]}" if len(found[0]) > 1 else "", text)
    return text


def rows_to_drop(
    mended: Path, eval_source: Source | None, encoder: Encoder, limits: Limits, fixed: Fixed, method: str
) -> dict[int, str]:
    """Lines of the mended file that are left out, and the kind of finding for which they are."""
    report = check(Source(str(mended), (mended,)), eval_source, encoder, limits, method=method)
    drop: dict[int, str] = {}
    for finding in report.findings:
        if finding.level == "error" or finding.kind == "duplicate":
            for place in finding.places:
                if place.data == "train":
                    drop.setdefault(place.row, finding.kind)
            if any(place.data == "eval" for place in finding.places):
                fixed.remaining.append(finding)
    return drop


def copy_lines(mended: Path, out: Path, drop: dict[int, str]) -> None:
    """Copy the lines that are not dropped."""
    with mended.open("rb") as rows, out.open("wb") as handle:
        for line, text in enumerate(rows, 1):
            if line not in drop:
                handle.write(text)

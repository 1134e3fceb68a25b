"""Chat rows: JSONL, one object with `messages` a line. Training learns from them, `loraport eval` asks them again.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

Everything here is about one row by itself; what a chat template or a context length makes of it is for `train/`.

    >>> read_rows(Path("examples/demo/heldout.jsonl"))[0].reference
    'Answer: ...'
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.clients.errors import DataError, UsageError, os_errors

ROLES = ("system", "user", "assistant")
EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """One conversation and the `line` of its file, counted from 1. Messages hold `role` and `content`."""

    messages: list[Message]
    line: int

    @property
    def last_reply(self) -> int:
        """Index of the last assistant turn."""
        return max(index for index, message in enumerate(self.messages) if message["role"] == "assistant")

    @property
    def prompt(self) -> list[Message]:
        """Everything before the last assistant turn."""
        return self.messages[: self.last_reply]

    @property
    def reference(self) -> str:
        """What the last assistant turn says."""
        return self.messages[self.last_reply]["content"]


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, blank lines skipped.

    Raises UsageError when there is no such file, DataError that names file and line when a row cannot be used.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file of rows.", "give a JSONL file")
    if not path.exists():
        raise UsageError(f"there is no data file {path}.", "check the path")
    with os_errors("reading", path):
        raw = path.read_bytes()
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = [parse_row(text, f"{path}, line {line}", line) for line, text in enumerate(lines, 1) if text.strip()]
    if not rows:
        raise DataError(f"{path} is empty.", f"a row is one line: {EXAMPLE}")
    return rows


def parse_row(raw: bytes, where: str, line: int) -> Row:
    """One line of a file as a row. `where` stands in the errors."""
    try:
        document = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1}).", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else "not readable"
        raise DataError(f"{where}: not JSON ({problem}).", f"a row is one line: {EXAMPLE}") from error
    if not isinstance(document, dict):
        raise DataError(f"{where}: a {type(document).__name__}, not an object.", f"a row is one line: {EXAMPLE}")
    if "messages" not in document:
        keys = ", ".join(map(repr, document)) or "nothing"
        raise DataError(f"{where}: no key 'messages' (it has {keys}).", f"a row is one line: {EXAMPLE}")
    if document.get("tools"):
        raise DataError(f"{where}: it has 'tools'.", "tool calls cannot be trained yet: remove the row")
    return Row(check_messages(document["messages"], where), line)


def check_messages(messages: Any, where: str) -> list[Message]:
    """Return `messages` as role and content if they can be trained on; DataError otherwise."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' is not a list with messages in it.", f"a row is one line: {EXAMPLE}")
    checked = [check_message(message, f"{where}: message {at}") for at, message in enumerate(messages, 1)]
    replies = [message["content"] for message in checked if message["role"] == "assistant"]
    if not replies:
        raise DataError(f"{where}: no assistant turn.", "a row ends with the reply that the model shall give")
    if not all(reply.strip() for reply in replies):
        raise DataError(f"{where}: an assistant turn is empty.", "give the reply, or remove the row")
    if checked[0]["role"] == "assistant":
        raise DataError(f"{where}: it begins with the assistant.", "a row begins with a user or system message")
    return checked


def check_message(message: Any, where: str) -> Message:
    """Return a message's role and content; DataError when one is missing or of the wrong kind."""
    if not isinstance(message, dict):
        raise DataError(f"{where} is not an object.", "a message has 'role' and 'content'")
    unknown = sorted(set(message) - {"role", "content"})
    if unknown:
        raise DataError(f"{where} has the unknown key {unknown[0]!r}.", "a message has 'role' and 'content' alone")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}.", f"roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        kind = "no content" if content is None else f"content of type {type(content).__name__}"
        raise DataError(f"{where} has {kind}, not text.", "content is one string")
    return {"role": role, "content": content}

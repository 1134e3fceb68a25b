"""Conversations of your own, replayed: turns follow each other, with the server's own replies as the history.

A recorded reply says only that there was one. Where it calls a tool it stays in the history, because the tool's answer
belongs to it.

    >>> talk = Talk([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "(recorded)"}])
    >>> talk.ask()
    [{'role': 'user', 'content': 'Hi'}]
    >>> talk.hear("Hello!"); talk.ask() is None
    True
"""

from pathlib import Path
from typing import Any

from loraport.clients.errors import UsageError

Message = dict[str, Any]


class Talk:
    """One conversation as it goes on. `turn`: of the request that was asked last, from 1."""

    def __init__(self, messages: list[Message]) -> None:
        self.rest, self.history, self.turn = list(messages), list[Message](), 0

    def ask(self) -> list[Message] | None:
        """All messages before the next reply; None where no more is wanted."""
        end = next((at for at, message in enumerate(self.rest) if message["role"] == "assistant"), None)
        if end is None:
            return None
        self.history += self.rest[:end]
        self.rest = self.rest[end:]
        self.turn += 1
        return self.history

    def hear(self, text: str) -> None:
        """Take the server's reply."""
        recorded = self.rest.pop(0)
        self.history.append(recorded if recorded.get("tool_calls") else {"role": "assistant", "content": text})


def read_conversations(path: Path) -> list[list[Message]]:
    """Conversations of a file of rows, whole. UsageError where there is none, DataError for a row that is wrong."""
    from loraport.clients.rows import as_request, read_rows

    found = [as_request(row.messages) for row in read_rows(path) if row.messages]
    if not found:
        raise UsageError(f"{path} has no conversations.", "a row of chat has messages")
    return found

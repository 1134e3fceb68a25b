"""A row: one conversation or one document, and where it came from.

>>> Row([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], 1).reference
'4'
"""

from dataclasses import dataclass, replace
from typing import Any

from loraport.clients.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'

# `role` and `content` always; on some `weight` (0: no loss), `reasoning_content`, `tool_calls`, `tool_call_id`, `name`.
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One conversation, or one document where `text` is given (then there are no messages).

    `line`: its line, or its number, in the file `source`, counted from 1. `tools`: JSON schemas of the functions that
    the conversation may call. `unit`: what `line` counts. `rejected`: of a preference row, the reply that is not
    preferred to the last message.
    """

    messages: list[Message]
    line: int
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    source: str = ""
    unit: str = "line"
    rejected: Message | None = None

    @property
    def where(self) -> str:
        """File and line, as errors name them."""
        return place(self.source, self.line, self.unit)

    @property
    def last_reply(self) -> int:
        """Index of the last assistant turn that is to be learned; DataError for a document, which has none."""
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]["role"] == "assistant" and self.messages[index].get("weight", 1):
                return index
        raise DataError(f"{self.where}: a document of plain text has no prompt to answer.", "use chat rows here")

    @property
    def prompt(self) -> list[Message]:
        """Everything before that turn."""
        return self.messages[: self.last_reply]

    @property
    def reference(self) -> str:
        """What that turn says, without its thoughts and tool calls."""
        return str(self.messages[self.last_reply]["content"])

    @property
    def swapped(self) -> "Row":
        """A preference row with its two replies exchanged, to render the one that is not preferred."""
        assert self.rejected is not None
        return replace(self, messages=[*self.messages[:-1], self.rejected], rejected=self.messages[-1])


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why; `error` names file and line."""

    line: int
    where: str
    error: DataError
    source: str = ""

    def __post_init__(self) -> None:
        self.error.file, self.error.row = self.source, self.line


def place(source: str, line: int, unit: str = "line") -> str:
    """`rows.jsonl, line 7`."""
    return f"{source}, {unit} {line}" if source else f"{unit} {line}"

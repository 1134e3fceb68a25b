"""JSON documents out of a stream, one at a time: of an array, of the array in {"data": […]}, or one after another.

The documents themselves are the standard library's to read, as a line of JSONL is: the same texts are refused in both.
(A streaming parser would hand over a question mark where half of a UTF-16 pair stood.) Bytes that are no UTF-8 come as
lone surrogates, so that the caller can name the document they are in.

    >>> [record for record, text in Documents(io.StringIO('[{"a": 1}, {"a": 2}]')).rows()]
    [{'a': 1}, {'a': 2}]
"""

import json
import re
from collections.abc import Iterator
from typing import IO, Any

PIECE = 1 << 16  # characters to read at least; those in which an object shows whether its rows are inside "data"
NEAR = 16  # so near to the end of what was read, an error may mean that more must be read
BLANK = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()

Document = tuple[Any, str]  # with the text it was made of


class Documents:
    """Reads from `stream`, which is opened with errors="surrogateescape". ValueError where it is no JSON."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.text, self.at = "", 0  # what was read, and how much of it is done

    def rows(self) -> Iterator[Document]:
        """All documents that are rows."""
        first = self.peek()
        if first == "[":
            yield from self.items()
            if self.peek():
                raise json.JSONDecodeError("Extra data", self.text, self.at)
        elif first == "{" and self.find_data():
            yield from self.items()
        else:
            while self.peek():
                yield self.next()

    def items(self) -> Iterator[Document]:
        """The documents of the array that begins here."""
        self.at += 1
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.next()
            after = self.peek()
            if after not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", self.text, self.at)
            self.at += 1
            if after == "]":
                return

    def peek(self) -> str:
        """The next character that is not blank; none at the end."""
        while (at := self.skip(self.at)) == len(self.text):
            self.at = at
            if not self.more():
                return ""
        self.at = at
        return self.text[at]

    def skip(self, at: int) -> int:
        """The place of the next character that is not blank."""
        found = BLANK.match(self.text, at)
        return found.end() if found else at

    def more(self) -> bool:
        """Read on, as much again as is not done yet; False at the end."""
        rest = self.text[self.at :]
        piece = self.stream.read(max(PIECE, len(rest)))
        self.text, self.at = rest + piece, 0
        return bool(piece)

    def next(self) -> Document:
        """The document that begins here."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - NEAR
                if cut and self.more():
                    continue
                raise
            text = self.text[self.at : end]
            if end == len(self.text) and self.more():  # a number may go on
                continue
            self.at += len(text)
            return value, text

    def find_data(self) -> bool:
        """Whether the object that begins here has its rows in a list called `data`; then go there."""
        self.more()
        at = self.at
        try:
            while True:
                key, at = DECODER.raw_decode(self.text, self.skip(at + 1))
                at = self.skip(self.skip(at) + 1)  # behind the colon
                if key == "data" and self.text[at] == "[":
                    self.at = at
                    return True
                _, at = DECODER.raw_decode(self.text, at)
                at = self.skip(at)
                if self.text[at] != ",":
                    return False
        except (ValueError, IndexError, RecursionError):  # the head is cut off somewhere
            return False

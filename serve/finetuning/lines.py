"""JSONL checked while it arrives: each line a JSON object in UTF-8, not too long; and how many there are.

Whether the rows can be trained on is for the job: it knows base and method, and its answer names the row.

    >>> lines = Lines()
    >>> lines.feed(b'{"messages": []}\\n{"mess')
    >>> lines.feed(b'ages": []}'); lines.end(); lines.rows
    2
"""

import json

from pydantic_core import from_json

LINE_BYTES = 8 << 20  # of one line: more is no conversation, and would have to be held whole
BOM = b"\xef\xbb\xbf"


class Lines:
    """`fault`: what is wrong with the first line that is; None so far. After it, nothing more is looked at."""

    def __init__(self) -> None:
        self.rows = 0
        self.line = 0
        self.fault: str | None = None
        self.rest = b""

    def feed(self, data: bytes) -> None:
        """Some bytes of the file."""
        if self.fault:
            return
        *whole, self.rest = (self.rest + data).split(b"\n")
        for raw in whole:
            self.check(raw)
        if len(self.rest) > LINE_BYTES:
            self.check(self.rest)
            self.rest = b""

    def end(self) -> None:
        """The file is over."""
        if self.rest and not self.fault:
            self.check(self.rest)
        self.rest = b""

    def check(self, raw: bytes) -> None:
        """One line; blank ones count as lines, and hold nothing."""
        if self.fault:
            return
        self.line += 1
        text = (raw.removeprefix(BOM) if self.line == 1 else raw).strip()
        if len(text) > LINE_BYTES:
            self.fault = f"line {self.line} is longer than {LINE_BYTES >> 20} MiB"
        elif text:
            self.fault = self.fault_of(text)
            self.rows += self.fault is None

    def fault_of(self, text: bytes) -> str | None:
        """What is wrong with a line that is not blank."""
        try:
            value = from_json(text, allow_inf_nan=False)
        except ValueError:
            return f"line {self.line} is not JSON ({why(text)})"
        if not isinstance(value, dict):
            return f"line {self.line} is not a JSON object but {KINDS.get(type(value), 'something else')}"
        return None


KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def why(text: bytes) -> str:
    """What Python's own parser says of it, without quoting it."""
    try:
        json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} of it is not UTF-8"
    except json.JSONDecodeError as error:
        return f"{error.msg} at character {error.pos + 1}"
    except RecursionError:
        return "nested too deep"
    return "a number or character that JSON does not have"

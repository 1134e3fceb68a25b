"""What a stream of server-sent events says, and when: fed with bytes as they come, it keeps times and counts, no text.

A chunk of tokens is an event with `choices` that does more than name the role; what it holds may be no text, where a
token is half a character. Tokens are counted by `usage`, never by chunks.

    >>> reply = Reply()
    >>> reply.feed(b'data: {"choices": [{"text": "Hi"}]}\n\n', at=1.25)
    >>> reply.first_text
    1.25
"""

import json
from typing import Any

from loraport.bench.load.record import LONGEST_QUOTE, Record, bucket_of

LONGEST_EVENT = 1 << 24  # bytes; a stream without ends of events must not fill the memory
TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls")


class Reply:
    """The timeline of one reply. `done`: the server said [DONE]; `words`: its content, where it is kept."""

    def __init__(self, keeps_words: bool = False) -> None:
        self.words: list[str] | None = [] if keeps_words else None
        self.carry = b""
        self.first: float | None = None
        self.first_text: float | None = None
        self.last: float | None = None
        self.chunks = 0
        self.gaps: dict[int, int] = {}
        self.prompt: int | None = None
        self.completion: int | None = None
        self.cached: int | None = None
        self.done = False
        self.error = self.said = ""

    def feed(self, data: bytes, at: float) -> None:
        """Take bytes that arrived at time `at`, in pieces of any size."""
        if b"\r" in data:  # within JSON it is escaped
            data = data.replace(b"\r", b"")
        *events, self.carry = (self.carry + data if self.carry else data).split(b"\n\n")
        for event in events:
            self.take(event, at)
        if len(self.carry) > LONGEST_EVENT:
            self.fail("stream error", f"an event of more than {LONGEST_EVENT >> 20} MiB")
            self.carry = b""

    def take(self, event: bytes, at: float) -> None:
        """Take one event; comments and names of events are of no interest."""
        if not event.startswith(b"data:"):
            event = next((line for line in event.split(b"\n") if line.startswith(b"data:")), b"")
        data = event[5:].strip()
        if data == b"[DONE]":
            self.done = True
        elif data:
            try:
                document = json.loads(data)
                self.read(document, at)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                self.fail("stream error", data.decode(errors="replace"))

    def read(self, document: dict[str, Any], at: float) -> None:
        """Take one document: tokens, the usage, or an error."""
        choices = document.get("choices")
        if choices:
            self.see(choices[0], at)
        used = document.get("usage")
        if used:
            self.prompt, self.completion = tokens(used, "prompt_tokens"), tokens(used, "completion_tokens")
            self.cached = tokens(used.get("prompt_tokens_details") or {}, "cached_tokens")
        if "error" in document:
            said = document["error"]
            self.fail("stream error", str(said.get("message", said) if isinstance(said, dict) else said))

    def see(self, choice: dict[str, Any], at: float) -> None:
        """Take a choice: the role alone is not a token."""
        delta = choice.get("delta")
        if delta is None:
            has_text = bool(choice["text"])
        else:
            has_text = any(delta.get(name) for name in TEXTS)
            if not has_text and ("role" in delta or not delta) and self.first is None:
                return
        if self.last is None:
            self.first = at
        else:
            bucket = bucket_of(at - self.last)
            self.gaps[bucket] = self.gaps.get(bucket, 0) + 1
        if has_text and self.first_text is None:
            self.first_text = at
        if self.words is not None:
            self.words.append(str((delta or choice).get("content") or ""))
        self.last = at
        self.chunks += 1

    def fail(self, error: str, said: str = "") -> None:
        """Note what went wrong; the first trouble is the cause of the others."""
        if not self.error:
            words = " ".join(said.split())
            self.error, self.said = error, words if len(words) <= LONGEST_QUOTE else words[:LONGEST_QUOTE] + " …"

    def settle(self) -> None:
        """At the end of the answer: a stream that lacks its tokens, its end or its counts is an error."""
        if self.first is None:
            self.fail("no tokens")
        elif self.completion is None:
            self.fail("no usage" if self.done else "cut")

    def write_to(self, record: Record) -> None:
        """Copy what was seen into the record."""
        record.first, record.first_text, record.last = self.first, self.first_text, self.last
        record.chunks, record.error, record.said = self.chunks, self.error, self.said
        record.gaps = [number for pair in sorted(self.gaps.items()) for number in pair]
        record.prompt_tokens, record.completion_tokens = self.prompt, self.completion
        record.cached_tokens = self.cached


def tokens(used: dict[str, Any], name: str) -> int | None:
    """A number of tokens of `usage`; None where it is not told, ValueError where it is no number of tokens."""
    found = used.get(name)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 0):
        raise ValueError(f"{name} is {found!r}")
    return found

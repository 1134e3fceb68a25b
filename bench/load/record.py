"""One request as a line on disk: when it was due, sent, answered; tokens by the server's count; what went wrong.

Times are seconds of the machine's monotonic clock, which all processes share. Gaps between chunks are counted in
buckets one percent apart, so that an hour of records stays small: `[bucket, count, bucket, count, ...]`.

    >>> gap_seconds(bucket_of(0.0123))
    0.0123...
"""

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

BUCKET = math.log(1.01)
SHORTEST_GAP_S = 1e-6
LONGEST_QUOTE = 200  # characters of a server's words that a record keeps
# What can be wrong with one request. The server's are its answers; the rest is about the connection and the stream.
ERRORS = {
    "refused": "no connection",
    "timeout": "not answered in time",
    "429": "too many requests (429)",
    "4xx": "refused by the server (4xx)",
    "5xx": "failed in the server (5xx)",
    "cut": "connection closed before the end",
    "not a stream": "answered, but not with a stream of events",
    "stream error": "an error inside the stream",
    "no tokens": "a stream without a token",
    "no usage": "a stream that never said its token count",
    "stopped": "ended with the measurement",
}
ENCODER = json.JSONEncoder(separators=(",", ":"))


def kind_of_status(status: int) -> str:
    """The error that an HTTP status is; empty for 200."""
    if status == 200:
        return ""
    return "429" if status == 429 else "5xx" if status >= 500 else "4xx"


def bucket_of(gap: float) -> int:
    """The bucket of a gap in seconds."""
    return round(math.log(max(gap, SHORTEST_GAP_S) / SHORTEST_GAP_S) / BUCKET)


def gap_seconds(bucket: int) -> float:
    """The middle of a bucket: within half a percent of every gap in it."""
    return SHORTEST_GAP_S * math.exp(bucket * BUCKET)


@dataclass(slots=True)
class Record:
    """One request. `first`, `last`: the first and the last chunk of tokens; `first_text`: the first with text in it.

    They differ where a token has no text of its own, as half a character has none. `turn`: of the conversation `index`,
    from 1; 0 where requests are no conversations.
    """

    stage: int
    index: int
    model: str
    due: float
    sent: float = 0.0
    first: float | None = None
    first_text: float | None = None
    last: float | None = None
    chunks: int = 0
    gaps: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    status: int = 0
    error: str = ""
    said: str = ""
    turn: int = 0

    def line(self) -> str:
        """As a line of JSON."""
        return ENCODER.encode({name: getattr(self, name) for name in FIELDS}) + "\n"

    @classmethod
    def parse(cls, line: str | bytes) -> "Record":
        """From its line."""
        document: dict[str, Any] = json.loads(line)
        return cls(**document)


FIELDS = tuple(each.name for each in fields(Record))  # asdict would copy them all, four times as slowly

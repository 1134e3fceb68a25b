"""Recorded arrivals: a file with a time and, optionally, token counts for each request, replayed as an open loop.

CSV, JSONL, JSON or Parquet, also .gz. Known are the columns of the Azure LLM inference traces (TIMESTAMP,
ContextTokens, GeneratedTokens), of BurstGPT (Timestamp, Request tokens, Response tokens), of Mooncake (timestamp in
milliseconds, input_length, output_length, hash_ids), and the likes of them. Numbers are seconds.

The command reads the trace once and writes what is due as plain lines; each process reads those as it goes on, so that
a trace of a day needs no memory there.

    >>> trace = read_trace(Path("AzureLLMInferenceTrace_conv.csv"))
    >>> len(trace.times), trace.seconds, trace.rate
    (19366, 3501.7, 5.53)
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraport.clients.errors import DataError

TIMES = ("timestamp", "arrivaltime", "arrivedat", "arrivaltimestamp", "arrival", "time", "ts")
INPUTS = (
    "contexttokens",
    "inputtokens",
    "inputlength",
    "inputlen",
    "prompttokens",
    "promptlen",
    "promptlength",
    "requesttokens",
    "numprefilltokens",
)
OUTPUTS = (
    "generatedtokens",
    "outputtokens",
    "outputlength",
    "outputlen",
    "completiontokens",
    "responsetokens",
    "generationtokens",
    "numdecodetokens",
)
EXAMPLE = "columns are TIMESTAMP, ContextTokens and GeneratedTokens, for example; the last two may be missing"
MOST_TOKENS = 1 << 30
Due = tuple[float, tuple[int, int] | None]  # seconds from the start; tokens of prompt and reply


@dataclass(frozen=True)
class Trace:
    """Requests by time, the first at 0. `inputs`, `outputs`: tokens, both empty where the file has none.

    `shortened`: prompts that were cut to fit a context.
    """

    times: Sequence[float]
    inputs: Sequence[int]
    outputs: Sequence[int]
    shortened: int = 0

    @property
    def seconds(self) -> float:
        """From the first request to the last."""
        return self.times[-1]

    @property
    def rate(self) -> float:
        """Requests per second, on average."""
        return (len(self.times) - 1) / self.seconds if self.seconds else float(len(self.times))

    def scaled(self, scale: float) -> "Trace":
        """Each second of the trace takes `scale` seconds."""
        return replace(self, times=array("d", (scale * time for time in self.times)))

    def cut(self, requests: int | None, seconds: float | None) -> "Trace":
        """Its first requests, and those that are due before `seconds`."""
        end = min(len(self.times), requests or len(self.times))
        while seconds is not None and end > 1 and self.times[end - 1] >= seconds:
            end -= 1
        return replace(self, times=self.times[:end], inputs=self.inputs[:end], outputs=self.outputs[:end])

    def fit(self, context: int | None) -> "Trace":
        """Prompts and replies as long as the context has room for; shortened are both, the prompt last."""
        if not context or not self.inputs:
            return self
        outputs = [min(output, context - 1) for output in self.outputs]
        inputs = [min(one, context - output) for one, output in zip(self.inputs, outputs, strict=True)]
        pairs = zip(self.inputs, self.outputs, inputs, outputs, strict=True)
        shortened = sum((one, other) != (cut, shorter) for one, other, cut, shorter in pairs)
        return replace(self, inputs=inputs, outputs=outputs, shortened=shortened)

    def write(self, path: Path) -> None:
        """As lines of `seconds`, or of `seconds input output`."""
        with path.open("w", encoding="utf-8") as lines:
            if self.inputs:
                rows = zip(self.times, self.inputs, self.outputs, strict=True)
                lines.writelines(f"{time:.6f} {one} {other}\n" for time, one, other in rows)
            else:
                lines.writelines(f"{time:.6f}\n" for time in self.times)

    def to_json(self) -> dict[str, Any]:
        """For the document."""
        mean = {"input": self.inputs, "output": self.outputs}
        return {
            "requests": len(self.times),
            "seconds": round(self.seconds, 3),
            "requests_per_second": round(self.rate, 4),
            "shortened": self.shortened,
            **{f"mean_{name}_tokens": round(sum(each) / len(each), 1) if each else None for name, each in mean.items()},
        }


def read_due(path: Path) -> Iterator[Due]:
    """What `Trace.write` wrote, a line at a time."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            time, *tokens = line.split()
            yield float(time), (int(tokens[0]), int(tokens[1])) if tokens else None


def read_trace(path: Path) -> Trace:
    """A trace in the order of its times. DataError names the line that is wrong, or what is missing."""
    from loraport.clients.rows.files import Broken, read_records

    times, inputs, outputs = array("d"), array("q"), array("q")
    names: tuple[str, str | None, str | None] | None = None
    for line, record in read_records(path):
        if isinstance(record, Broken):
            raise record.error
        if not isinstance(record, dict):
            raise DataError(f"{path}, row {line} is no object.", EXAMPLE)
        names = names or find_columns(path, record)
        where = f"{path}, row {line}"
        times.append((0.001 if "hash_ids" in record else 1.0) * seconds_of(record.get(names[0]), where))
        for name, column in ((names[1], inputs), (names[2], outputs)):
            if name:
                column.append(tokens_of(record.get(name), where, name))
    if not times:
        raise DataError(f"{path} has no requests.", EXAMPLE)
    order = sorted(range(len(times)), key=times.__getitem__)
    first = times[order[0]]
    lengths = [array("q", (column[at] for at in order)) if column else array("q") for column in (inputs, outputs)]
    return Trace(array("d", (times[at] - first for at in order)), lengths[0], lengths[1])


def find_columns(path: Path, record: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """The names of time, input and output in the first record; the last two both or neither."""
    plain = {re.sub("[^a-z]", "", str(key).lower()): key for key in record}
    found = [next((plain[name] for name in known if name in plain), None) for known in (TIMES, INPUTS, OUTPUTS)]
    if found[0] is None:
        raise DataError(f"{path} has no column of times (it has {', '.join(map(str, record)) or 'nothing'}).", EXAMPLE)
    if (found[1] is None) != (found[2] is None):
        missing = "output" if found[2] is None else "input"
        raise DataError(f"{path} has no column of {missing} tokens, but the other.", EXAMPLE)
    return found[0], found[1], found[2]


def seconds_of(value: Any, where: str) -> float:
    """A time in seconds: a number, or a date with its time of day (UTC where it does not say)."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if isinstance(value, str) and found != found:
        try:
            at = datetime.fromisoformat(value.strip())
            found = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            pass
    if not abs(found) < 1e15:
        raise DataError(f"{where}: {value!r} is no time.", "seconds, or a date like 2023-11-16 18:15:46.68")
    return found


def tokens_of(value: Any, where: str, name: str) -> int:
    """A number of tokens; 1 for none, because there is no request without."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not 0 <= found < MOST_TOKENS or found % 1:
        raise DataError(f"{where}: {name} {value!r} is no number of tokens.", EXAMPLE)
    return max(1, int(found))

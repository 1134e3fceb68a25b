"""Records into figures: percentiles, the steady window, goodput, and ratios with their intervals.

Definitions, told with every result: times start when a request was due. TTFT ends with the first chunk that has text;
TPOT is (last chunk − first chunk) / (tokens − 1), tokens as the server counts them, undefined for one token; a gap is
the time between two chunks, which may hold several tokens; E2E ends with the last chunk. Percentiles are linear, as
numpy's are by default; those of gaps are within half a percent.

    >>> stages = read_records(folder)
    >>> summarize(stages[0], load, {"ttft": 0.5, "tpot": 0.03})["ttft_ms"]["p50"]
    25.1
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraport.bench.load.record import Record, gap_seconds
from loraport.bench.load.stage import Load

Numbers = NDArray[np.float64]
QUANTILES = (50, 90, 95, 99)
RESAMPLES = 10_000
LEAST_ROUNDS = 3  # below these, no interval


@dataclass
class Records:
    """Records of one stage as columns; times and tokens of those that were answered, lateness of all that were sent."""

    requests: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)
    gaps: Counter[int] = field(default_factory=Counter)
    columns: dict[str, "array[float]"] = field(
        default_factory=lambda: {
            name: array("d")
            for name in ("due", "sent", "first", "first_text", "last", "prompt", "tokens", "cached", "late")
        }
    )

    def add(self, record: Record) -> None:
        """Take one record."""
        self.requests += 1
        self.columns["late"].append(record.sent - record.due)
        if record.error:
            self.errors[record.error] += 1
            self.said.setdefault(record.error, record.said)
            return
        values = (
            ("due", record.due),
            ("sent", record.sent),
            ("first", record.first),
            ("first_text", record.first_text),
            ("last", record.last),
            ("prompt", record.prompt_tokens),
            ("tokens", record.completion_tokens),
            ("cached", record.cached_tokens),
        )
        for name, value in values:
            self.columns[name].append(float("nan") if value is None else value)
        for bucket, count in zip(record.gaps[::2], record.gaps[1::2], strict=True):
            self.gaps[bucket] += count

    def joined(self, other: "Records | None") -> "Records":
        """These and others as one."""
        if other is None:
            return self
        self.requests += other.requests
        self.errors.update(other.errors)
        self.said = other.said | self.said
        self.gaps.update(other.gaps)
        for name, values in other.columns.items():
            self.columns[name].extend(values)
        return self

    def column(self, name: str) -> Numbers:
        """A column as an array."""
        return np.array(self.columns[name], dtype=np.float64)


def read_records(
    folder: Path,
    key: Callable[[Record], Any] = lambda record: record.stage,
    since: dict[str, int] | None = None,
    until: dict[str, int] | None = None,
) -> dict[Any, Records]:
    """All records of a folder by stage, or by another key. A line that was cut off by a kill is left out.

    `since`, `until`: the bytes of each file between which to read, as `sizes` tells them.
    """
    found: dict[Any, Records] = {}
    for path in sorted(folder.glob("records-*.jsonl")):
        with path.open("rb") as lines:
            at = lines.seek((since or {}).get(path.name, 0))
            for line in lines:
                if until and at >= until.get(path.name, at):
                    break
                at += len(line)
                if line.endswith(b"}\n"):
                    record = Record.parse(line)
                    found.setdefault(key(record), Records()).add(record)
    return found


def sizes(folder: Path) -> dict[str, int]:
    """How far the records of a folder go."""
    return {path.name: path.stat().st_size for path in folder.glob("records-*.jsonl")}


def summarize(records: Records, load: Load, limits: dict[str, float]) -> dict[str, Any]:
    """The figures of a stage as a document. `limits`: seconds, of ttft, tpot, e2e, for goodput."""
    due, first, last = (records.column(name) for name in ("due", "first", "last"))
    tokens, prompts = records.column("tokens"), records.column("prompt")
    times = latencies(records)
    answered = len(due)
    seconds = float(last.max() - due.min()) if answered else 0.0
    output, inputs = float(tokens.sum()), float(np.nansum(prompts))
    return {
        "requests": records.requests,
        "answered": answered,
        "errors": dict(records.errors.most_common()),
        "errors_said": {kind: words for kind, words in records.said.items() if words},
        "seconds": round(seconds, 3),
        "requests_per_second": per_second(answered, seconds),
        "input_tokens": int(inputs),
        "output_tokens": int(output),
        "mean_input_tokens": round(inputs / answered, 1) if answered else None,
        "mean_output_tokens": round(output / answered, 1) if answered else None,
        "output_tokens_per_second": per_second(output, seconds),
        "total_tokens_per_second": per_second(output + inputs, seconds),
        "steady": steady(records, load),
        "ttft_ms": percentiles(times["ttft"]),
        "tpot_ms": percentiles(times["tpot"]),
        "gap_ms": gap_percentiles(records.gaps),
        "e2e_ms": percentiles(times["e2e"]),
        "late_ms": percentiles(records.column("late")),
        "first_chunk_ms": percentiles(first - due),
        "first_chunk_without_text": int((records.column("first_text") != first).sum()),
        "cached_share": cached_share(records),
        "goodput": goodput(times, limits, seconds) if limits and answered else None,
    }


def latencies(records: Records) -> dict[str, Numbers]:
    """Seconds of each answered request; TPOT is not a number where there is one token."""
    due, first, last = (records.column(name) for name in ("due", "first", "last"))
    text, tokens = records.column("first_text"), records.column("tokens")
    text = np.where(np.isnan(text), first, text)  # a reply without any text
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(tokens > 1, (last - first) / (tokens - 1), np.nan)
    return {"ttft": text - due, "tpot": tpot, "e2e": last - due}


def percentiles(seconds: Numbers) -> dict[str, float | int] | None:
    """Count, mean, percentiles and maximum in milliseconds; None where there is nothing to measure."""
    values = 1000 * seconds[~np.isnan(seconds)]
    if not len(values):
        return None
    at = np.percentile(values, QUANTILES)
    found = {f"p{q}": round(float(value), 3) for q, value in zip(QUANTILES, at, strict=True)}
    return {"count": len(values), "mean": round(float(values.mean()), 3), **found, "max": round(float(values.max()), 3)}


def gap_percentiles(gaps: Counter[int]) -> dict[str, float | int] | None:
    """The same of gaps, from their buckets."""
    if not gaps:
        return None
    buckets = sorted(gaps)
    middles = 1000 * np.array([gap_seconds(bucket) for bucket in buckets])
    counts = np.array([gaps[bucket] for bucket in buckets])
    ends = np.cumsum(counts)
    total = int(ends[-1])
    found = {f"p{q}": round(float(middles[np.searchsorted(ends, q / 100 * total)]), 3) for q in QUANTILES}
    mean = float((middles * counts).sum() / total)
    return {"count": total, "mean": round(mean, 3), **found, "max": round(float(middles[-1]), 3)}


def steady(records: Records, load: Load) -> dict[str, float] | None:
    """Tokens/s while the load was whole: without the ramp at its front and the drain at its end.

    Closed loop: from the moment when as many requests have ended as run at once, to the last one that was sent. Open
    loop: from a median E2E after the start to the last that was due. None where that is shorter than a median E2E, and
    along a ramp.
    A request's tokens count evenly between its first and its last chunk.
    """
    due, first, last = (records.column(name) for name in ("due", "first", "last"))
    if len(due) < 2 or load.ramp_s:
        return None
    median = float(np.median(last - due))
    if load.kind == "closed":
        if len(due) <= load.concurrency:
            return None
        begin = float(np.sort(last)[load.concurrency - 1])
    else:
        begin = float(due.min()) + median
    end = float(due.max())
    if end - begin < median:
        return None
    length, tokens = last - first, records.column("tokens")
    inside = np.clip(np.minimum(last, end) - np.maximum(first, begin), 0, None)
    at_once = (first >= begin) & (first <= end)
    share = np.where(length > 0, inside / np.where(length > 0, length, 1), 0)
    counted = at_once + (tokens - 1) * share
    ended = ((last >= begin) & (last <= end)).sum()
    return {
        "from_s": round(begin - float(due.min()), 3),
        "seconds": round(end - begin, 3),
        "output_tokens_per_second": round(float(counted.sum()) / (end - begin), 3),
        "requests_per_second": round(float(ended) / (end - begin), 3),
    }


def cached_share(records: Records) -> float | None:
    """Share of the prompts' tokens that the server took from its prefix cache; None where it does not say."""
    cached, prompts = records.column("cached"), records.column("prompt")
    known = ~np.isnan(cached)
    total = float(prompts[known].sum())
    return round(float(cached[known].sum()) / total, 4) if total else None


def goodput(times: dict[str, Numbers], limits: dict[str, float], seconds: float) -> dict[str, Any]:
    """Requests that met every limit; a TPOT that is undefined misses none."""
    good = np.ones(len(times["e2e"]), dtype=bool)
    for name, limit in limits.items():
        good &= ~(times[name] > limit)
    met = {name: round(float((~(times[name] > limit)).mean()), 4) for name, limit in limits.items()}
    return {
        "limits_ms": {name: round(1000 * limit, 3) for name, limit in limits.items()},
        "share": round(float(good.mean()), 4),
        "requests_per_second": per_second(int(good.sum()), seconds),
        "met": met,
    }


def per_second(count: float, seconds: float) -> float | None:
    """A rate; None where no time passed."""
    return round(count / seconds, 3) if seconds > 0 else None


def paired_ratio(values: Sequence[float], references: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Geometric mean of value / reference over rounds, with the 95% interval of a bootstrap over rounds."""
    logs = np.log(np.asarray(values, dtype=np.float64)) - np.log(np.asarray(references, dtype=np.float64))
    return interval("ratio", logs, lambda mean: float(np.exp(mean)), seed)


def paired_difference(values: Sequence[float], references: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean of value − reference over rounds, with the 95% interval of a bootstrap over rounds."""
    return interval("difference", np.asarray(values) - np.asarray(references), float, seed)


def interval(name: str, each: Numbers, shown: Callable[[float], float], seed: int) -> dict[str, Any]:
    """A mean and the 2.5% and 97.5% quantiles of means of resampled rounds."""
    found: dict[str, Any] = {"rounds": len(each), name: round(shown(float(each.mean())), 4), "low": None, "high": None}
    if len(each) >= LEAST_ROUNDS:
        draw = np.random.default_rng(seed)
        means = each[draw.integers(0, len(each), (RESAMPLES, len(each)))].mean(axis=1)
        low, high = np.percentile(means, (2.5, 97.5))
        found |= {"low": round(shown(float(low)), 4), "high": round(shown(float(high)), 4)}
    return found


def merge_lags(lags: Iterable[dict[int, int]]) -> dict[str, float | int] | None:
    """Percentiles of how late the event loops of all processes were, in milliseconds."""
    total: Counter[int] = Counter()
    for each in lags:
        total.update(each)
    return gap_percentiles(total)

"""What a section of a report is made of: facts, curves, bars with intervals, tables, and what must be known.

>>> Bars("Cold start", "from the spawn", [Bar("port", 0, 60, "12.1 s"), Bar("health", 60, 100, "8.0 s")])
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraport.bench.serving import compare
from loraport.clients.charts import Along, Series, line_chart

GIB = 1 << 30
FEW_COLUMNS = 5  # more become rows
WIDE = 50  # ratio of values from which equal steps mean equal factors


@dataclass(frozen=True)
class Chart:
    """Curves, with the names for their key."""

    title: str
    unit: str
    names: list[str]
    svg: str


@dataclass(frozen=True)
class Bar:
    """From `start` to `end`, with an interval where it has one; all as percent of the longest."""

    name: str
    start: float
    end: float
    words: str
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars on one scale. `mark`: percent of a line through all of them, and what it is."""

    title: str
    note: str
    bars: list[Bar]
    mark: float | None = None


@dataclass(frozen=True)
class Table:
    """`head` over rows; the first of each row is its name. `is_words`: names and sentences, not figures."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    is_words: bool = False


@dataclass
class Section:
    """All that is shown of a document. `believed`: how many of how many what; `reasons`: why not all."""

    title: str
    about: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    bars: list[Bars] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    believed: tuple[int, int, str] | None = None
    reasons: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def estimates(title: str, note: str, each: Sequence[tuple[str, dict[str, Any]]]) -> list[Bars]:
    """Ratios with their intervals, and a line at 1; nothing of none."""
    if not each:
        return []
    longest = max(1.0, *(one["high"] or one["ratio"] for _, one in each)) * 1.02
    return [Bars(title, note, [estimate(name, one, longest) for name, one in each], mark=percent(1, longest))]


def estimate(name: str, ratio: dict[str, Any], longest: float) -> Bar:
    """A ratio with its interval."""
    low, high = (None if ratio[end] is None else percent(ratio[end], longest) for end in ("low", "high"))
    note = compare.spread(ratio, "{:.3f}") or "no interval"
    return Bar(name, 0.0, percent(ratio["ratio"], longest), f"{ratio['ratio']:.3f}", low, high, note)


def curve(title: str, unit: str, over: str, series: Sequence[Series]) -> list[Chart]:
    """A chart over a few values, equal factors apart; nothing where there are fewer than two."""
    drawn = [each for each in series if each.points]
    values = sorted({x for each in drawn for x, _ in each.points})
    if len(values) < 2:
        return []
    svg = line_chart(drawn, unit, from_zero=not wide(drawn), along=Along(over, f"over {over}", values))
    return [Chart(title, f"{unit}, over {over}", [each.name for each in drawn], svg)]


def count_believed(parts: Sequence[Mapping[str, Any]], word: str) -> tuple[int, int, str]:
    """How many are believed, of how many, and what they are."""
    return sum(bool(part["believed"]) for part in parts), len(parts), word


def sheet(title: str, names: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]], note: str) -> Table:
    """What was measured beside each other and its figures below; the other way round where there are many."""
    rows = [[name, *(cells[at] for _, cells in columns)] for at, name in enumerate(names)]
    kept = [row for row in rows if any(row[1:])]
    head = ["", *(label for label, _ in columns)]
    if len(columns) > FEW_COLUMNS:
        head, *kept = [list(row) for row in zip(head, *kept, strict=True)]
    return Table(title, head, kept, note)


def full_names(names: Sequence[str]) -> list[str]:
    """Names of rows that lean on the one above (`     p99`), spelled out for a head."""
    found: list[str] = []
    stem = ""
    for name in names:
        if name.startswith("  "):
            leaning = name.strip()
            found.append(f"{stem} {leaning}" if leaning in ("p99", "95%") else leaning)
            stem = stem if leaning in ("p99", "95%") else leaning
        else:
            stem = re.sub(r"\s+p50$", "", name)
            found.append(re.sub(r"\s+", " ", name))
    return found


def percent(value: float, longest: float) -> float:
    """Of a bar's track."""
    return round(100 * value / longest, 2) if longest else 0.0


def wide(series: Sequence[Series]) -> bool:
    """Whether values differ so much that equal steps should mean equal factors."""
    values = [value for each in series for _, value in each.points]
    return min(values) > 0 and max(values) / min(values) > WIDE

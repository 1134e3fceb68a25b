"""The report of a check for people: rows and tokens, their lengths, findings by level, the verdict.

>>> print("\\n".join(histogram(np.array([10, 20, 30]), limit=64)))
"""

import textwrap
from itertools import chain
from typing import Any

import numpy as np

from loraport.clients.terminal import console, printable, say
from loraport.train.data.check import Report, summary
from loraport.train.data.findings import KINDS, LEVELS, Finding, Place, count_of
from loraport.train.data.fix import CHANGES, Fixed
from loraport.train.data.survey import Survey

SHOWN = 5  # rows of a finding
BINS, BAR = 8, 32  # lines of the histogram, characters of its longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
IN_VERDICT = {"few_rows"}  # findings whose words are the verdict's


def show_report(report: Report) -> None:
    """Print it."""
    for survey in (report.train, report.evaluation):
        if survey is not None:
            show_counts(survey, "" if survey is report.train else ", to evaluate on")
    lengths = report.train.column("all_lengths")
    if len(lengths) and lengths.min() < lengths.max():
        show_lengths(lengths, report.limits.sequence_length)
    for level in LEVELS:
        found = [each for each in report.findings if each.level == level and each.kind not in IN_VERDICT]
        if found:
            say("")
            say(f"{level}s" if len(found) > 1 else level, f"bold {COLOURS[level]}")
        for each in found:
            show_finding(each, several_files(report))
    say("")
    verdict = report.verdict
    say_wrapped(f"verdict: {verdict.message}", "", "bold green" if verdict.enough else "bold yellow")
    if report.train.usable and verdict.told_by != "--task":
        say_wrapped(f"(told by: {verdict.told_by}; --task says otherwise)", "  ", "dim")


def show_counts(survey: Survey, what: str) -> None:
    """A source in one line."""
    tokens, trained = int(survey.column("length").sum()), int(survey.column("trained").sum())
    unusable = survey.read - survey.usable
    words = f"{survey.name}: {count_of(survey.read, 'preference row' if survey.pairs else 'row')}{what}"
    if unusable:
        words += f", {unusable:,} of them unusable"
    if tokens:
        words += f"; {count_of(tokens, 'token')}, {trained:,} of them trained ({100 * trained / tokens:.0f}%)"
    say_wrapped(words, "", "bold")


def show_lengths(lengths: Any, limit: int) -> None:
    """Tokens a row, as words and as a histogram."""
    of = summary(lengths)
    say_wrapped(
        f"tokens a row: half up to {of['p50']:,}, 95% up to {of['p95']:,}, the longest {of['max']:,}; the limit is "
        f"{limit:,}",
        "",
        "",
    )
    for line in histogram(lengths):
        say(f"  {line}")


def histogram(lengths: Any) -> list[str]:
    """A line for each of at most BINS ranges of lengths: range, rows, bar. The last takes those far beyond."""
    low, high, most = int(lengths.min()), int(np.percentile(lengths, 99, method="lower")), int(lengths.max())
    width = nice((high - low) / BINS)
    first = low // width * width
    edges = [*range(first, max(high, first + 1), width)][: BINS + 1]
    counts = np.histogram(lengths, [*edges, max(most + 1, edges[-1] + 1)])[0]
    names = [f"{edge:,}–{edge + width - 1:,}" for edge in edges[:-1]]
    last = edges[-1] + width - 1
    names.append(f"{edges[-1]:,}–{last:,}" if most <= last else f"{edges[-1]:,} and more")
    wide = max(map(len, names))
    return [
        f"{name:>{wide}}  {count:>9,}  {bar(count / counts.max())}".rstrip()
        for name, count in zip(names, counts, strict=True)
    ]


def nice(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ... that is not smaller."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= width:
                return digit * power
        power *= 10


def bar(share: float) -> str:
    """A bar of BAR characters where `share` is 1, in eighths of a character."""
    eighths = max(1, round(share * BAR * 8)) if share else 0
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def several_files(report: Report) -> bool:
    """Whether a row's number alone would not tell its file."""
    places = [place for finding in report.findings for place in finding.places]
    named = {(place.data, place.file) for place in places} | {("train", file) for file in report.train.files}
    return len({file for data, file in named if data == "train"}) > 1


def show_finding(finding: Finding, with_files: bool) -> None:
    """The sentence, the first rows, and the hint."""
    say_wrapped(finding.message, "  ", "")
    shown = finding.places[:SHOWN]
    if any(place.detail for place in shown):
        for place in shown:
            say_wrapped(f"{name_of(place, with_files)}: {place.detail}".removesuffix(": "), "    ", "dim")
        if len(finding.places) > SHOWN:
            say(f"    and {len(finding.places) - SHOWN:,} more", "dim")
    elif shown:
        more = f" and {len(finding.places) - SHOWN:,} more" if len(finding.places) > SHOWN else ""
        say_wrapped(", ".join(name_of(place, with_files) for place in shown) + more, "    ", "dim")
    say_wrapped(f"hint: {finding.hint or KINDS[finding.kind].hint}", "    ", "")


def name_of(place: Place, with_files: bool) -> str:
    """A row in words: its number, and the file or the split where that is needed."""
    if place.row == 0:
        return place.file
    if with_files:
        return f"{place.file}, row {place.row}"
    return f"evaluation row {place.row}" if place.data == "eval" else f"row {place.row}"


def say_wrapped(text: str, indent: str, style: str) -> None:
    """Print text for people, wrapped at words in a terminal; in a file a line stays a line."""
    text = printable(text)
    if not console.is_terminal:
        say(indent + text, style)
        return
    for line in textwrap.wrap(
        text, min(console.width, 120), initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
    ):
        say(line, style)


def show_fixed(fixed: Fixed) -> None:
    """What `--fix` changed, left out and wrote."""
    say("")
    say_wrapped(f"wrote {fixed.out}: {count_of(fixed.kept, 'row')}", "", "bold")
    with_files = len({place.file for place in chain(*fixed.changed.values(), *fixed.dropped.values())}) > 1
    for reason, places in fixed.changed.items():
        say_wrapped(f"{CHANGES[reason]} in {count_of(places, 'row')}: {some(places, with_files)}", "  ", "")
    for kind, places in fixed.dropped.items():
        say_wrapped(
            f"{count_of(places, 'row')} left out ({kind.replace('_', ' ')}): {some(places, with_files)}", "  ", ""
        )
    if not fixed.changed and not fixed.dropped:
        say("  nothing to change: a copy in chat JSONL")


def some(places: list[Place], with_files: bool) -> str:
    """The numbers of the first rows."""
    more = f" and {len(places) - SHOWN:,} more" if len(places) > SHOWN else ""
    return ", ".join(name_of(place, with_files) for place in places[:SHOWN]) + more

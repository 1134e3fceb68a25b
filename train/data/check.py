"""`loraport data check`: every row on the exact tokens that the trainer will see, and what they are good for together.

One pass of `survey` over the training rows, one over the evaluation's, then `compare` and `judge`. Nothing here raises
for a bad row: bad rows are findings. How a report looks is in `check_report`, what `--fix` does in `fix`.

    >>> report = check(find_source("rows.jsonl"), None, encoder, Limits(2048))
    >>> report.errors
    []
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraport.clients.rows import Source
from loraport.train.data.compare import compare
from loraport.train.data.findings import KINDS, LEVELS, Finding, Place, count_of
from loraport.train.data.survey import Survey, Surveyor
from loraport.train.data.tokens import Encoder
from loraport.train.data.verdict import Verdict, judge

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
# What one row and what several rows do, of the problems that a row can have by itself.
WORDS = {
    "file": ("holds no rows that are understood", "hold no rows that are understood"),
    "unreadable": ("cannot be read", "cannot be read"),
    "structure": ("is no conversation to train on", "are no conversations to train on"),
    "method": ("is for another method of training", "are for another method of training"),
    "template": ("is refused by the chat template", "are refused by the chat template"),
    "no_stop": ("does not end in a token that stops generation", "do not end in a token that stops generation"),
    "special_tokens": ("contains a special token of this model", "contain special tokens of this model"),
    "nothing_trained": ("has no token that carries loss", "have no token that carries loss"),
    "double_bos": ("begins with its first token twice", "begin with their first token twice"),
    "prompt_differs": ("has another prompt at inference", "have another prompt at inference"),
    "empty_turn": ("has an empty turn", "have an empty turn"),
    "left_out": ("has messages behind its last trained reply", "have messages behind their last trained reply"),
    "untrained_turns": ("has assistant turns that carry no loss", "have assistant turns that carry no loss"),
}


@dataclass(frozen=True)
class Limits:
    """`sequence_length`: longest row in tokens; `capacity`: parameters of the adapter, where they are known."""

    sequence_length: int
    capacity: int | None = None


@dataclass(frozen=True)
class Report:
    """What a check found. `limits` are those it was made with."""

    train: Survey
    evaluation: Survey | None
    findings: list[Finding]
    verdict: Verdict
    limits: Limits

    @property
    def errors(self) -> list[Finding]:
        """The findings that are errors."""
        return [finding for finding in self.findings if finding.level == "error"]

    def document(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "ok": not self.errors,
            "sequence_length": self.limits.sequence_length,
            "train": counts(self.train),
            "eval": counts(self.evaluation) if self.evaluation else None,
            "findings": [finding.document() for finding in self.findings],
            "verdict": self.verdict.document(),
        }


def check(
    source: Source,
    eval_source: Source | None,
    encoder: Encoder,
    limits: Limits,
    format: str = "auto",
    task: str = "auto",
    tell: Callable[[int], None] = lambda rows: None,
    method: str = "auto",
) -> Report:
    """Check all rows of `source`, and of `eval_source` where there is one; `tell` hears how many were, now and then.

    `method`: sft or dpo, for which rows of the other kind are errors; auto is as the first row says.
    Raises UsageError for an unknown format; a row or a file that cannot be read is a finding.
    """
    surveyor = Surveyor(encoder, limits.sequence_length, tell, method)
    train = surveyor.survey(source, format, "train")
    evaluation = surveyor.survey(eval_source, format, "eval") if eval_source else None
    return conclude(train, evaluation, limits, task)


def conclude(train: Survey, evaluation: Survey | None, limits: Limits, task: str = "auto") -> Report:
    """The report on rows that were surveyed."""
    related = compare(train, evaluation)
    copies = sum(len(each.places) for each in related if each.kind in ("duplicate", "near_duplicate"))
    verdict = judge(train, copies, task, limits.capacity)
    found = [*problems(train, evaluation, limits), *related, *verdict.findings]
    order = list(KINDS)
    found.sort(key=lambda each: (LEVELS.index(each.level), order.index(each.kind)))
    return Report(train, evaluation, found, verdict, limits)


def problems(train: Survey, evaluation: Survey | None, limits: Limits) -> list[Finding]:
    """What is wrong with rows by themselves, those of the evaluation behind those of training."""
    both: dict[str, list[Place]] = {}
    for survey in (train, evaluation):
        for kind, places in survey.problems.items() if survey else ():
            both.setdefault(kind, []).extend(places)
    long = [finding_too_long(both.pop("too_long"), train, evaluation, limits)] if "too_long" in both else []
    return long + [
        Finding(
            kind, places, f"{count_of(places, 'file' if kind == 'file' else 'row')} {WORDS[kind][len(places) > 1]}."
        )
        for kind, places in both.items()
    ]


def finding_too_long(places: list[Place], train: Survey, evaluation: Survey | None, limits: Limits) -> Finding:
    """Rows over the limit, and how many tokens cutting them off would lose."""
    lengths = np.concatenate([each.column("all_lengths") for each in (train, evaluation) if each])
    limit = limits.sequence_length
    lost = int(np.maximum(lengths - limit, 0).sum())
    verb = "is" if len(places) == 1 else "are"
    return Finding(
        "too_long",
        places,
        f"{count_of(places, 'row')} {verb} longer than {limit:,} tokens, together by {lost:,}; the longest has "
        f"{lengths.max():,}.",
    )


def counts(survey: Survey) -> dict[str, Any]:
    """Rows, tokens and lengths of a source, for JSON."""
    lengths = survey.column("all_lengths")
    return {
        "source": survey.name,
        "rows": survey.read,
        "usable_rows": survey.usable,
        "tokens": int(survey.column("length").sum()),
        "trained_tokens": int(survey.column("trained").sum()),
        "lengths": summary(lengths),
    }


def summary(lengths: Any) -> dict[str, float]:
    """Minimum, percentiles, maximum and mean of the lengths; empty where there are none."""
    if not len(lengths):
        return {}
    middle = {f"p{share}": int(np.percentile(lengths, share)) for share in PERCENTILES}
    return {"min": int(lengths.min()), **middle, "max": int(lengths.max()), "mean": round(float(lengths.mean()), 1)}

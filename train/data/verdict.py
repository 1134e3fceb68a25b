"""Is there enough data for the task, and varied enough? A verdict with its reasons, from a survey alone.

How many rows a kind of task wants is a rule of thumb of people who fine-tune for a living; the kind is told by the
answers, and can be given instead. The verdict warns and never refuses: what the rows taught, an evaluation shows.

    >>> judge(survey, copies=0, task="auto", capacity=None).message
    '1,000 rows are enough for extraction or a fixed format, which wants 100 to 500.'
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loraport.train.data.findings import Finding, count_of
from loraport.train.data.survey import Survey

# task: (in words, rows from which on training is worth while, rows that are plenty)
TASKS: dict[str, tuple[str, int, int]] = {
    "classification": ("classification", 100, 500),
    "format": ("a fixed format or extraction", 100, 500),
    "qa": ("questions and answers of a domain", 1_000, 5_000),
    "text": ("documents of a domain", 1_000, 5_000),
    "preference": ("preferences between replies", 500, 5_000),
    "code": ("code", 10_000, 50_000),
    "reasoning": ("reasoning", 10_000, 50_000),
}
MOST = 0.3  # share of answers with code or thoughts from which on the task is one of those
FORMAT_SHARE = 0.6  # share of answers that are JSON, or copied from the prompt
CLASSES, CLASS_TOKENS = 50, 16  # as many different answers, half of them as short, are classes
LONGER = 0.8  # share of pairs whose preferred reply is the longer one from which on that is what is learnt
ONE_ANSWER = 0.9  # share of rows with the same answer that leaves nothing else to learn
FEW_PROMPTS = 0.5  # share of different prompts below which rows repeat themselves


@dataclass(frozen=True)
class Verdict:
    """`task` and how it was told; `enough`; one sentence; the figures behind it; findings that go with it."""

    task: str
    told_by: str
    enough: bool
    message: str
    figures: dict[str, int]
    findings: list[Finding] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        _, least, plenty = TASKS[self.task]
        return {
            "task": self.task,
            "told_by": self.told_by,
            "enough": self.enough,
            "message": self.message,
            "rows_wanted": [least, plenty],
            **self.figures,
        }


def judge(train: Survey, copies: int, task: str = "auto", capacity: int | None = None) -> Verdict:
    """The verdict on `train`, of whose usable rows `copies` are exact or near copies of earlier ones.

    `task`: one of TASKS, or auto. `capacity`: parameters of the adapter, where they are known.
    """
    figures = {
        "different_rows": train.usable - copies,
        "different_prompts": different(train.column("prompt")),
        "different_answers": different(train.column("answer")),
        "trained_tokens": int(train.column("trained").sum()),
    }
    task, told_by = (task, "--task") if task != "auto" else detect(train, figures)
    words, least, plenty = TASKS[task]
    rows = figures["different_rows"]
    enough = rows >= least
    if not train.usable:
        message = "no row can be trained on."
    elif rows >= plenty:
        message = f"{rows:,} different rows are plenty for {words}; {least:,} to {plenty:,} are usual."
    elif enough:
        message = f"{rows:,} different rows are enough to start for {words}; {least:,} to {plenty:,} are usual."
    else:
        message = f"{count_of(rows, 'different row')} may be too few for {words}: {least:,} to {plenty:,} are usual."
    findings = [] if enough else [Finding("few_rows", [], message)]
    return Verdict(task, told_by, enough, message, figures, findings + variety(train, task, figures, capacity))


def different(hashes: Any) -> int:
    """Number of different values; 0 stands for none."""
    return int(np.count_nonzero(np.unique(hashes)))


def detect(train: Survey, figures: dict[str, int]) -> tuple[str, str]:
    """The kind of task, and the reason to think so."""
    sample, answers = train.sample, figures["different_answers"]
    if train.pairs:
        return "preference", "each row has a preferred and a non-preferred output"
    if not figures["different_prompts"] and train.usable:
        return "text", "the rows are documents without prompts"
    half = int(np.median(train.column("answer_length"))) if train.usable else 0
    looked = f"of {sample.rows:,} answers looked at"
    if sample.thought >= MOST * max(1, sample.rows):
        return "reasoning", f"{sample.thought:,} {looked} think first"
    if sample.code >= MOST * max(1, sample.rows):
        return "code", f"{sample.code:,} {looked} hold a code block"
    if 0 < answers <= min(CLASSES, max(2, train.usable // 5)) and half <= CLASS_TOKENS:
        return "classification", f"{count_of(answers, 'different answer')} in {count_of(train.usable, 'row')}"
    if sample.json >= FORMAT_SHARE * max(1, sample.rows):
        return "format", f"{sample.json:,} {looked} are JSON or tool calls"
    if sample.copied >= FORMAT_SHARE * max(1, sample.rows):
        return "format", f"{sample.copied:,} {looked} take their words from the prompt"
    return "qa", f"{count_of(answers, 'different answer')}, half of them longer than {half:,} tokens"


def variety(train: Survey, task: str, figures: dict[str, int], capacity: int | None) -> list[Finding]:
    """What speaks against the rows although there may be enough of them."""
    if train.pairs:
        return length_bias(train)
    found = []
    rows = figures["different_rows"]
    answers = train.column("answer")
    if task != "text" and len(answers) > 1:
        values, counts = np.unique(answers, return_counts=True)
        share = counts.max() / len(answers)
        if share >= ONE_ANSWER:
            index = int(np.flatnonzero(answers == values[counts.argmax()])[0])
            message = f"{100 * share:.0f}% of the rows have the same answer, first row {train.place(index).row}."
            found.append(Finding("few_answers", [], message))
        prompts = figures["different_prompts"]
        if prompts < FEW_PROMPTS * rows:
            found.append(
                Finding("few_prompts", [], f"{rows:,} rows have only {count_of(prompts, 'different prompt')}.")
            )
    if capacity is not None and capacity < figures["trained_tokens"]:
        message = f"the adapter has {capacity:,} parameters for {figures['trained_tokens']:,} trained tokens."
        found.append(Finding("capacity", [], message))
    return found


def length_bias(train: Survey) -> list[Finding]:
    """Whether the preferred reply of nearly all pairs is the longer one, or the shorter one."""
    own, other = train.column("answer_length"), train.column("other_length")
    found = []
    for words, count in (("longer", np.count_nonzero(own > other)), ("shorter", np.count_nonzero(own < other))):
        if train.usable and count >= LONGER * train.usable:
            message = f"the preferred output is the {words} one in {100 * count / train.usable:.0f}% of the rows."
            found.append(Finding("longer", [], message))
    return found

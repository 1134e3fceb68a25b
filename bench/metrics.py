"""Answers into figures: success and stop rate with their intervals, tokens, speed, errors by kind.

>>> wilson(93, 100)
(0.863, 0.966)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

Z95 = 1.959964  # standard normal quantile of a two-sided 95% interval


@dataclass(frozen=True)
class Answer:
    """What a model replied to one row. `error` is the kind of failure where there was no reply, else empty."""

    model: str
    line: int
    prompt: str  # the last message before the reply
    reference: str
    reply: str = ""
    finish_reason: str = ""
    completion_tokens: int | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def is_success(self) -> bool:
        """The reply is the reference, blanks at both ends aside, and the model ended it itself."""
        return not self.error and self.stopped and self.reply.strip() == self.reference.strip()

    @property
    def stopped(self) -> bool:
        """The model ended the reply itself; it was not cut at a limit."""
        return self.finish_reason == "stop"


@dataclass(frozen=True)
class Rate:
    """`count` of `total`, with the 95% interval of the share."""

    count: int
    total: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class ModelFigures:
    """The figures of one model. Speed is per request: tokens over the summed seconds of the answered requests."""

    model: str
    rows: int
    success: Rate
    stopped: Rate
    mean_completion_tokens: float | None
    tokens_per_second: float | None
    errors: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share, in [0, 1], after Wilson (1927): honest near 0 and 1, where n ± z·s is not."""
    if total == 0:
        return 0.0, 1.0
    share = count / total
    scale = 1 + Z95**2 / total
    middle = (share + Z95**2 / (2 * total)) / scale
    half = Z95 * sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2)) / scale
    return round(max(0.0, middle - half), 3), round(min(1.0, middle + half), 3)


def make_rate(count: int, total: int) -> Rate:
    """`count` of `total` as a rate; 0 of 0 is a rate of 0."""
    return Rate(count, total, count / total if total else 0.0, *wilson(count, total))


def summarize(model: str, answers: Sequence[Answer]) -> ModelFigures:
    """The figures of `model` over its answers. A request that failed counts as a row without success."""
    own = [answer for answer in answers if answer.model == model]
    counted = [(a.completion_tokens, a.seconds) for a in own if a.completion_tokens is not None and not a.error]
    tokens = sum(count for count, _ in counted)
    seconds = sum(spent for _, spent in counted)
    return ModelFigures(
        model=model,
        rows=len(own),
        success=make_rate(sum(a.is_success for a in own), len(own)),
        stopped=make_rate(sum(a.stopped for a in own), len(own)),
        mean_completion_tokens=round(tokens / len(counted), 2) if counted else None,
        tokens_per_second=round(tokens / seconds, 2) if seconds > 0 else None,
        errors=dict(Counter(a.error for a in own if a.error).most_common()),
    )

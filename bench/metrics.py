"""Answers into figures: success and stop rate with their intervals, tokens, speed, errors by kind.

>>> summarize("demo", answers).success.rate
0.95
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loraport.clients.rates import Rate, make_rate


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

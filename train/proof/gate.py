"""Requirements on the result: parsed before training, judged at its end, exit code 4 when one is not met.

An adapter that falls short is stored all the same, because somebody wants to see why; its manifest says so in
`requirements_failed`.

    >>> find_unmet(parse_requirements(("success>=0.9", "stop_rate=1")), {"success": 0.85, "stop_rate": 1.0})
    [Unmet(requirement=Requirement(metric='success', relation='>=', value=0.9), found=0.85)]
"""

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite

from loraport.clients.errors import ConfigError, Shortfall

METRICS = {
    "success": "the check's verdict, else exact match, of replies that stop",
    "exact_match": "replies equal to their reference, white space aside",
    "rouge_l": "ROUGE-L, 0 to 1",
    "bleu": "BLEU, 0 to 100",
    "stop_rate": "replies that stop by themselves",
    "repetition": "replies that fall into a loop",
    "reply_tokens": "mean length of replies",
    "gain": "success minus the base's success",
    "eval_loss": "loss on held-out rows, nats a token",
    "eval_perplexity": "its exponential",
    "eval_token_accuracy": "tokens of held-out replies guessed right",
    "eval_reward_accuracy": "dpo: held-out pairs in which the preferred output gained more on the base",
    "eval_reward_margin": "dpo: by how much, times beta, in nats",
    "train_loss": "mean loss of the training",
    "tokens_per_second": "speed of the training",
}
METHODS = {"eval_perplexity": "sft", "eval_reward_accuracy": "dpo", "eval_reward_margin": "dpo"}  # others: of both
RELATIONS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
FORM = re.compile(r"\s*(\w+)\s*(>=|<=|==|=|>|<)\s*([^\s%]+)\s*(%?)\s*")
ROUNDING = 1e-9  # a mean of 20 shares may miss 0.9 by that


@dataclass(frozen=True)
class Requirement:
    """One condition on a metric."""

    metric: str
    relation: str
    value: float

    def __str__(self) -> str:
        return f"{self.metric}{self.relation}{self.value:g}"

    def is_met(self, found: float) -> bool:
        """Whether `found` satisfies it, up to rounding."""
        if abs(found - self.value) <= ROUNDING:
            return self.relation in (">=", "<=", "=", "==")
        return bool(RELATIONS[self.relation](found, self.value))


@dataclass(frozen=True)
class Unmet:
    """A requirement that is not met, and what was found; None: it was not measured."""

    requirement: Requirement
    found: float | None

    def __str__(self) -> str:
        wanted = self.requirement
        if self.found is None or not isfinite(self.found):
            return f"{wanted.metric} was not measured ({wanted})"
        return f"{wanted.metric} is {self.found:.4g}, {wanted} is required ({abs(self.found - wanted.value):.3g} off)"


def parse_requirements(texts: Sequence[str], method: str = "sft") -> list[Requirement]:
    """Requirements as `success>=0.9` or `stop_rate=100%`; ConfigError that names what there is otherwise, and for what
    the method of training does not measure.
    """
    found = [parse_requirement(text) for text in texts]
    for each in found:
        if METHODS.get(each.metric, method) != method:
            known = [name for name in METRICS if METHODS.get(name, method) == method]
            problem = f"--require {each}: --method {method} does not measure {each.metric}."
            raise ConfigError(problem, f"there are {', '.join(known)}")
    return found


def parse_requirement(text: str) -> Requirement:
    """One requirement."""
    if text.strip() in METRICS:
        raise ConfigError(
            f"--require {text} says nothing about how much.",
            f"quote it, because a shell takes > for a file: --require '{text.strip()}>=0.9'",
        )
    form = FORM.fullmatch(text)
    try:
        value = float(form[3]) / (100 if form[4] else 1) if form else float("nan")
    except ValueError:
        value = float("nan")
    if form is None or not isfinite(value):
        raise ConfigError(
            f"--require {text} is no requirement.", f"write it as success>=0.9; there are {', '.join(METRICS)}"
        )
    if form[1] not in METRICS:
        near = get_close_matches(form[1], METRICS, 1)
        known = f"there are {', '.join(METRICS)}"
        raise ConfigError(
            f"--require {text}: {form[1]} is not measured.", f"did you mean {near[0]}? {known}" if near else known
        )
    return Requirement(form[1], form[2], value)


def find_unmet(requirements: Sequence[Requirement], metrics: Mapping[str, float]) -> list[Unmet]:
    """Those that `metrics` do not meet; one whose metric is missing is not met."""
    found = ((each, metrics.get(each.metric)) for each in requirements)
    return [Unmet(each, value) for each, value in found if value is None or not each.is_met(value)]


def check_requirements(
    requirements: Sequence[Requirement], metrics: Mapping[str, float], adapter: str, where: str
) -> None:
    """Shortfall (exit code 4) when `adapter`, stored in the folder `where`, does not meet them."""
    unmet = find_unmet(requirements, metrics)
    if unmet:
        raise Shortfall(
            f"{adapter} falls short: {'; '.join(map(str, unmet))}.",
            f"it is stored, so that you can look: {where}",
        )

"""Which model a request goes to, where some are asked more than others: equal, by Zipf's law, or by weights of a file.

By Zipf's law the model of rank r is asked in proportion to r^-alpha: the true law, in which the tail stays, not a
geometric series, in which it vanishes. Requests draw their model from their number, so that it does not matter which
process sends them.

    >>> popularity = zipf(["a", "b", "c"], alpha=1)
    >>> popularity.shares
    [0.545..., 0.272..., 0.181...]
"""

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from loraport.clients.errors import UsageError


@dataclass(frozen=True)
class Popularity:
    """Models by rank, the most popular first, with their shares of the requests, which sum to 1."""

    words: str
    models: list[str]
    shares: list[float]


def uniform(models: Sequence[str]) -> Popularity:
    """All are asked as often."""
    return Popularity("uniform", list(models), [1 / len(models)] * len(models))


def zipf(models: Sequence[str], alpha: float) -> Popularity:
    """Rank r, from 1, weighs r^-alpha; UsageError where `alpha` is no such number."""
    if not 0 <= alpha <= 20:
        raise UsageError(f"--zipf {alpha:g} is no exponent.", "from 0 (uniform) to 20; 1 is Zipf's law as it is known")
    return normalised(f"Zipf {alpha:g}", list(models), [rank**-alpha for rank in range(1, len(models) + 1)])


def from_file(path: Path) -> Popularity:
    """Weights of a file of `name,weight` lines, largest first; blank lines and those after # are left out.

    Raises UsageError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.", "--popularity is a file of lines `name,weight`") from error
    weights: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, _, value = (part.strip() for part in text.rpartition(","))
        weight = read_weight(value)
        if not name or weight is None:
            raise UsageError(f"{path}:{number}: {text!r} is no name with its weight.", "for example: support,12.5")
        if name in weights:
            raise UsageError(f"{path}:{number}: {name} stands there twice.", "one line for each adapter")
        weights[name] = weight
    if not weights:
        raise UsageError(f"{path} names no adapter.", "a line for each: name,weight")
    ranked = sorted(weights, key=lambda name: -weights[name])
    return normalised(f"weights of {path.name}", ranked, [weights[name] for name in ranked])


def read_weight(text: str) -> float | None:
    """A positive number, or None."""
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if 0 < weight < math.inf else None


def normalised(words: str, models: list[str], weights: list[float]) -> Popularity:
    """Weights as shares."""
    total = math.fsum(weights)
    return Popularity(words, models, [weight / total for weight in weights])


def running_sums(weights: Sequence[float]) -> list[float]:
    """What `pick` chooses by."""
    return list(accumulate(weights))


def pick(sums: Sequence[float], seed: str) -> int:
    """An index drawn in proportion to the weights behind these sums, the same for the same seed."""
    at = random.Random(f"popularity/{seed}").random() * sums[-1]
    return min(bisect_right(sums, at), len(sums) - 1)

"""Shares with their intervals: what training says of its replies, and `loraport eval` of a server's.

>>> wilson(93, 100)
(0.863, 0.966)
"""

from dataclasses import dataclass
from math import sqrt

Z95 = 1.959964  # standard normal quantile of a two-sided 95% interval


@dataclass(frozen=True)
class Rate:
    """`count` of `total`, with the 95% interval of the share."""

    count: int
    total: int
    rate: float
    low: float
    high: float


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

"""When requests of an open loop are due: seconds from the start of a stage, the same for the same seed.

Every process draws the whole schedule and takes its share of it, so that the load is the same however many there are.
Arrivals of a recorded trace are read, not drawn: see `trace`.

    >>> list(islice(arrivals("constant", rate=4, burstiness=1, seed=0), 3))
    [0.0, 0.25, 0.5]
"""

import math
import random
from collections.abc import Iterable, Iterator
from typing import Literal

Arrival = Literal["poisson", "constant", "gamma", "trace"]
ARRIVALS: tuple[Arrival, ...] = ("poisson", "constant", "gamma")  # those that are drawn


def arrivals(kind: Arrival, rate: float, burstiness: float, seed: str | int) -> Iterator[float]:
    """Due times without end. `rate`: requests per second on average.

    `burstiness`, for gamma: the shape of the distribution of the intervals, as vLLM's bench has it. 1 is Poisson,
    less is more bursty: the variance of an interval is 1 / (burstiness · rate²).
    """
    draw = random.Random(f"arrivals/{seed}")
    count, at = 0, 0.0
    while True:
        if kind == "constant":
            at = count / rate
        elif count and kind == "poisson":
            at += draw.expovariate(rate)
        elif count:
            at += draw.gammavariate(burstiness, 1 / (rate * burstiness))
        yield at
        count += 1


def ramped(times: Iterable[float], first: float, last: float, seconds: float) -> Iterator[float]:
    """Arrivals at one request per second on average, moved to a rate that goes evenly from `first` to `last`.

    The number that is due by t is first·t + (last − first)·t² / (2·seconds); this is its inverse. Ends with the ramp.
    """
    bend = (last - first) / (2 * seconds)
    whole = (first + last) / 2 * seconds
    for time in times:
        if time >= whole:
            return
        yield 2 * time / (first + math.sqrt(first * first + 4 * bend * time))

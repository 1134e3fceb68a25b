"""`loraport bench throughput --sweep`: raises the load until more of it brings no more, and tells the knee.

The load is doubled until it is too much; then the gaps on both sides of the knee are halved (on a log scale). The knee
is the last load, from below, up to which each one's requests were answered, met the limits, and brought more tokens per
second than the one before: by `gain` for twice the load, by correspondingly less for less. What a load is measured with
is a function, so nothing here knows of servers or clocks.

    >>> search = Search(Sweep("concurrency", first=1, seconds=10, budget_s=300), measure)
    >>> search.run(); search.to_json()["knee"]["label"]
    '24 at once'
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from loraport.bench.load.arrivals import Arrival
from loraport.bench.load.parts import MET
from loraport.bench.load.stage import Load
from loraport.bench.load.verdict import ERRORS

CLOSE, NEAR = 1.2, 1.5  # steps so close above the knee, and below it, are not told apart further
LEAST_RATE = 0.01
Measure = Callable[[Load], dict[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """What is raised, from where, and when to stop. `gain`: how much twice the load must bring, as a share."""

    kind: Literal["concurrency", "rate"]
    first: float
    seconds: float
    budget_s: float
    gain: float = 0.1
    arrival: Arrival = "poisson"
    burstiness: float = 1.0
    talks: bool = False

    def load(self, level: float) -> Load:
        """The load of a level: requests at once, or per second."""
        if self.kind == "concurrency":
            return Load("closed", int(level), talks=self.talks)
        return Load("open", 0, level, self.arrival, self.burstiness)

    def between(self, low: float, high: float, close: float) -> float | None:
        """A level in the middle; None where the two are as close as that."""
        if high / low <= close:
            return None
        middle = math.sqrt(low * high)
        if self.kind == "rate":
            return float(f"{middle:.3g}")
        return round(middle) if low < round(middle) < high else None

    def lower(self, level: float) -> float | None:
        """Half of a level; None where there is nothing below it."""
        if self.kind == "concurrency":
            return level // 2 or None
        return level / 2 if level / 2 >= LEAST_RATE else None


@dataclass(frozen=True)
class Step:
    """A load that was measured. `reason`: why it is too much; `withheld`: it says nothing about the server."""

    level: float
    result: dict[str, Any]
    reason: str = ""
    withheld: bool = False


@dataclass(frozen=True)
class Sides:
    """The knee and its neighbours among what was measured; None where there is none."""

    knee: Step | None = None
    left: Step | None = None
    right: Step | None = None


class Search:
    """A sweep as it goes on; what it found is told at any time."""

    def __init__(self, sweep: Sweep, measure: Measure, now: Callable[[], float] = time.monotonic) -> None:
        self.sweep, self.measure, self.now = sweep, measure, now
        self.steps: list[Step] = []
        self.stopped = "interrupted"
        self.seconds = 0.0

    def run(self) -> None:
        """Measure until the knee is known, or the time is over."""
        begun, longest = self.now(), 0.0
        level: float | None = self.sweep.first
        while level is not None:
            if self.steps and self.now() - begun + longest > self.sweep.budget_s:
                self.stopped = "budget"
                return
            at = self.now()
            step = judge(level, self.measure(self.sweep.load(level)))
            longest, self.seconds = max(longest, self.now() - at), self.now() - begun
            again = step.withheld and not (self.steps and self.steps[-1].level == level)
            self.steps.append(step)
            if again:  # once: another program may have had the processor
                continue
            if step.withheld:
                self.stopped = "withheld"
                return
            level = self.next_level()
        self.stopped = "found" if self.sides().knee else "nothing was fine"

    def next_level(self) -> float | None:
        """What to try next; None at the end."""
        sides, sweep = self.sides(), self.sweep
        if sides.knee is None:
            return sweep.lower(min(step.level for step in self.steps))
        if sides.right is None:
            return 2 * sides.knee.level
        below = sweep.between(sides.left.level, sides.knee.level, NEAR) if sides.left else None
        return below or sweep.between(sides.knee.level, sides.right.level, CLOSE)

    def sides(self) -> Sides:
        """The knee, walking up from the lowest load."""
        found = Sides()
        for step in sorted((each for each in self.steps if not each.withheld), key=lambda each: each.level):
            reason = step.reason or (self.too_little(found.knee, step) if found.knee else "")
            if reason:
                return replace(found, right=replace(step, reason=reason))
            found = Sides(step, left=found.knee)
        return found

    def too_little(self, knee: Step, step: Step) -> str:
        """Why a load brings too little over another; empty where it does not."""
        times, rise = step.level / knee.level, speed(step.result) / speed(knee.result)
        if rise < (1 + self.sweep.gain) ** math.log2(times):
            return f"{rise - 1:+.0%} tokens/s for {times:.3g} times the load"
        return ""

    def to_json(self) -> dict[str, Any]:
        """What was found: the knee, and the loads on its two sides."""
        sides = self.sides()
        return {
            "kind": self.sweep.kind,
            "stopped": self.stopped,
            "knee": describe(sides.knee),
            "left": describe(sides.left),
            "right": describe(sides.right),
            "gain": self.sweep.gain,
            "met_share": MET,
            "budget_s": self.sweep.budget_s,
            "seconds": round(self.seconds, 1),
            "steps": [describe(step) for step in self.steps],
        }


def judge(level: float, result: dict[str, Any]) -> Step:
    """Whether a load was fine by itself."""
    figures = result["figures"]
    if reason := unanswered(figures):
        return Step(level, result, reason)
    if not result["believed"]:
        return Step(level, result, "; ".join(result["reasons"]), withheld=True)
    good = figures["goodput"]
    if good and good["share"] < MET:
        return Step(level, result, f"{good['share']:.1%} of the requests met all limits (bound {MET:.0%})")
    return Step(level, result)


def unanswered(figures: dict[str, Any]) -> str:
    """What became of requests where too many were not answered; empty where they were."""
    asked = max(figures["requests"], 1)
    late = figures["errors"].get("stopped", 0)
    failed = sum(figures["errors"].values()) - late
    if failed > ERRORS * asked:
        return f"{failed} of {asked} requests failed"
    if late > ERRORS * asked:
        return f"{late} of {asked} requests were not answered when as much time again had passed"
    return ""


def speed(result: dict[str, Any]) -> float:
    """Output tokens/s, of the steady window where there is one."""
    figures = result["figures"]
    return float((figures["steady"] or figures)["output_tokens_per_second"] or 1e-9)


def describe(step: Step | None) -> dict[str, Any] | None:
    """A step in few figures."""
    if step is None:
        return None
    figures = step.result["figures"]
    return {
        "label": step.result["label"],
        "level": step.level,
        "reason": step.reason,
        "withheld": step.withheld,
        "output_tokens_per_second": None if step.withheld else round(speed(step.result), 1),
        "requests_per_second": None if step.withheld else figures["requests_per_second"],
        "goodput": figures["goodput"],
        **{f"{name}_ms": None if step.withheld else figures[f"{name}_ms"] for name in ("ttft", "tpot")},
    }

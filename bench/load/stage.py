"""A stage: one load on one or several models, for some requests or some time. What a process is told, and its answer.

>>> Stage(0, "8 at once", [Target("http://127.0.0.1:8000/v1", "base")], Load("closed", concurrency=8), requests=64)
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from loraport.bench.load.arrivals import Arrival, arrivals, ramped
from loraport.bench.load.popularity import pick, running_sums
from loraport.bench.load.prompts import Source
from loraport.bench.load.trace import Due, read_due


@dataclass(frozen=True)
class Target:
    """A model at a base URL."""

    url: str
    model: str


@dataclass(frozen=True)
class Load:
    """Closed: `concurrency` requests at all times. Open: `rate` requests per second, however slow the answers.

    `talks`: of a closed loop, whether it is as many conversations, each with one request after the other.
    `rate_to`: where the rate ends that goes evenly there from `rate` over `ramp_s` seconds. `trace`: a file that
    `Trace.write` made, whose times are those of the requests.
    """

    kind: Literal["closed", "open"]
    concurrency: int = 0
    rate: float = 0.0
    arrival: Arrival = "poisson"
    burstiness: float = 1.0
    rate_to: float = 0.0
    ramp_s: float = 0.0
    trace: str = ""
    talks: bool = False

    @property
    def words(self) -> str:
        """For tables: `8 at once`, `4/s poisson`, `2 to 20/s poisson`."""
        if self.kind == "closed":
            return f"{self.concurrency} {'talks ' if self.talks else ''}at once"
        burst = f" {self.burstiness:g}" if self.arrival == "gamma" else ""
        rate = f"{self.rate:g} to {self.rate_to:g}" if self.ramp_s else f"{self.rate:.4g}"
        return f"{rate}/s {self.arrival}{burst}"

    def rate_at(self, seconds: float) -> float:
        """Requests per second that are due at this time."""
        return self.rate + (self.rate_to - self.rate) * seconds / self.ramp_s if self.ramp_s else self.rate

    def schedule(self, seed: str) -> Iterator[Due]:
        """When requests of an open loop are due, and their lengths where a trace has them."""
        if self.trace:
            yield from read_due(Path(self.trace))
        elif self.ramp_s:
            even = arrivals(self.arrival, 1.0, self.burstiness, seed)
            yield from ((due, None) for due in ramped(even, self.rate, self.rate_to, self.ramp_s))
        else:
            yield from ((due, None) for due in arrivals(self.arrival, self.rate, self.burstiness, seed))


@dataclass(frozen=True)
class Stage:
    """Requests go to the targets in turn. It ends after `requests` or `seconds`, and when those under way are answered.

    `first`: number of the first prompt; prompts of different numbers are different. `weights`: of the targets, which
    are then drawn in proportion to them instead. `drain_s`: how long those under way are waited for; None: to their
    end.
    """

    id: int
    label: str
    targets: list[Target]
    load: Load
    requests: int | None = None
    seconds: float | None = None
    first: int = 0
    weights: list[float] | None = None
    drain_s: float | None = None

    @cached_property
    def sums(self) -> list[float]:
        """Of the weights."""
        return running_sums(self.weights or ())

    def target(self, number: int, seed: int) -> Target:
        """The target of a request of this stage; the same for the same seed."""
        at = number % len(self.targets) if self.weights is None else pick(self.sums, f"{seed}/{self.first + number}")
        return self.targets[at]

    def to_json(self) -> dict[str, Any]:
        """For the processes."""
        return asdict(self)

    @classmethod
    def parse(cls, document: dict[str, Any]) -> "Stage":
        """From what `to_json` made."""
        targets = [Target(**target) for target in document["targets"]]
        return cls(**(document | {"targets": targets, "load": Load(**document["load"])}))


@dataclass(frozen=True)
class Orders:
    """What a process is told at its start. `share`: (which, of how many) processes it is."""

    source: Source
    share: tuple[int, int]
    records: str
    timeout_s: float

    @classmethod
    def parse(cls, document: dict[str, Any]) -> "Orders":
        """From the JSON of `asdict`."""
        source = Source(**document["source"])
        return cls(source, tuple(document["share"]), document["records"], document["timeout_s"])


@dataclass
class Effort:
    """How a process fared in a stage: what the client itself cost, and where it was late.

    `lag_s`: how late a timer of the event loop fired, for each of its turns, as buckets like those of gaps.
    """

    stage: int
    started: float
    ended: float
    cpu_s: float
    requests: int
    lags: dict[int, int] = field(default_factory=dict)
    gave_up: bool = False
    stopped: bool = False
    answered: int = 0

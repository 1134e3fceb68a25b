"""A stage: one load on one or several models, for some requests or some time. What a process is told, and its answer.

>>> Stage(0, "8 at once", [Target("http://127.0.0.1:8000/v1", "base")], Load("closed", concurrency=8), requests=64)
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loraport.bench.load.arrivals import Arrival
from loraport.bench.load.prompts import Source


@dataclass(frozen=True)
class Target:
    """A model at a base URL."""

    url: str
    model: str


@dataclass(frozen=True)
class Load:
    """Closed: `concurrency` requests at all times. Open: `rate` requests per second, however slow the answers."""

    kind: Literal["closed", "open"]
    concurrency: int = 0
    rate: float = 0.0
    arrival: Arrival = "poisson"
    burstiness: float = 1.0

    @property
    def words(self) -> str:
        """For tables: `8 at once`, `4/s poisson`."""
        if self.kind == "closed":
            return f"{self.concurrency} at once"
        burst = f" {self.burstiness:g}" if self.arrival == "gamma" else ""
        return f"{self.rate:g}/s {self.arrival}{burst}"


@dataclass(frozen=True)
class Stage:
    """Requests go to the targets in turn. It ends after `requests` or `seconds`, and when those under way are answered.

    `first`: number of the first prompt; prompts of different numbers are different.
    """

    id: int
    label: str
    targets: list[Target]
    load: Load
    requests: int | None = None
    seconds: float | None = None
    first: int = 0

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

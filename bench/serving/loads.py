"""Loads one after the other, as `loraport bench throughput` runs them: a list, a ramp, a trace, or a sweep to the knee.

Those that an earlier run has measured are left out, and after each the document so far can be written.

>>> series = Series(measurement, Chosen([Load("closed", 1), Load("closed", 8)], Amount(seconds=20)))
>>> series.prepare(); series.run()
>>> [stage["label"] for stage in series.results()]
['1 at once', '8 at once']
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

from loraport.bench.load.arrivals import Arrival
from loraport.bench.load.server import Server
from loraport.bench.load.stage import Load
from loraport.bench.load.trace import Trace, read_trace
from loraport.bench.load.workload import Wish
from loraport.bench.serving.earlier import Earlier
from loraport.bench.serving.measurement import Measurement
from loraport.bench.serving.sweep import Search, Sweep
from loraport.clients.errors import EndpointError, UsageError

STEPS = 12  # that a sweep's budget should have room for
TRACE_FILE = "arrivals.txt"  # beside the records


@dataclass(frozen=True)
class Amount:
    """How much of each load: `requests` or `seconds`. Of conversations, `requests` counts those."""

    requests: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Chosen:
    """What to run: loads, or in their place a sweep. `trace`: of the load whose arrivals are recorded."""

    loads: list[Load]
    amount: Amount
    sweep: Sweep | None = None
    trace: Trace | None = None


class Series:
    """The loads on all targets of a measurement. `save`: called after each."""

    def __init__(
        self,
        measurement: Measurement,
        chosen: Chosen,
        earlier: Earlier | None = None,
        save: Callable[["Series"], None] = lambda series: None,
    ) -> None:
        self.measurement, self.loads, self.amount = measurement, chosen.loads, chosen.amount
        self.trace, self.earlier, self.save = chosen.trace, earlier or Earlier(), save
        self.kept: list[dict[str, Any]] = []
        self.search = Search(chosen.sweep, self.measure_step) if chosen.sweep else None

    def prepare(self) -> None:
        """Make the measurement ready for these loads."""
        measurement = self.measurement
        measurement.start_at(self.earlier.first_stage)
        if self.trace:
            self.trace = self.trace.fit(least_context(measurement))
            self.trace.write(measurement.folder / TRACE_FILE)
            wish = as_long_as(self.trace, measurement.setting.wish)
            measurement.setting = replace(measurement.setting, wish=wish)
        measurement.prepare(max([load.concurrency or 64 for load in self.loads] or [64]))
        self.earlier.check_servers(measurement.servers)
        if self.trace and self.trace.shortened and measurement.workload:
            measurement.workload.notes.append(
                f"{self.trace.shortened:,} requests of the trace are longer than the context: they are shortened"
            )

    def run(self) -> None:
        """All loads. One that nothing answers ends the list."""
        if self.search:
            return self.search.run()
        for load in self.loads:
            self.measure(load)
        return None

    def measure(self, load: Load, drain_s: float | None = None) -> dict[str, Any]:
        """The result of a load: of the earlier run, or measured. EndpointError where the server stopped answering."""
        if known := self.earlier.result(load.words):
            self.kept.append(known)
            return known
        self.measurement.on_step(load.words)
        if load.arrival == "trace":
            load = replace(load, trace=str(self.measurement.folder / TRACE_FILE))
        requests, seconds = self.amount.requests, self.amount.seconds
        if load.trace or load.ramp_s:
            requests, seconds = None, load.ramp_s or None
        targets = self.measurement.targets
        ran = self.measurement.run(load.words, targets, load, requests, seconds, drain_s=drain_s)
        result = self.measurement.result(ran)
        self.save(self)
        gave_up = any(effort.gave_up for effort in ran.efforts)
        if gave_up and (drain_s is None or not result["figures"]["answered"]):
            raise EndpointError(
                f"{self.measurement.first_url} stopped answering under {load.words}.",
                "its log says more; figures so far stand above",
            )
        return result

    def measure_step(self, load: Load) -> dict[str, Any]:
        """A load of a sweep, which may be more than the server can take: what is late is cut off."""
        assert self.search
        return self.measure(load, drain_s=self.search.sweep.seconds)

    def results(self) -> list[dict[str, Any]]:
        """All results in the order of the loads, of a sweep by their level."""
        labels = [load.words for load in self.loads]

        def place(stage: dict[str, Any]) -> float:
            load = stage["load"]
            return float(load["concurrency"] or load["rate"] if self.search else labels.index(stage["label"]))

        return sorted([*self.kept, *self.measurement.results()], key=place)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        if self.search and self.search.stopped == "interrupted":
            return False
        found = self.results()
        return all(stage["complete"] for stage in found) and (bool(self.search) or len(found) == len(self.loads))


def least_context(measurement: Measurement) -> int | None:
    """Tokens that all servers have room for; None where they do not tell."""
    found = []
    for url in dict.fromkeys(target.url for target in measurement.targets):
        with Server(url, measurement.setting.timeout_s) as server:
            found += [card.max_model_len for card in server.cards() if card.max_model_len]
    return min(found, default=None)


def as_long_as(trace: Trace, wish: Wish) -> Wish:
    """A wish for prompts and replies as long as the median ones of a trace, where it says how long."""
    if not trace.inputs:
        return wish
    prompt, reply = int(median(trace.inputs)), int(median(trace.outputs))
    return replace(wish, input=(prompt, prompt), output=(reply, reply))


@dataclass(frozen=True)
class Ways:
    """The options of the command that say what to run."""

    concurrency: str = ""
    rate: str = ""
    ramp: str = ""
    trace: Path | None = None
    time_scale: float = 1.0
    sweep: bool = False
    gain: float = 0.1
    budget_s: float = 300.0
    arrival: str = "poisson"
    burstiness: float = 1.0
    replay: bool = False

    def check(self) -> None:
        """UsageError for options that do not go together."""
        given = [name for name in ("concurrency", "rate", "ramp", "trace", "sweep", "replay") if getattr(self, name)]
        if self.trace and len(given) > 1:
            other = next(name for name in given if name != "trace")
            raise UsageError(f"--trace and --{other} do not go together.", "a trace is a load of its own")
        if self.time_scale != 1 and not self.trace:
            raise UsageError("--time-scale is that of a trace.", "--trace names it")
        if self.replay and (self.rate or self.ramp):
            raise UsageError(
                f"--replay and --{'rate' if self.rate else 'ramp'} do not go together.",
                "turns of a conversation wait for each other: --concurrency says how many conversations at once",
            )
        if self.sweep and (self.ramp or (self.rate and self.concurrency)):
            other = "--ramp" if self.ramp else "--rate and --concurrency"
            raise UsageError(f"--sweep and {other} do not go together.", "it begins at --rate, or at --concurrency")


def choose(ways: Ways, requests: int | None, seconds: float | None) -> Chosen:
    """What the options say; UsageError where they make no sense, DataError where the trace is none."""
    ways.check()
    amount = Amount(requests, seconds or (None if requests else 30.0))
    if ways.trace:
        trace = read_trace(ways.trace).scaled(ways.time_scale).cut(requests, seconds)
        return Chosen([Load("open", rate=round(trace.rate, 4), arrival="trace")], amount, trace=trace)
    arrival = cast(Arrival, ways.arrival)
    if not ways.sweep:
        loads = make_loads(ways.concurrency, ways.rate, arrival, ways.burstiness, ways.ramp, ways.replay)
        return Chosen(loads, amount)
    kind: Literal["rate", "concurrency"] = "rate" if ways.rate else "concurrency"
    starts = numbers(ways.rate or ways.concurrency, f"--{kind}") or [1.0]
    if len(starts) > 1 or requests:
        wrong = "--requests" if requests else f"a list for --{kind}"
        raise UsageError(f"--sweep and {wrong} do not go together.", "it has a start, and --seconds for each load")
    each = seconds or min(30.0, max(2.0, ways.budget_s / STEPS))
    sweep = Sweep(kind, starts[0], each, ways.budget_s, ways.gain, arrival, ways.burstiness, ways.replay)
    return Chosen([], Amount(seconds=each), sweep)


def make_loads(
    concurrency: str, rate: str, arrival: Arrival, burstiness: float, ramp: str = "", talks: bool = False
) -> list[Load]:
    """Loads of `1,8,64` requests at once, of `2,4` requests per second, and of a ramp; UsageError for no number."""
    found = [Load("closed", int(number), talks=talks) for number in numbers(concurrency, "--concurrency")]
    found += [Load("open", 0, number, arrival, burstiness) for number in numbers(rate, "--rate")]
    if ramp:
        first, last, seconds = parse_ramp(ramp)
        found.append(Load("open", 0, first, arrival, burstiness, rate_to=last, ramp_s=seconds))
    return list(dict.fromkeys(found)) or [Load("closed", 8, talks=talks)]


def numbers(text: str, flag: str) -> list[float]:
    """Positive numbers between commas."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0.0]
    if any(not 0 < one < 1e6 or (flag == "--concurrency" and one % 1) for one in found):
        raise UsageError(f"{flag} {text!r} is no list of numbers.", f"for example {flag} 1,8,64")
    return found


def parse_ramp(text: str) -> tuple[float, float, float]:
    """(from, to, seconds) of `1:20:60`."""
    try:
        first, last, seconds = (float(part) for part in text.split(":"))
    except ValueError:
        first = last = seconds = 0.0
    if not (0 < first < 1e6 and 0 < last < 1e6 and 1 <= seconds < 1e6):
        raise UsageError(f"--ramp {text!r} is no ramp.", "for example --ramp 1:20:60, from 1 to 20 a second in 60 s")
    return first, last, seconds

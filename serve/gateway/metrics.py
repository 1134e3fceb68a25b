"""Figures for Prometheus: the gateway's own, in a registry of its own, in front of the engines' pages.

Labels come from bounded sets: routes of the allow-list, models and keys that exist. The page of a single engine is
passed on as it is; those of replicas become one, each figure with a label that says whose it is.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from loraport.serve.gateway.calls import Call
from loraport.serve.gateway.state import EngineState, Phase

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
TUNED = "fine-tuned"  # all of them: there are any number, and each is known to its owner alone
KEYS = re.compile(rb'(?!#)[^{]*\{(?:[^"]*"(?:[^"\\]|\\.)*",)*\s*(?:key|tenant)="')
ADAPTERS = re.compile(rb"ftjob-[\w.-]*(?:@\w+)?")
FIRST_BYTE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def is_in(engine: EngineState, phase: Phase) -> float:
    """1 while the endpoint is in that phase, else 0."""
    return float(engine.snapshot.phase is phase)


def is_ready(engine: EngineState, replica: int) -> float:
    """1 while that replica takes requests, else 0."""
    return float(replica in engine.snapshot.ready)


class Merged(Collector):
    """Pages of several engines as one: each family once, each sample labelled with its replica."""

    def __init__(self, pages: Mapping[int, bytes]) -> None:
        self.pages = pages

    def collect(self) -> Iterable[Metric]:
        """The families, as prometheus_client prints them."""
        families: dict[str, Metric] = {}
        for number, page in self.pages.items():
            label = {"replica": str(number)}
            with suppress(ValueError):  # the rest of a page that nobody can read
                for family in text_string_to_metric_families(page.decode("utf-8", "replace")):
                    known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    known.samples += [each._replace(labels=each.labels | label) for each in family.samples]
        return families.values()


class Metrics:
    """The gateway's counters."""

    def __init__(self, engine: EngineState) -> None:
        self.registry = made = CollectorRegistry()
        name = "loraport_gateway_"
        labels = ["route", "model", "status"]
        self.requests = Counter(f"{name}requests", "Requests by their end.", labels, registry=made)
        self.broken = Counter(f"{name}broken_streams", "Streams that ended in an error.", ["route"], registry=made)
        self.in_flight = Gauge(f"{name}in_flight", "Requests that are at the engine.", registry=made)
        self.first_byte = Histogram(
            f"{name}first_byte_seconds", "Time to the first byte.", ["route"], buckets=FIRST_BYTE_S, registry=made
        )
        self.tokens = Counter(f"{name}tokens", "Tokens that the engine reported.", ["key", "kind"], registry=made)
        self.phase = Gauge(f"{name}engine_phase", "1 for the phase of the engine.", ["phase"], registry=made)
        for phase in Phase:
            self.phase.labels(phase).set_function(partial(is_in, engine, phase))
        if len(engine.snapshot.replicas) > 1:
            self.up = Gauge(f"{name}replica_ready", "1 while it takes requests.", ["replica"], registry=made)
            for number in range(len(engine.snapshot.replicas)):
                self.up.labels(str(number)).set_function(partial(is_ready, engine, number))

    def count(self, call: Call) -> None:
        """Add a request that is over."""
        self.requests.labels(call.route, TUNED if call.shown_as else call.model, str(call.status)).inc()
        if call.first_byte_s is not None and call.is_engine_call and call.status < 400:
            self.first_byte.labels(call.route).observe(call.first_byte_s)
        if call.broke:
            self.broken.labels(call.route).inc()
        if call.tokens is not None:
            self.tokens.labels(call.key, "prompt").inc(call.tokens.prompt)
            self.tokens.labels(call.key, "completion").inc(call.tokens.completion)

    def page(self, engines: Mapping[int, bytes], are_many: bool = False) -> bytes:
        """The gateway's page and those of the engines, by their numbers, as one."""
        own = bytes(generate_latest(self.registry))
        shown = {number: without_names(page) for number, page in engines.items()}
        return own + (bytes(generate_latest(Merged(shown))) if are_many else b"".join(shown.values()))


def without_keys(page: bytes) -> bytes:
    """A page without the figures that name a key, or the tenant that is its name."""
    return b"".join(line for line in page.splitlines(keepends=True) if not KEYS.match(line))


def without_names(page: bytes) -> bytes:
    """An engine's page in which adapters of fine-tuning jobs have no names; of figures alike then, the last."""
    if not ADAPTERS.search(page):
        return page
    lines: dict[bytes, bytes] = {}
    for number, line in enumerate(page.splitlines()):
        hidden = ADAPTERS.sub(TUNED.encode(), line)
        lines[hidden.rpartition(b" ")[0] if hidden != line else str(number).encode()] = hidden
    return b"\n".join(lines.values()) + b"\n"

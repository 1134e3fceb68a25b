"""Figures for Prometheus: the gateway's own, in a registry of its own, in front of the engine's page.

Labels come from bounded sets: routes of the allow-list, models and keys that exist.
"""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from loraport.serve.gateway.calls import Call
from loraport.serve.gateway.state import EngineState, Phase

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
FIRST_BYTE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def is_in(engine: EngineState, phase: Phase) -> float:
    """1 while the engine is in that phase, else 0."""
    return float(engine.snapshot.phase is phase)


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

    def count(self, call: Call) -> None:
        """Add a request that is over."""
        self.requests.labels(call.route, call.model, str(call.status)).inc()
        if call.first_byte_s is not None and call.is_engine_call and call.status < 400:
            self.first_byte.labels(call.route).observe(call.first_byte_s)
        if call.broke:
            self.broken.labels(call.route).inc()
        if call.tokens is not None:
            self.tokens.labels(call.key, "prompt").inc(call.tokens.prompt)
            self.tokens.labels(call.key, "completion").inc(call.tokens.completion)

    def page(self, engines: bytes) -> bytes:
        """Both pages as one."""
        return bytes(generate_latest(self.registry)) + engines

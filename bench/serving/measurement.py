"""What all load tests share: the server looked at, prompts made, the client calibrated, models warmed, stages run.

>>> with Measurement(setting, targets, folder) as measurement:
...     measurement.prepare()
...     measurement.run("8 at once", targets, Load("closed", 8), requests=64)
>>> measurement.results()[0]["headline"]["output_tokens_per_second"]
512.3
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loraport.bench.environment import server_command
from loraport.bench.load.figures import Records, read_records, sizes, summarize
from loraport.bench.load.fleet import Fleet, Progress
from loraport.bench.load.parts import along_ramp, by_cache, by_turn
from loraport.bench.load.record import ERRORS, Record
from loraport.bench.load.server import Server, difference
from loraport.bench.load.stage import Effort, Load, Stage, Target
from loraport.bench.load.verdict import Calibration, calibrate, describe_client, judge
from loraport.bench.load.workload import Wish, Workload, make_workload
from loraport.clients.errors import EndpointError

PROMPTS_A_STAGE = 1 << 24  # numbers of prompts that no other stage uses
WARM_UP_REQUESTS = 8  # at once
FEW_TARGETS = 8


@dataclass(frozen=True)
class Setting:
    """How to measure. `limits`: seconds by name, for goodput; `processes`: that send requests."""

    wish: Wish
    processes: int = 1
    timeout_s: float = 600
    calibrates: bool = True
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def may_hit_cache(self) -> bool:
        """Whether prompts are meant to share what a prefix cache holds: a prefix, or rows of the user's own."""
        return bool(self.wish.prefix or self.wish.rows)


@dataclass
class Ran:
    """A stage that ran, and what it cost the client. `begins`, `ends`: its part of the files of records."""

    stage: Stage
    efforts: list[Effort] = field(default_factory=list)
    counters: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = False
    begins: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    result: dict[str, Any] | None = None


class Measurement:
    """One run against one or several servers. `stages` grows while it runs, and stays when it is interrupted."""

    def __init__(self, setting: Setting, targets: Sequence[Target], folder: Path) -> None:
        self.setting, self.folder = setting, folder
        self.targets = list(dict.fromkeys(targets))
        self.stages: list[Ran] = []
        self.calibration: Calibration | None = None
        self.workload: Workload | None = None
        self.servers: dict[str, dict[str, Any]] = {}
        self.on_progress: Progress = lambda sums: None
        self.on_step: Callable[[str], None] = lambda words: None
        self.numbers = itertools.count()
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stack.close()

    @property
    def first_url(self) -> str:
        """The base URL of the first target, which decides about prompts."""
        return self.targets[0].url

    def start_at(self, number: int) -> None:
        """Let stages begin with this number: prompts of those below were seen in an earlier run."""
        self.numbers = itertools.count(number)

    def prepare(self, concurrency: int) -> None:
        """Look at the servers, make prompts, calibrate the client, start it and warm up every target.

        Raises EndpointError when a server, a model or the usage of tokens is not there.
        """
        self.clients = {
            url: self.stack.enter_context(Server(url, self.setting.timeout_s))
            for url in dict.fromkeys(t.url for t in self.targets)
        }
        self.on_step("looking at the server")
        for url, server in self.clients.items():
            self.servers[url] = describe_server(server)
        self.workload = make_workload(self.clients[self.first_url], self.targets[0].model, self.setting.wish)
        if self.setting.calibrates:
            self.on_step("calibrating the client against a server that does nothing")
            self.calibration = calibrate(self.setting.processes, concurrency, self.workload.source.input[1])
        fleet = Fleet(
            self.workload.source,
            self.folder,
            self.setting.processes,
            self.setting.timeout_s,
            lambda sums: self.on_progress(sums),
        )
        self.fleet = self.stack.enter_context(fleet)
        self.on_step("warming up")
        self.warm_up(min(concurrency, WARM_UP_REQUESTS))

    def warm_up(self, requests: int) -> None:
        """A few requests to every target, two in turn where there are many; EndpointError for one that answers none."""
        groups = [[target] for target in self.targets]
        if len(groups) > FEW_TARGETS:
            groups = [[target for target in self.targets if target.url == url] for url in self.clients]
        for group in groups:
            stage = self.stage("warm-up", group, Load("closed", requests), 2 * max(requests, len(group)))
            self.stages.append(Ran(stage, self.fleet.run(stage), is_whole=True))
            found = read_records(self.folder, lambda record: (record.stage, record.model))
            each = [(target, found.get((stage.id, target.model), Records())) for target in group]
            failed = [pair for pair in each if pair[1].requests == sum(pair[1].errors.values())]
            if failed:
                raise silent(*max(failed, key=lambda pair: pair[1].requests))

    def stage(
        self,
        label: str,
        targets: Sequence[Target],
        load: Load,
        requests: int | None,
        seconds: float | None = None,
        weights: list[float] | None = None,
        drain_s: float | None = None,
    ) -> Stage:
        """The next stage, with prompts of its own."""
        number = next(self.numbers)
        first = number * PROMPTS_A_STAGE
        return Stage(number, label, list(targets), load, requests, seconds, first, weights, drain_s)

    def run(
        self,
        label: str,
        targets: Sequence[Target],
        load: Load,
        requests: int | None = None,
        seconds: float | None = None,
        weights: list[float] | None = None,
        drain_s: float | None = None,
    ) -> Ran:
        """Run a stage. Ctrl-C goes through; the stage is then kept as far as it came."""
        ran = Ran(self.stage(label, targets, load, requests, seconds, weights, drain_s), begins=sizes(self.folder))
        self.stages.append(ran)
        counting = self.clients[targets[0].url]
        before = counting.counters()
        ran.efforts = self.fleet.run(ran.stage)
        ran.counters, ran.is_whole = difference(before, counting.counters()), True
        ran.ends = sizes(self.folder)
        return ran

    def results(self) -> list[dict[str, Any]]:
        """Each stage but the warm-up as a document: figures, client, verdict, and the headline where it is believed."""
        return [self.result(ran) for ran in self.stages if ran.stage.label != "warm-up"]

    def result(self, ran: Ran) -> dict[str, Any]:
        """One stage as a document; its records are read once."""
        if ran.result is None or not ran.is_whole:
            ran.result = self.read_result(ran)
        return ran.result

    def read_result(self, ran: Ran) -> dict[str, Any]:
        """One stage as a document, out of its records."""
        stage, limits = ran.stage, self.setting.limits
        records = self.read(ran, lambda record: 0).get(0, Records())
        figures = summarize(records, stage.load, limits)
        client = describe_client(ran.efforts)
        hits = ran.counters.get("prefix_cache_hit_rate") if figures["cached_share"] is None else figures["cached_share"]
        reasons = judge(figures, client, self.calibration, None if self.setting.may_hit_cache else hits)
        several = len({target.model for target in stage.targets}) > 1
        by_model = self.read(ran, lambda record: record.model) if several else {}
        return {
            "label": stage.label,
            "stage": stage.id,
            "load": asdict(stage.load),
            "targets": [asdict(target) for target in stage.targets],
            "complete": ran.is_whole,
            "believed": not reasons,
            "reasons": reasons,
            "headline": None if reasons else headline(figures),
            "figures": figures,
            "by_model": {name: summarize(each, stage.load, limits) for name, each in by_model.items()},
            **self.details(ran, records),
            "client": client,
            "server": ran.counters,
        }

    def details(self, ran: Ran, records: Records) -> dict[str, Any]:
        """What only some loads have: figures by prefix cache, by turn of a conversation, along a ramp."""
        load = ran.stage.load
        found: dict[str, Any] = {"by_cache": by_cache(records)} if self.setting.may_hit_cache else {}
        if load.talks:
            found["by_turn"] = by_turn(self.read(ran, lambda record: record.turn))
        if load.ramp_s:
            start = min((effort.started for effort in ran.efforts), default=0.0)
            found["ramp"] = along_ramp(records, load, start, self.setting.limits)
        return found

    def read(self, ran: Ran, key: Callable[[Record], Any]) -> dict[Any, Records]:
        """The records of a stage by a key."""
        found = read_records(self.folder, lambda one: (one.stage == ran.stage.id, key(one)), ran.begins, ran.ends)
        return {name: records for (is_its, name), records in found.items() if is_its}

    def describe(self) -> dict[str, Any]:
        """Servers, prompts and client, for the document."""
        wish, source = self.setting.wish, self.workload.source if self.workload else None
        return {
            "servers": self.servers,
            "workload": {
                "route": wish.route,
                "prompts": source.kind if source else None,
                "input_tokens": list(wish.input),
                "output_tokens": list(wish.output),
                "shared_prefix": wish.prefix,
                "rows": len(wish.rows),
                "natural": wish.natural,
                "replays": wish.replays,
                "as_is": wish.as_is,
                "all_unique": source.all_unique if source else None,
                "seed": wish.seed,
                "extra": source.extra if source else {},
                "notes": self.workload.notes if self.workload else [],
            },
            "client": {
                "processes": self.setting.processes,
                "timeout_s": self.setting.timeout_s,
                "calibration": asdict(self.calibration) if self.calibration else None,
            },
        }


def describe_server(server: Server) -> dict[str, Any]:
    """What a server tells of itself; None for what it does not."""
    cards = server.cards()
    address = server.address
    return {
        "version": server.version(),
        "models": [card.id for card in cards],
        "context": next((card.max_model_len for card in cards if card.max_model_len), None),
        "command": None if address.socket else server_command(address.host, address.port),
    }


def silent(target: Target, records: Records) -> EndpointError:
    """The error for a target that answered none of its warm-up."""
    kinds = ", ".join(
        f"{count} × {ERRORS.get(kind, kind)}" + (f": {records.said[kind]}" if records.said.get(kind) else "")
        for kind, count in records.errors.items()
    )
    message = f"{target.model} at {target.url} answered none of {records.requests} requests ({kinds.rstrip('.')})."
    return EndpointError(message, "the server's log says more")


def headline(figures: dict[str, Any]) -> dict[str, Any]:
    """The few figures that a stage is known by."""
    steady = figures["steady"] or figures
    return {
        "output_tokens_per_second": steady["output_tokens_per_second"],
        "requests_per_second": steady["requests_per_second"],
        "window": "steady" if figures["steady"] else "whole",
        "ttft_ms": {name: figures["ttft_ms"][name] for name in ("p50", "p99")},
        "tpot_ms": figures["tpot_ms"] and {name: figures["tpot_ms"][name] for name in ("p50", "p99")},
    }

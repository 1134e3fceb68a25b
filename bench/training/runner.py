"""Runs every (case, rows, contender, repeat) in a process of its own, contenders taking turns.

A process that ends badly is a result with a reason, not the end of the measurement: out of memory, a crash, too long.
Contenders of one case and repeat run behind each other, so that a machine that slows down slows all of them.

    >>> run = Comparison(Plan("mistral-7b", ["nf4-r8-1024-full"], ["full"], [Contender("ours")], repeats=1))
    >>> run.measure_all()
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from loraport.bench.environment import describe_environment
from loraport.bench.training.cases import CASES, SHAPES, Rows, row_lengths, step_rows
from loraport.bench.training.worker import Worker
from loraport.clients.errors import ResourceError, UsageError

OURS, PEERS = "loraport.train.loop.measure", "loraport.bench.contenders.peers"
PROBE = "loraport.train.loop.probe"
MODULES = {"ours": OURS, "stock": PEERS, "stock-liger": PEERS, "trl": PEERS}
OURS_VARIABLES = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # as train/run.py has it
NEEDS = {"stock-liger": "liger-kernel", "trl": "trl"}
LONGEST_RUN_S = 900.0


@dataclass(frozen=True)
class Contender:
    """Who runs. `settings`: keys of the run configuration, for ours alone."""

    kind: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """As it was written: `ours:checkpointing=half`."""
        settings = ",".join(f"{key}={value}" for key, value in self.settings)
        return f"{self.kind}:{settings}" if settings else self.kind

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """From `kind` or `ours:key=value,key=value`; UsageError for a kind that is not there."""
        import yaml

        kind, _, rest = text.partition(":")
        if kind not in MODULES:
            raise UsageError(f"there is no contender {kind!r}.", f"there are {', '.join(MODULES)}")
        pairs = [part.partition("=") for part in rest.split(",") if part]
        if pairs and kind != "ours":
            raise UsageError(f"{text}: settings are for ours alone.", "for example ours:checkpointing=half")
        if any(not sign for _, sign, _ in pairs):
            raise UsageError(f"{text}: a setting is key=value.", "for example ours:checkpointing=half")
        return cls(kind, tuple((key, yaml.safe_load(value)) for key, _, value in pairs))


@dataclass(frozen=True)
class Plan:
    """What to measure. `gpu_memory`: GiB that each process may take; `seconds`: no run starts after that time.

    With several `gpus` a step has as many times the rows.
    """

    shape: str
    cases: list[str]
    rows: list[Rows]
    contenders: list[Contender]
    repeats: int = 3
    warmup: int = 3
    steps: int = 8
    gpus: int = 1
    gpu_memory: float | None = None
    seconds: float | None = None
    seed: int = 0

    def runs(self) -> list[tuple[int, str, Rows, Contender]]:
        """(repeat, case, rows, contender) in the order in which they run."""
        return [
            (repeat, case, rows, contender)
            for repeat in range(self.repeats)
            for case in self.cases
            for rows in self.rows
            for contender in self.contenders
        ]

    def spec(self, case_name: str, rows: Rows, contender: Contender) -> dict[str, Any]:
        """What a worker is told. `step_rows` rows an optimiser step, of together `step_tokens` on average."""
        case, shape = CASES[case_name], SHAPES[self.shape]
        a_step = step_rows(case, rows) * self.gpus
        lengths = row_lengths(case, rows, a_step * (self.warmup + self.steps), self.seed)
        return {
            "contender": contender.kind,
            "settings": dict(contender.settings),
            "shape": shape,
            "load": case.load,
            "rank": case.rank,
            "dropout": case.dropout,
            "targets": list(case.targets),
            "micro_rows": case.micro_rows,
            "row_tokens": case.row_tokens,
            "rows": rows,
            "checkpointing": case.checkpointing,
            "step_rows": a_step,
            "step_tokens": sum(lengths) / (self.warmup + self.steps),
            "lengths": lengths,
            "warmup": self.warmup,
            "steps": self.steps,
            "gpu_memory": self.gpu_memory,
            "seed": self.seed,
        }


@dataclass
class Comparison:
    """One measurement. `results` grows while it runs, and stays when it is interrupted."""

    plan: Plan
    on_result: Callable[[dict[str, Any]], None] = lambda result: None
    environment: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def is_complete(self) -> bool:
        """Whether every run was started."""
        return len(self.results) == len(self.plan.runs())

    def look_around(self) -> None:
        """Fill in `environment`: what all benches tell, and device, versions, the speed of a matrix product."""
        found = Worker(PROBE, {}).result(LONGEST_RUN_S)
        if "error" in found:
            hint = "training needs torch, transformers and peft: see the README"
            raise ResourceError(f"torch cannot be used here: {found['error']}.", hint, tuple(found["log"]))
        known = describe_environment()
        self.environment = known | found | {"versions": known["versions"] | found["versions"]}

    def choose_cases(self, default: list[str]) -> None:
        """Take the default cases where none were asked for."""
        self.plan = replace(self.plan, cases=self.plan.cases or default)

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure on."""
        return bool(self.environment.get("matmul_flops"))

    def measure_all(self) -> None:
        """Run everything, until it is done or the time is over. Ctrl-C goes through; no process is left behind.

        On a GPU the next run's process imports while this one measures: it needs neither the GPU nor this one's core.
        """
        runs = self.plan.runs()
        following: Worker | None = None
        try:
            for number, (repeat, case, rows, contender) in enumerate(runs):
                if self.plan.seconds is not None and time.monotonic() - self.started > self.plan.seconds:
                    return
                known = {"repeat": repeat, "case": case, "rows": rows, "contender": contender.name}
                reason = self.reason_to_skip(case, contender)
                if not reason:
                    worker = following or self.start(case, rows, contender)
                    following = self.start_after(number)
                result = {"skipped": reason} if reason else worker.result(LONGEST_RUN_S)
                self.results.append(known | result)
                self.on_result(known | result)
        finally:
            if following:
                following.end()

    def start_after(self, number: int) -> Worker | None:
        """The worker of the first run behind this one that is not skipped; None where there is none, or on a CPU."""
        if not self.ahead:
            return None
        later = (run[1:] for run in self.plan.runs()[number + 1 :] if not self.reason_to_skip(run[1], run[3]))
        return next((self.start(case, rows, contender) for case, rows, contender in later), None)

    def start(self, case: str, rows: Rows, contender: Contender) -> Worker:
        """The process of a run."""
        spec = self.plan.spec(case, rows, contender)
        variables = OURS_VARIABLES if contender.kind == "ours" else {}
        return Worker(MODULES[contender.kind], spec, self.plan.gpus, self.ahead, variables)

    @property
    def ahead(self) -> bool:
        """Whether processes are started early."""
        return self.on_gpu and self.plan.gpus == 1

    def reason_to_skip(self, case: str, contender: Contender) -> str | None:
        """Why a run would be pointless here."""
        if CASES[case].load != "fp32" and not self.on_gpu:
            return f"{CASES[case].load} needs a GPU"
        if self.plan.gpus > 1 and contender.kind != "ours":
            return "peers are measured on one GPU"
        need = NEEDS.get(contender.kind)
        if need and need not in self.environment["versions"]:
            return f"{need} is not installed"
        return "liger-kernel needs a GPU" if contender.kind == "stock-liger" and not self.on_gpu else None

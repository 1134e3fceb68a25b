"""`loraport bench kv`: how much context a server takes, how many requests fit, and what its KV cache saves.

Everything goes through the OpenAI API; what /metrics of vLLM add is used where it is there, and told as not available
where it is not. Parts run in the order of PARTS; the document is whole at every moment, so that a server that dies, a
budget that ends or Ctrl-C leave what has run. At the end nothing of ours is under way, and a last probe proves that
the server still answers.

    >>> with Server("http://127.0.0.1:8000/v1", 60) as server:
    ...     run = Run(server, "base", Options(contexts=(8192,)))
    ...     run.measure()
    >>> run.document()["context"]["longest"]
    8192
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loraport.bench.environment import describe_environment
from loraport.bench.load.server import Server
from loraport.bench.load.workload import Wish, make_workload
from loraport.bench.serving.kv_context import find_longest
from loraport.bench.serving.kv_fill import Filling, observed
from loraport.bench.serving.kv_metrics import Page, read_page
from loraport.bench.serving.kv_probe import OutOfBudget, Pace, Prober
from loraport.bench.serving.kv_prompts import measure_lengths, measure_prefix
from loraport.clients.errors import EndpointError
from loraport.clients.models import context_length

PARTS = ("context", "lengths", "prefix", "requests")
QUIET_LOOKS, QUIET_S = 5, 0.2
DEFAULT_SHARES = (4, 1)  # contexts of the fillings, as parts of the longest
DEFINITIONS = {
    "context": "tokens of a prompt and its reply",
    "longest": "the longest context that was answered: a prompt of one token less and one token of reply",
    "ttft": "from sending to the first chunk with text; one request at a time",
    "capacity reported": "the cache in tokens as /metrics tell it",
    "capacity observed": "the most tokens in flight before one more request waited or one was preempted: prompts of "
    "requests that have their first token, and the chunks of their replies",
    "at once": "requests that had their first token and not their last",
    "estimated": "without /metrics a request counts as waiting when its first token takes three times as long as alone "
    "and behind as many prompts as were sent before it; a preempted one may be taken for one that runs",
    "full length": "requests of the whole context that the cache has room for, where it was the limit: at least tokens "
    "in flight by the context, at most those at once, whose replies were still growing",
    "hit rate": "tokens of the prompts that came from the prefix cache, by the server's counters or its `usage`",
}


@dataclass(frozen=True)
class Options:
    """What to measure. `contexts`: of fillings, none for a quarter of the longest and the longest. `most`: at once."""

    contexts: tuple[int, ...] = ()
    parts: tuple[str, ...] = PARTS
    most: int = 512
    repeats: int = 3
    pace: Pace = field(default_factory=Pace)
    chat: bool = False
    seed: int = 0


@dataclass
class Run:
    """One measurement. `found` grows while it runs; `not_run`: part → why."""

    server: Server
    model: str
    options: Options
    found: dict[str, Any] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    left: dict[str, Any] | None = None
    prober: Prober | None = None
    page: Page | None = None
    seconds: float = 0.0
    on_step: Callable[[str], None] = lambda words: None

    def measure(self) -> None:
        """All parts, then the last probe. EndpointError when the server does not answer, at first or any more."""
        begun = time.monotonic()
        self.not_run = dict.fromkeys(self.options.parts, "interrupted")
        try:
            prober = self.prepare(begun)
            for part in (name for name in PARTS if name in self.options.parts):
                self.run_part(part, prober)
        finally:
            if self.prober:
                self.on_step("does it still answer?")
                self.left = self.prober.leave()
            self.seconds = round(time.monotonic() - begun, 3)
        if self.left and not self.left["answers"]:
            raise EndpointError(
                f"{self.server.base_url} does not answer any more ({self.left['said']}).", "its log says more"
            )

    def prepare(self, begun: float) -> Prober:
        """Look at the server, and make prompts for it."""
        self.on_step("looking at the server")
        cards = self.server.cards()
        wish = Wish((64, 64), (4, 4), self.options.seed, self.options.chat)
        workload = make_workload(self.server, self.model, wish)
        self.page = self.quiet_page()
        self.about = {
            "base_url": self.server.base_url,
            "model": self.model,
            "version": self.server.version(),
            "context": context_length(cards, self.model),
            "route": wish.route,
            "prompts": workload.source.kind,
            "notes": workload.notes,
            "busy": self.page.total("running") if self.page else None,
        }
        self.prober = Prober(self.server, self.model, workload.source, self.options.pace, begun)
        self.prober.on_step = self.on_step
        return self.prober

    def quiet_page(self) -> Page | None:
        """/metrics once they have caught up with our own requests; as they are where others keep the server busy."""
        page = read_page(self.server)
        for _ in range(QUIET_LOOKS):
            if page is None or not page.total("running"):
                break
            time.sleep(QUIET_S)
            page = read_page(self.server)
        return page

    def run_part(self, part: str, prober: Prober) -> None:
        """One part; what it could not do is told in `not_run`."""
        try:
            prober.timeout()  # is there any time left?
            reason = getattr(self, f"run_{part}")(prober)
        except OutOfBudget:
            reason = f"the budget of {self.options.pace.budget_s:g} s was used up"
        if reason:
            self.not_run[part] = reason
        else:
            del self.not_run[part]

    def run_context(self, prober: Prober) -> str | None:
        """The longest context."""
        found = self.found["context"] = {}
        find_longest(prober, self.about["context"], found)
        return None if found["longest"] else "no length was accepted"

    def run_lengths(self, prober: Prober) -> str | None:
        """TTFT by length."""
        longest = self.longest()
        if longest:
            measure_lengths(prober, longest, self.options.repeats, self.found)
        return None if longest else "the longest context is not known"

    def run_prefix(self, prober: Prober) -> str | None:
        """The prefix cache."""
        longest = self.longest()
        if longest:
            measure_prefix(prober, longest, self.options.repeats, self.found)
        return None if longest else "the longest context is not known"

    def run_requests(self, prober: Prober) -> str | None:
        """Requests at once, at each context."""
        longest, fillings = self.longest(), self.found.setdefault("requests", [])
        contexts = self.options.contexts or tuple(
            sorted({longest // part for part in DEFAULT_SHARES} if longest else ())
        )
        told = self.page.capacity() if self.page else None
        for context in contexts:
            if longest and context > longest:
                continue
            filling = Filling(prober, context, self.options.most, told["tokens"] if told else None)
            fillings.append(filling.found)
            filling.run()
        beyond = [f"{context:,}" for context in contexts if longest and context > longest]
        if beyond:
            return f"a context of {' and '.join(beyond)} tokens is more than the longest, {longest:,}"
        return None if contexts else "the longest context is not known, and no --context given"

    def longest(self) -> int | None:
        """The longest context that was answered; where that was not measured, what is told."""
        if "context" in self.options.parts:
            return (self.found.get("context") or {}).get("longest")
        return self.about["context"] or max(self.options.contexts, default=None)

    def document(self) -> dict[str, Any]:
        """What has run, as a document."""
        return {
            "bench": "kv",
            "complete": not self.not_run and self.left is not None and self.left["answers"],
            "definitions": DEFINITIONS,
            "environment": describe_environment(),
            "server": self.about,
            "options": {
                "deadline_s": self.options.pace.deadline_s,
                "budget_s": self.options.pace.budget_s,
                "seed": self.options.seed,
                "most": self.options.most,
                "repeats": self.options.repeats,
            },
            "capacity": {
                "reported": self.page.capacity() if self.page else None,
                "observed": observed(self.found.get("requests", [])),
            },
            "context": self.found.get("context"),
            "lengths": self.found.get("lengths"),
            "prefix_cache": self.found.get("prefix_cache"),
            "requests": self.found.get("requests"),
            "not_run": self.not_run,
            "seconds": self.seconds,
            "left": self.left,
        }

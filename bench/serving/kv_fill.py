"""How many requests of one length run at once: more and more are held open until one waits, or the server preempts one.

A request runs once it has its first token, and holds its prompt and what it has of its reply in the cache. Where
/metrics say who waits, they decide; elsewhere a request waits when its first token takes far longer than alone and
behind as many prompts, and the result is marked as estimated. All requests are cancelled at the end, however it ends.

    >>> filling = Filling(prober, context=8192, most=512, capacity=35840)
    >>> filling.run()
    >>> filling.found["at_once"], filling.found["ended_by"], filling.found["limited_by"]
    (4, 'waiting', 'cache')
"""

import asyncio
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loraport.bench.load.prompts import Prompts
from loraport.bench.load.wire import Exchange, Pool
from loraport.bench.serving.kv_metrics import Page, read_page
from loraport.bench.serving.kv_probe import OutOfBudget, Prober, first_token, told

LOOK_S = 0.1  # between two looks at the requests and at /metrics
LOOKS, STEPS = 3, 4  # looks in a row that see one wait, and tokens that each of the others gets meanwhile
LOOKS_TURNOVER, TURNOVER = 10, 0.05  # where requests end meanwhile, and the share that may be between two of them
LOOKS_AFTER = 5  # a preemption, while the cache is full
LEAST_REPLY, ALONE_REPLY = 16, 16  # tokens; a reply is at most half of the context
HOLD, HOLD_S = 1.5, 2.0  # times as long as the filling is expected to take, and seconds
LEAST_HELD_S = 1.0  # below which requests end faster than they are seen
ANSWERS = ("waiting", "preemption", "429")  # endings that say how many there are; with others there may be more
PATIENCE, LEAST_PATIENCE_S = 3.0, 1.0  # times the TTFT alone, for each prompt before it
STALL, LEAST_STALL_S = 3.0, 0.05  # times the TPOT alone, by which a reply may be behind that which got a token last
NEARLY = 0.01  # of the cache, which an engine may keep free
ENDINGS = {
    "waiting": "one waits",
    "preemption": "one preempted",
    "429": "one refused (429)",
    "failed": "one failed",
    "most": "no more tried",
    "deadline": "out of time",
    "budget": "out of budget",
}


@dataclass
class Member:
    """One request that is held open, with its `prompt` in tokens.

    `ahead`: requests without a token when it was sent. `again`: sent in place of one that ended.
    """

    exchange: Exchange
    task: "asyncio.Task[Exchange]"
    sent: float
    prompt: int
    ahead: int
    again: bool = False

    @property
    def last(self) -> float | None:
        """When it got a token last; None before the first, and at its end."""
        return None if self.task.done() else self.exchange.last


@dataclass(frozen=True)
class Mark:
    """Where things stood when one was first seen to wait: requests that run, that ended, and tokens of all."""

    running: float
    ended: int
    tokens: int


class Filling:
    """Requests of `context` tokens, at most `most` at once. `capacity`: of the cache in tokens, where it is known."""

    def __init__(self, prober: Prober, context: int, most: int, capacity: int | None) -> None:
        self.prober, self.context, self.most, self.capacity = prober, context, most, capacity
        self.members: list[Member] = []
        self.before: Page | None = None
        self.running: list[Member] = []  # at the last look
        self.stalled: list[Member] = []
        self.looks = self.looks_after = self.ended = self.ended_tokens = 0
        self.held: list[int] = []  # tokens of those that run
        self.mark: Mark | None = None
        self.refusal: str | None = None
        self.found: dict[str, Any] = {
            "context": context,
            "replies": None,
            "held_s": None,
            "alone": None,
            "at_once": 0,
            "full_length": None,
            "at_least": True,
            "tokens_in_flight": 0,
            "cache_used": None,
            "waiting": None,
            "preemptions": None,
            "ended_by": None,
            "said": None,
            "limited_by": None,
            "did_not_fit": None,
            "estimated": True,
            "seconds": None,
        }

    def run(self) -> None:
        """Fill the server, and let go of it. Ctrl-C cancels the requests too."""
        begun = time.monotonic()
        try:
            if self.alone():
                allow_connections()
                asyncio.run(self.fill())
        except OutOfBudget:
            self.end("budget")
        finally:
            is_held = (self.found["held_s"] or 0) >= LEAST_HELD_S
            self.found["at_least"] = self.found["ended_by"] not in ANSWERS or not is_held
            if self.found["limited_by"] == "cache":
                least = self.found["tokens_in_flight"] // self.context
                self.found["full_length"] = {"least": least, "most": self.found["at_once"]}
            self.found["seconds"] = round(time.monotonic() - begun, 3)

    def alone(self) -> bool:
        """One request by itself: what a first token takes, and each further one."""
        self.prober.on_step(f"a request of {self.context:,} tokens alone")
        reply = min(ALONE_REPLY, self.context // 2)
        exchange = self.prober.ask(self.context - reply, reply)
        first = first_token(exchange)
        if exchange.error or first is None or exchange.last is None or exchange.first is None:
            self.end("failed", told(exchange))
            self.prober.check_alive(f"a request of {self.context:,} tokens")
            return False
        self.first_s = first
        self.token_s = token_s = (exchange.last - exchange.first) / max((exchange.completion or 2) - 1, 1)
        self.found["alone"] = {"ttft_ms": round(1000 * first, 3), "tpot_ms": round(1000 * token_s, 3)}
        self.expected = min(self.most, self.capacity // self.context + 2) if self.capacity else self.most
        return True

    def reply(self) -> int:
        """Tokens of the next reply: what it takes to hold it until all are there that are expected.

        The first are held longest; so all reach their full length at about the same time.
        """
        missing = max(0, self.expected - len(self.members))
        needed = HOLD * (missing * self.first_s + HOLD_S) / max(self.token_s, 1e-6)
        reply = int(min(max(LEAST_REPLY, needed), self.context // 2))
        least, most = self.found["replies"] or (reply, reply)
        self.found["replies"] = [min(least, reply), max(most, reply)]
        self.found["held_s"] = round(self.found["replies"][0] * self.token_s, 3)
        return reply

    async def fill(self) -> None:
        """Add requests and look what becomes of them, until there is an answer."""
        self.prober.on_step(f"how many requests of {self.context:,} tokens run at once?")
        self.pool = Pool(self.prober.server.address, self.prober.server.key)
        self.before = await self.page()
        self.found["estimated"] = self.before is None or self.before.total("waiting") is None
        try:
            while not self.found["ended_by"]:
                running = len(self.members)
                step = max(1, running // (4 if self.found["estimated"] else 2))
                for _ in range(min(step, self.most - running)):
                    self.add()
                await self.settle()
        finally:
            await self.let_go()

    def add(self, again: bool = False) -> None:
        """One more request."""
        reply = self.reply()
        source = self.prober.source(self.context - reply, reply)
        body = Prompts(source).body(next(self.prober.numbers), self.prober.model)
        exchange, ahead = Exchange(), sum(member.exchange.first is None for member in self.members)
        left = max(0.1, self.prober.ends - time.monotonic())
        task = asyncio.create_task(self.pool.ask(source.route, body, left, exchange))
        self.members.append(Member(exchange, task, time.monotonic(), self.context - reply, ahead, again))

    async def settle(self) -> None:
        """Look until all run, or one cannot. A request that came to its end is replaced."""
        until = time.monotonic() + self.prober.timeout()
        is_budget = until >= self.prober.ends - LOOK_S
        while not self.found["ended_by"]:
            await asyncio.sleep(LOOK_S)
            self.replace_ended()
            self.look()
            page = await self.page()
            self.note(page)
            if self.found["preemptions"]:
                self.looks_after += 1
                if self.looks_after > LOOKS_AFTER:
                    self.end("preemption")
                    self.found["limited_by"] = "cache"
            elif self.is_waiting(page):
                self.end("waiting")
                following = next((each.prompt for each in self.members if each.exchange.first is None), self.context)
                self.found["limited_by"] = self.limit(page, following)
                if self.found["limited_by"] == "cache":
                    self.found["did_not_fit"] = following
                    await self.grow()
            elif all(member.again or member.exchange.first is not None for member in self.members):
                if self.refusal or len(self.members) >= self.most:
                    self.end("429" if self.refusal else "most", self.refusal)
                return
            elif time.monotonic() > until:
                self.end("429" if self.refusal else "budget" if is_budget else "deadline", self.refusal)

    async def grow(self) -> None:
        """Replies go on where no prompt fits: what they fill of the rest, until one ends or a request is preempted."""
        self.prober.on_step(f"{len(self.running):,} requests of {self.context:,} tokens run, one waits: they grow")
        until, ended = time.monotonic() + self.prober.timeout(), self.ended
        while time.monotonic() < until and self.ended == ended and not self.found["preemptions"]:
            await asyncio.sleep(LOOK_S)
            self.replace_ended()
            self.look()
            self.note(await self.page())

    def replace_ended(self) -> None:
        """Send another for each that was answered; none for one that was refused with 429. A failure ends it."""
        for member in [each for each in self.members if each.task.done()]:
            self.members.remove(member)
            exchange = member.task.result()
            if exchange.error == "429":
                self.refusal = told(exchange)
            elif exchange.error:  # a timeout is the end of the budget
                self.end("budget" if exchange.error == "timeout" else "failed", told(exchange))
            else:
                self.ended += 1
                self.ended_tokens += exchange.chunks
                self.add(again=True)

    def look(self) -> None:
        """Who runs now: who has a token, and did not fall behind the others, as one does that was preempted."""
        newest = max((member.last for member in self.members if member.last is not None), default=0.0)
        behind = newest - max(LEAST_STALL_S, STALL * self.token_s)
        self.running = [member for member in self.members if member.last is not None and member.last >= behind]
        self.stalled = [member for member in self.members if member.last is not None and member.last < behind]
        # What was said last is not in the cache yet.
        self.held = sorted(member.prompt + member.exchange.chunks - 1 for member in self.running)

    def note(self, page: Page | None) -> None:
        """Keep the most that ran at once, and what it held.

        Where the server says that fewer run than seem to, the largest are left out: what was preempted has not
        stalled for long enough to be seen.
        """
        said = page.total("running") if page and not self.found["estimated"] else None
        held = self.held if said is None else self.held[: int(said)]
        self.found["at_once"] = max(len(held), self.found["at_once"])
        self.found["tokens_in_flight"] = max(sum(held), self.found["tokens_in_flight"])
        if page and page.usage is not None:
            self.found["cache_used"] = max(round(page.usage, 4), self.found["cache_used"] or 0.0)
        self.found["waiting"] = page.total("waiting") if page else None
        self.found["preemptions"] = self.preemptions(page)

    def preemptions(self, page: Page | None) -> float | None:
        """What the counter rose by since the filling began."""
        values = [each.total("preemptions") if each else None for each in (self.before, page)]
        return None if values[0] is None or values[1] is None else values[1] - values[0]

    def is_waiting(self, page: Page | None) -> bool:
        """Whether a request waits for others to end, not only for its own prompt or those before it to be computed."""
        if not self.running:
            return False
        if self.found["estimated"] or page is None:
            now = time.monotonic()
            late = any(each.exchange.first is None and self.is_late(each) for each in self.members)
            return late or any(now - (member.last or now) > LEAST_PATIENCE_S for member in self.stalled)
        running = page.total("running") or 0
        between = TURNOVER * running if self.ended else 0
        if not page.total("waiting") or running > len(self.running) + between:
            self.mark = None
            return False
        return self.is_passed_over(running)

    def is_passed_over(self, running: float) -> bool:
        """Whether the server went on for some steps and took in no more, though one waits and no prompt is computed.

        One look is not enough: during a long step /metrics are those of the step before it.
        """
        tokens = self.ended_tokens + sum(member.exchange.chunks for member in self.members)
        if self.mark is None or self.mark.running != running:
            self.mark, self.looks = Mark(running, self.ended, tokens), 0
        self.looks += 1
        looks = LOOKS if self.mark.ended == self.ended else LOOKS_TURNOVER
        return self.looks >= looks and tokens - self.mark.tokens >= STEPS * len(self.running)

    def is_late(self, member: Member) -> bool:
        """Whether its first token takes far longer than alone, and behind those that were sent before it."""
        patience = max(LEAST_PATIENCE_S, PATIENCE * self.first_s * (member.ahead + 1))
        return time.monotonic() - member.sent > patience

    def limit(self, page: Page | None, prompt: int) -> str | None:
        """What a prompt waits for: the cache, where it has no room for it; else the number of requests at once."""
        if page is None or page.usage is None or not self.capacity:
            return None
        free = self.capacity * (1 - page.usage - NEARLY)
        return "cache" if free < prompt else "requests"

    def end(self, why: str, said: str | None = None) -> None:
        """The first reason to stop counts."""
        if not self.found["ended_by"]:
            self.found |= {"ended_by": why, "said": said}

    async def page(self) -> Page | None:
        """What /metrics say, without keeping the streams waiting."""
        return await asyncio.to_thread(read_page, self.prober.server)

    async def let_go(self) -> None:
        """Cancel what is under way, which closes its connection."""
        for member in self.members:
            member.task.cancel()
        await asyncio.gather(*(member.task for member in self.members), return_exceptions=True)
        self.pool.close()


def allow_connections() -> None:
    """As many files as this process may have: a connection is one."""
    with suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def observed(fillings: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The capacity that was seen: the most tokens in flight, of fillings that the cache ended where there are any."""
    held = [each for each in fillings if each["tokens_in_flight"]]
    full = [each for each in held if each["limited_by"] == "cache"]
    if not held:
        return None
    best = max(full or held, key=lambda each: int(each["tokens_in_flight"]))
    return {
        "tokens": best["tokens_in_flight"],
        "context": best["context"],
        "at_once": best["at_once"],
        "sign": best["ended_by"],
        "did_not_fit": best["did_not_fit"],
        "at_least": not best["estimated"] and (not full or best["at_least"]),
        "estimated": best["estimated"],
    }

"""A process that sends requests: told its orders and then stage after stage, it writes records to disk.

Lines on standard input: the orders; then `{"stage": ..., "start": t}` for each stage, or `{"stop": true}`. Lines on
standard output: `{"sent": n, "answered": n, "failed": n, "tokens": n}` twice a second, and `{"effort": ...}` when a
stage has ended. It ends with its input, so none is left behind when the parent was killed.

    python -m loraport.bench.load.worker
"""

import asyncio
import gc
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from loraport.bench.load.prompts import Prompts
from loraport.bench.load.record import Record, bucket_of
from loraport.bench.load.stage import Effort, Orders, Stage, Target
from loraport.bench.load.wire import Address, Exchange, Pool

TICK_S = 0.01  # of the timer whose lateness is measured
TELL_S = 0.5
PAUSE_S = 0.1  # after a request that failed, in a closed loop: a server that refuses is not asked a million times
NEVER_S = 1e9
PATIENCE = 50  # failures in a row, without an answer, after which a stage is given up


class Worker:
    """All stages of one process."""

    def __init__(self, orders: Orders, records: IO[str]) -> None:
        self.orders, self.records = orders, records
        self.prompts = Prompts(orders.source)
        self.pools: dict[str, Pool] = {}
        self.sent = self.answered = self.failed = self.tokens = self.failures_in_a_row = 0
        self.lags: dict[int, int] = {}
        self.ends_early = False

    async def run(self, stage: Stage, start: float) -> Effort:
        """One stage, from `start` on; what its requests did is on disk when this returns."""
        self.ends_early, self.failures_in_a_row, self.lags = False, 0, {}
        await asyncio.sleep(max(0.0, start - time.monotonic()))
        cpu, before, answered = time.process_time(), self.sent, self.answered
        ticking = asyncio.create_task(self.tick())
        try:
            await (self.closed(stage, start) if stage.load.kind == "closed" else self.open(stage, start))
        finally:
            ticking.cancel()
        self.records.flush()
        spent = time.process_time() - cpu
        gave_up = self.failures_in_a_row >= self.patience(stage)
        told = self.sent - before, self.lags, gave_up, self.ends_early, self.answered - answered
        return Effort(stage.id, start, time.monotonic(), spent, *told)

    def numbers(self, stage: Stage) -> Iterator[int]:
        """Numbers of the requests that are this process's share, in order, until the stage has enough of them.

        In a closed loop as many to each slot, in an open loop as many to each process.
        """
        which, of = self.orders.share
        turns = stage.load.concurrency if stage.load.kind == "closed" else of
        for number in itertools.count():
            if number % turns % of != which:
                continue
            if (stage.requests is not None and number >= stage.requests) or self.ends_early:
                return
            if self.failures_in_a_row >= self.patience(stage):
                return
            yield number

    @staticmethod
    def patience(stage: Stage) -> int:
        """How many failures in a row end a stage."""
        return max(PATIENCE, 2 * stage.load.concurrency)

    async def closed(self, stage: Stage, start: float) -> None:
        """As many requests at all times as this process's share of the concurrency."""
        which, of = self.orders.share
        slots = len(range(which, stage.load.concurrency, of))
        work = self.numbers(stage)
        until = start + stage.seconds if stage.seconds is not None else float("inf")
        talks = stage.load.talks

        async def fill_slot() -> None:
            for number in work:
                if (now := time.monotonic()) >= until:
                    return
                if not await (self.talk(stage, number, until) if talks else self.one(stage, number, now)):
                    await asyncio.sleep(PAUSE_S)

        filling = [asyncio.create_task(fill_slot()) for _ in range(slots)]
        await self.drain(filling, None if stage.drain_s is None else until + stage.drain_s - time.monotonic())

    async def open(self, stage: Stage, start: float) -> None:
        """Each request when it is due, whatever became of those before."""
        which, of = self.orders.share
        schedule = itertools.islice(stage.load.schedule(f"{self.orders.source.seed}/{stage.id}"), which, None, of)
        running: set[asyncio.Task[bool]] = set()
        for number, (due, lengths) in zip(self.numbers(stage), schedule, strict=False):
            if stage.seconds is not None and due >= stage.seconds:
                break
            while (wait := start + due - time.monotonic()) > 0 and not self.ends_early:
                await asyncio.sleep(min(wait, TELL_S))
            if self.ends_early:
                break
            task = asyncio.create_task(self.one(stage, number, start + due, lengths))
            running.add(task)
            task.add_done_callback(running.discard)
        gave_up = self.failures_in_a_row >= self.patience(stage)
        await self.drain(list(running), 0 if gave_up else stage.drain_s)

    @staticmethod
    async def drain(tasks: "Sequence[asyncio.Task[Any]]", seconds: float | None) -> None:
        """Wait for what is under way, `seconds` at most; the rest is cut off and becomes records that say so."""
        late = set(tasks)
        if late and seconds != 0:
            _, late = await asyncio.wait(late, timeout=seconds if seconds is None or seconds < NEVER_S else None)
        while late:
            for task in late:
                task.cancel()
            _, late = await asyncio.wait(late, timeout=PAUSE_S)

    async def one(self, stage: Stage, number: int, due: float, lengths: tuple[int, int] | None = None) -> bool:
        """One request; whether it was answered."""
        target = stage.target(number, self.orders.source.seed)
        body = self.prompts.body(stage.first + number, target.model, lengths)
        return not (await self.send(stage, number, target, body, due)).error

    async def talk(self, stage: Stage, number: int, until: float) -> bool:
        """One conversation, turn by turn, until it or the time is over, or a turn fails; whether none did."""
        target, talk = stage.target(number, self.orders.source.seed), self.prompts.talk(stage.first + number)
        while (messages := talk.ask()) is not None and (now := time.monotonic()) < until and not self.ends_early:
            body = self.prompts.turn(stage.first + number, talk, messages, target.model)
            exchange = await self.send(stage, number, target, body, now, talk.turn)
            if exchange.error:
                return False
            talk.hear("".join(exchange.words or ()))
        return True

    async def send(self, stage: Stage, number: int, target: Target, body: bytes, due: float, turn: int = 0) -> Exchange:
        """A request, and its record."""
        pool = self.pools.get(target.url) or self.pools.setdefault(target.url, self.make_pool(target.url))
        self.sent += 1
        exchange = await pool.ask(self.orders.source.route, body, self.orders.timeout_s, Exchange(keeps_words=turn > 0))
        record = Record(stage.id, number, target.model, due, exchange.sent, status=exchange.status, turn=turn)
        exchange.write_to(record)
        self.count(record)
        self.records.write(record.line())
        return exchange

    def make_pool(self, url: str) -> Pool:
        """Connections to a base URL."""
        return Pool(Address.parse(url), os.environ.get("OPENAI_API_KEY", ""))

    def count(self, record: Record) -> None:
        """For the progress, and to give up in time."""
        if record.error:
            self.failed += 1
            self.failures_in_a_row += record.error != "stopped"
        else:
            self.answered += 1
            self.failures_in_a_row = 0
            self.tokens += record.completion_tokens or 0

    async def tick(self) -> None:
        """Measure how late this event loop is; tell how far the stage is."""
        told = time.monotonic()
        while True:
            wanted = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            bucket = bucket_of(now - wanted)
            self.lags[bucket] = self.lags.get(bucket, 0) + 1
            if now - told > TELL_S:
                told = now
                self.records.flush()
                tell({"sent": self.sent, "answered": self.answered, "failed": self.failed, "tokens": self.tokens})


def tell(document: dict[str, Any]) -> None:
    """One line to the parent, if it is still there."""
    with suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()


async def work() -> None:
    """Orders, then stages one after the other, until standard input ends."""
    reader = asyncio.StreamReader(limit=1 << 30)  # rows of the user's own stand in the orders
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    orders = Orders.parse(json.loads(await reader.readline()))
    running: asyncio.Task[None] | None = None
    with open(orders.records, "a", encoding="utf-8", buffering=1 << 16) as records:  # noqa: PTH123
        worker = Worker(orders, records)
        while line := await reader.readline():
            message = json.loads(line)
            if "stage" in message:
                running = asyncio.create_task(run_and_tell(worker, message))
            elif running:
                worker.ends_early = True
                cancel_requests(running)
        if running:
            worker.ends_early = True
            cancel_requests(running)
            await asyncio.wait([running])


async def run_and_tell(worker: Worker, message: dict[str, Any]) -> None:
    """A stage and its effort."""
    effort = await worker.run(Stage.parse(message["stage"]), message["start"])
    tell({"effort": asdict(effort)})


def cancel_requests(stage: "asyncio.Task[None]") -> None:
    """End what is under way: each request becomes a record that says so."""
    for task in asyncio.all_tasks():
        if task not in (stage, asyncio.current_task()):
            task.cancel()


def main() -> None:
    """Run under uvloop where it is installed: the same protocol classes in half the time."""
    with suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.freeze()
    gc.set_threshold(50_000)
    try:
        import uvloop
    except ImportError:
        asyncio.run(work())
    else:
        uvloop.run(work())


if __name__ == "__main__":
    main()

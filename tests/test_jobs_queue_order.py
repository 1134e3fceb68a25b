"""Which job is next: priority, fairness, reservations; a thousand jobs of twenty tenants in virtual time."""

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from loraport.serve.jobs.order import Rules, Running, Waiting, choose, decayed


@dataclass
class Box:
    """Machines in virtual time: jobs take as long as `lengths` says, whatever was estimated. `gpus`: of each node."""

    gpus: int
    rules: Rules = field(default_factory=Rules)
    nodes: int = 1
    now: float = 0.0
    waiting: list[Waiting] = field(default_factory=list)
    running: dict[str, tuple[Running, float]] = field(default_factory=dict)  # with its real end
    lengths: dict[str, float] = field(default_factory=dict)
    used: Counter[str] = field(default_factory=Counter)
    started: list[str] = field(default_factory=list)
    jobs: dict[str, Waiting] = field(default_factory=dict)
    most: int = 0

    def submit(self, job: Waiting, length: float) -> None:
        """Have a job wait."""
        self.waiting.append(job)
        self.jobs[job.id], self.lengths[job.id] = job, length

    @property
    def free(self) -> dict[str, int]:
        """GPUs that nobody has, by node."""
        left = {f"n{number}": self.gpus for number in range(self.nodes)}
        for job, _ in self.running.values():
            left[job.node or ""] -= job.gpus
        return left

    def tick(self) -> list[str]:
        """Start what starts now."""
        left, places = self.free, dict[str, str]()

        def take(job: Waiting, avoid: str | None) -> int | None:
            fitting = [node for node, count in left.items() if count >= job.gpus and node != avoid]
            if not fitting:
                return None
            places[job.id] = fitting[0]
            left[fitting[0]] -= job.gpus
            return job.gpus

        chosen = choose(
            self.waiting,
            [job for job, _ in self.running.values()],
            self.used,
            gpus=self.gpus,
            take=take,
            now=self.now,
            free=lambda: dict(left),
            rules=self.rules,
        )
        for name in chosen:
            job = self.jobs[name]
            run = Running(job.tenant, job.gpus, self.now, job.estimated_s, places[name])
            self.running[name] = (run, self.now + self.lengths[name])
        self.waiting = [job for job in self.waiting if job.id not in chosen]
        self.started += chosen
        assert min(self.free.values()) >= 0 and len(set(self.started)) == len(self.started)
        return chosen

    def advance(self) -> None:
        """Go to the next end of a job, and end it."""
        name = min(self.running, key=lambda name: self.running[name][1])
        run, end = self.running.pop(name)
        self.used[run.tenant] += run.gpus * (end - run.started_at)
        self.now = end

    def run(self, until: float = float("inf")) -> None:
        """Until nothing waits or runs."""
        self.tick()
        while self.running and self.now < until:
            self.advance()
            self.tick()


def job(name: str, tenant: str = "ann", **fields: object) -> Waiting:
    """A job; its number is its `seq`."""
    return replace(Waiting(name, tenant, int(name[1:])), **fields)  # type: ignore[arg-type]


def test_the_higher_priority_comes_first_then_the_older() -> None:
    box = Box(1)
    for name, priority in (("j1", 0), ("j2", 5), ("j3", 0)):
        box.submit(job(name, priority=priority), 10.0)
    box.run()
    assert box.started == ["j2", "j1", "j3"]


def test_tenants_take_turns_whoever_came_first() -> None:
    box = Box(1)
    for number in range(1, 7):
        box.submit(job(f"j{number}", "ann"), 10.0)
    box.submit(job("j7", "bob"), 10.0)
    box.run()
    assert box.started[:3] == ["j1", "j7", "j2"]


def test_who_used_less_lately_comes_first() -> None:
    box = Box(1, used=Counter({"ann": 500}))
    box.submit(job("j1", "ann"), 10.0)
    box.submit(job("j2", "bob"), 10.0)
    box.run()
    assert box.started == ["j2", "j1"]
    assert decayed(100.0, 0.0, 3600.0, 3600.0) == pytest.approx(50.0)


def test_jobs_that_will_run_long_count_from_their_start() -> None:
    box = Box(2)
    for number, tenant, length in ((1, "ann", 1000.0), (2, "ann", 10.0), (3, "bob", 10.0), (4, "bob", 10.0)):
        box.submit(job(f"j{number}", tenant, estimated_s=length), length)
    box.run()
    assert box.started == ["j1", "j3", "j4", "j2"]


def test_a_tenant_has_no_more_running_than_its_limit() -> None:
    box = Box(4, Rules(per_tenant=2))
    for number in range(1, 6):
        box.submit(job(f"j{number}"), 10.0)
    assert box.tick() == ["j1", "j2"]
    box.advance()
    assert box.tick() == ["j3"]


def test_a_job_waits_for_its_time() -> None:
    box = Box(1)
    box.submit(job("j1", not_before=100.0), 1.0)
    assert box.tick() == []
    box.now = 100.0
    assert box.tick() == ["j1"]


def test_a_job_of_several_gpus_gets_them_and_short_ones_fill_the_gap() -> None:
    box = Box(4)
    box.submit(job("j1", gpus=3, estimated_s=100.0), 100.0)
    box.tick()
    box.submit(job("j2", "bob", gpus=4, estimated_s=50.0), 50.0)  # reserved for t = 100
    box.submit(job("j3", "cat", estimated_s=90.0), 90.0)  # ends before: fills the gap
    box.submit(job("j4", "dan", estimated_s=200.0), 200.0)  # would delay it
    assert box.tick() == ["j3"]
    box.run()
    assert box.started == ["j1", "j3", "j2", "j4"] and box.now == 350.0


def test_gpus_that_a_reservation_does_not_need_are_no_matter_of_it() -> None:
    box = Box(4)
    box.submit(job("j1", gpus=2, estimated_s=100.0), 100.0)
    box.tick()
    box.submit(job("j2", "bob", gpus=3, estimated_s=50.0), 50.0)
    box.submit(job("j3", "cat"), 900.0)  # of unknown length, on the one GPU that is spare at t = 100
    box.submit(job("j4", "dan"), 900.0)
    assert box.tick() == ["j3"]


def test_what_is_spare_is_not_spent_on_a_job_that_does_not_start() -> None:
    waiting = [job("j1", gpus=3), job("j2", "bob"), job("j3", "cat")]
    running = [Running("dan", 2, 0.0, 100.0)]

    def take(job: Waiting, _: str | None) -> int | None:
        return None if job.id == "j2" else job.gpus  # the engine does not leave for j2

    assert choose(waiting, running, {}, gpus=4, take=take, now=0.0) == ["j3"]


def test_free_gpus_of_several_nodes_do_not_add_up() -> None:
    box = Box(2, nodes=2)
    for number, node, length in ((1, "n0", 100.0), (2, "n1", 200.0)):
        box.running[f"j{number}"] = (Running("ann", 1, 0.0, length, node), length)
    box.submit(job("j3", "bob", gpus=2), 50.0)  # n0 is reserved for t = 100
    box.submit(job("j4", "cat"), 900.0)
    box.submit(job("j5", "dan"), 900.0)
    box.submit(job("j6", "eve", estimated_s=90.0), 90.0)
    assert box.tick() == ["j4", "j6"] and box.free == {"n0": 0, "n1": 0}
    box.advance()
    box.advance()
    assert box.now == 100.0 and box.tick() == ["j3"]


def test_a_job_that_the_machine_cannot_hold_blocks_nobody() -> None:
    box = Box(2)
    box.submit(job("j1", gpus=3), 10.0)
    box.submit(job("j2", "bob"), 10.0)
    box.run()
    assert box.started == ["j2"]


def test_a_job_that_may_share_starts_where_no_gpu_is_free() -> None:
    taken: list[str] = []

    def take(job: Waiting, _: str | None) -> int | None:
        taken.append(job.id)
        return 0

    waiting = [job("j1"), job("j2", "bob", may_share=True)]
    running = [Running("cat", 1, 0.0, 1000.0)]
    # j1 has the GPU reserved for t = 1000: who shares has to be gone by then
    assert choose(waiting, running, {}, gpus=1, take=take, now=0.0) == []
    waiting[1] = replace(waiting[1], estimated_s=500.0)
    assert choose(waiting, running, {}, gpus=1, take=take, now=0.0) == ["j2"] == taken


def test_who_has_waited_for_long_goes_first_even_if_it_used_more() -> None:
    box = Box(1, Rules(patience_s=100.0), now=1000.0, used=Counter({"ann": 1e9}))
    box.submit(job("j1", "bob", since=950.0), 1.0)
    box.submit(job("j2", "ann", since=890.0), 1.0)
    assert box.tick() == ["j2"]


@pytest.mark.parametrize("seed", range(20))
def test_every_job_starts_once_whatever_they_are_and_however_wrong_the_estimates(seed: int) -> None:
    dice = random.Random(seed)
    box = Box(dice.choice([1, 2, 4, 8]), Rules(per_tenant=dice.choice([None, 1, 3])), dice.choice([1, 1, 3]))
    arrivals = sorted(dice.uniform(0, 2000) for _ in range(120))
    pending = [(at, number) for number, at in enumerate(arrivals, 1)]
    heapq.heapify(pending)
    while pending or box.running or box.waiting:
        while pending and (not box.running or pending[0][0] <= min(end for _, end in box.running.values())):
            at, number = heapq.heappop(pending)
            box.now = max(box.now, at)
            length = dice.expovariate(1 / 60)
            estimate = dice.choice([None, length, length * dice.uniform(0.2, 3)])
            box.submit(
                job(
                    f"j{number}",
                    f"t{dice.randrange(6)}",
                    gpus=dice.randint(1, box.gpus),
                    estimated_s=estimate,
                    priority=dice.choice([0, 0, 0, 1]),
                    since=box.now,
                ),
                length,
            )
            box.tick()
        if box.running:
            box.advance()
        box.tick()
    assert len(box.started) == 120


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nodes", [1, 4])
def test_a_large_job_starts_while_small_ones_never_stop_coming(seed: int, nodes: int) -> None:
    dice = random.Random(seed)
    box = Box(8 // nodes, nodes=nodes)
    number = 1
    for _ in range(16):
        box.submit(job(f"j{(number := number + 1)}", f"t{dice.randrange(9)}", estimated_s=100.0), dice.uniform(50, 120))
    box.tick()
    box.submit(job("j1", "big", gpus=box.gpus, estimated_s=60.0, since=0.0), 60.0)
    while "j1" not in box.started:
        box.advance()
        for _ in range(3):  # more than ends
            name = f"j{(number := number + 1)}"
            box.submit(job(name, f"t{dice.randrange(9)}", estimated_s=100.0), dice.uniform(50, 120))
        box.tick()
        assert box.now < 1000.0, "starved"


def test_a_thousand_jobs_of_twenty_tenants_get_fair_shares() -> None:
    dice = random.Random(7)
    box = Box(8)
    for number in range(1, 1001):  # the first tenants sent theirs first, and many of them
        tenant = f"t{min(int(dice.expovariate(0.2)), 19)}"
        box.submit(job(f"j{number}", tenant, estimated_s=30.0), dice.uniform(10, 50))
    sent = Counter(job.tenant for job in box.waiting)
    box.tick()
    while len(box.started) < 300:
        box.advance()
        box.tick()
    got = Counter(box.jobs[name].tenant for name in box.started)
    busy = [tenant for tenant, count in sent.items() if count > 2 * 300 / len(sent)]
    shares = [box.used[tenant] for tenant in busy]
    assert len(busy) >= 8 and max(shares) < 1.3 * min(shares)
    assert all(got[tenant] == count for tenant, count in sent.items() if count < 300 / len(sent) / 2)
    box.run()
    assert len(box.started) == 1000

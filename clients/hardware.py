"""What this machine has: a GPU, the CPU, and how much of their memory is free now. No torch here.

Serving and planning both ask here; which of the two devices a program uses is its own affair.

>>> read_gpu() or read_cpu()
Device(kind='cpu', name='CPU, 2 cores', total=24_684_092_000, free=22_938_076_000, cores=2)
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

import psutil

# (limit, usage, statistics) of control groups, version 2 and version 1; as seen from inside a container.
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
NO_LIMIT = 1 << 60  # version 1 writes a number near 2**63 where there is no limit


@dataclass(frozen=True)
class Device:
    """Where a program will run. Memory in bytes: of the GPU, or of the machine within its control group."""

    kind: Literal["cuda", "cpu"]
    name: str
    total: int
    free: int
    cores: int  # CPU cores that this process may use
    has_bf16: bool = True  # whether it multiplies bfloat16 in hardware
    capability: float | None = None  # CUDA's compute capability: 8.9 of Ada, 9.0 of Hopper


def visible_gpus() -> list[int | str] | None:
    """What CUDA_VISIBLE_DEVICES names, indices or UUIDs, up to the first that is neither; None where it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    names = [name.strip() for name in visible.split(",")]
    known = takewhile(lambda name: name.isdigit() or name.startswith(("GPU-", "MIG-")), names)
    return [int(name) if name.isdigit() else name for name in known]


def read_gpu() -> Device | None:
    """The first visible GPU; None where there is none."""
    return next(iter(read_gpus(1)), None)


def read_gpus(most: int | None = None) -> list[Device]:
    """The visible GPUs, or the first `most`, as NVIDIA's management library sees them; none where it is not there."""
    try:
        import pynvml
    except ImportError:
        return []
    found: list[Device] = []
    with suppress(pynvml.NVMLError):  # no driver, or no such GPU: those behind it are not visible to CUDA either
        pynvml.nvmlInit()
        named = visible_gpus()
        gpus: Sequence[int | str] = named if named is not None else range(most or pynvml.nvmlDeviceGetCount())
        found.extend(read_one(gpu) for gpu in gpus[:most])
    return found


def read_one(gpu: int | str) -> Device:
    """A GPU by its index or UUID; NVMLError where there is none."""
    import pynvml

    by_index = isinstance(gpu, int)
    handle = pynvml.nvmlDeviceGetHandleByIndex(gpu) if by_index else pynvml.nvmlDeviceGetHandleByUUID(gpu)
    memory, name = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetName(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    text = name.decode() if isinstance(name, bytes) else str(name)
    return Device("cuda", text, int(memory.total), int(memory.free), usable_cores(), major >= 8, major + minor / 10)


def read_cpu(bound: bool = True) -> Device:
    """The CPU and the memory that it can still hand out, whichever limit is the lowest.

    `bound`: to the first memory node, as vLLM's worker is; training takes memory of all of them.
    """
    memory = psutil.virtual_memory()
    limits = [memory.total], [memory.available]
    for known in (read_cgroup(), read_node() if bound else None):
        if known:
            limits[0].append(known[0])
            limits[1].append(known[1])
    cores = usable_cores()
    flags = cpu_flags()
    return Device("cpu", f"CPU, {cores} cores", min(limits[0]), min(limits[1]), cores, has_bf16="avx512_bf16" in flags)


def usable_cores() -> int:
    """Physical cores that this process may run on: two hyper-threads on one core gain nothing in matrix products."""
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def cpu_flags() -> set[str]:
    """Instruction sets of the CPU, as the kernel names them."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return set(line.split())
    return set()


def read_cgroup(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """(limit, free) of this control group in bytes; None where there is no limit.

    Files that the kernel can drop (`inactive_file`) count as free.
    """
    for limit_name, usage_name, statistics_name in CGROUP_FILES:
        with suppress(OSError, ValueError):
            limit = int((root / limit_name).read_text())
            usage = int((root / usage_name).read_text())
            if limit >= NO_LIMIT:
                return None
            statistics = dict(line.split() for line in (root / statistics_name).read_text().splitlines())
            return limit, max(0, limit - usage + int(statistics.get("inactive_file", 0)))
    return None


def read_node(path: Path = Path("/sys/devices/system/node/node0/meminfo")) -> tuple[int, int] | None:
    """(total, free) of the memory node that vLLM's CPU worker binds itself to; None where there are no nodes.

    The same sum as vLLM's own, which refuses to start when it is too small (vllm/utils/cpu_resource_utils.py,
    `get_memory_node_info`).
    """
    with suppress(OSError, ValueError, KeyError, IndexError):
        fields = {line.split()[2].rstrip(":"): int(line.split()[3]) * 1024 for line in path.read_text().splitlines()}
        free = sum(fields[key] for key in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))
        return fields["MemTotal"], free
    return None

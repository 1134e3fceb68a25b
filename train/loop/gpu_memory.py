"""Memory of the GPU that this process computes on: the limit it keeps to, and the most it has taken.

Reserved memory is what the process holds of the GPU, free pieces between tensors included: it is what the plan
predicts, what --gpu-memory limits, and what others do not get. Without a GPU there is nothing to limit.

    >>> limit_memory(16.0)
    >>> f"{peak_memory() / 2**30:.1f} GiB"
    '15.2 GiB'
"""

import torch


def limit_memory(gibibytes: float | None) -> None:
    """Have torch take no more of the GPU than this, so that a run out of it is noticed here; None: no limit."""
    if gibibytes is not None and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gibibytes * 2**30 / whole))


def peak_memory() -> int:
    """Bytes: the most that was reserved on the GPU at once; without a GPU what the process has in memory now."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    import psutil

    return int(psutil.Process().memory_info().rss)

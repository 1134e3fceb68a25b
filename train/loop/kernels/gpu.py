"""Whether the Triton kernels of this folder can run, and the sizes of their grids.

A frozen base makes the kernels short: no gradient for norm weights or the head. Everything is computed in float32 and
rounded once; on CPUs plain torch stands for them, in float32 or wider. Both give the same numbers to rounding, which
the tests and the check before each run hold (`train/loop/ways.py`).

    >>> on_gpu(torch.zeros(3))
    False
"""

from typing import Any

import torch

try:
    import triton

    HAVE_TRITON = torch.cuda.is_available()
except ImportError:  # the CPU build of torch has none
    HAVE_TRITON = False

ALIGNED = 64  # numbers of 16 bits in 128 bytes


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels take this tensor."""
    return HAVE_TRITON and tensor.is_cuda


def tiles(rows: int, n: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and block sizes for a kernel over rows of n numbers: wide rows one a program, narrow ones several."""
    block = triton.next_power_of_2(n)
    many = max(1, 2048 // block)
    warps = 4 if block * many <= 2048 else 8 if block <= 4096 else 16
    return (triton.cdiv(rows, many),), {"ROWS": many, "BLOCK": block, "num_warps": warps}


def cells(rows: int, n: int, block: int = 2048) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and block sizes for a kernel over rows of n numbers, each by itself."""
    return (rows, triton.cdiv(n, block)), {"BLOCK": block, "num_warps": 4}


def roomy(rows: int, n: int, tail: int, like: torch.Tensor) -> torch.Tensor:
    """An empty (rows, n + tail), for n numbers and what comes behind them, on the device and in the type of `like`."""
    return torch.empty(rows, stride_of(n, tail), device=like.device, dtype=like.dtype)[:, : n + tail]


def stride_of(n: int, tail: int) -> int:
    """Numbers from one row to the next. Products are about 2% faster where rows begin at 128 bytes (an H200)."""
    return -(-(n + tail) // ALIGNED) * ALIGNED if tail else n


def wide(x: torch.Tensor) -> Any:
    """x in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

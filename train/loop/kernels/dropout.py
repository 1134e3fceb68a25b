"""Dropout without masks: a seed stands for which numbers are dropped, and gives the same ones in the backward pass.

On GPUs the counter-based generator of Triton (Philox; Salmon et al., 2011) draws them in passing, with p rounded to a
65,536th; elsewhere torch's does.

    >>> dropped_TI = drop(x_TI, 0.05, seed)
    >>> dx_TI = add_dropped(dx_TI, d_dropped_TI, 0.05, seed)
"""

import torch
from torch import Tensor

from loraport.train.loop.kernels.gpu import HAVE_TRITON, on_gpu

if HAVE_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _drop_kernel(x_ptr, y_ptr, n, x_row, y_row, threshold, scale, seed, ADD: tl.constexpr, PART: tl.constexpr):
        row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * PART
        at = tl.arange(0, PART)
        # Four words of 32 bits a call, 16 bits a number: drawing them would else take longer than the memory does.
        words = tl.randint4x(seed + row, start + at)
        for part in tl.static_range(8):
            drawn = (words[part // 2] >> (16 * (part % 2))) & 0xFFFF
            column = start * 8 + part * PART + at
            inside = column < n
            x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
            y = tl.where(drawn >= threshold, x * scale, 0.0)
            if ADD:
                y += tl.load(y_ptr + row * y_row + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_ptr + row * y_row + column, y, mask=inside)


SPARE_BITS = 31  # of a seed
PART = 512  # an eighth of the columns that a program takes


def draw_seed() -> int:
    """A seed for one call, from torch's generator, whose state checkpoints keep. Rows are added to it."""
    return int(torch.randint(2**31, ())) << SPARE_BITS


def drop(x_TI: Tensor, p: float, seed: int) -> Tensor:
    """x with a share p of its numbers zero and the others divided by 1 - p. Rows may be parts of longer ones."""
    if not on_gpu(x_TI):
        return x_TI * mask(x_TI, p, seed)
    y_TI = torch.empty(x_TI.shape, device=x_TI.device, dtype=x_TI.dtype)
    launch(x_TI, y_TI, p, seed, add=False)
    return y_TI


def add_dropped(y_TI: Tensor, x_TI: Tensor, p: float, seed: int) -> Tensor:
    """y += drop(x, p, seed)."""
    if not on_gpu(x_TI):
        return y_TI.addcmul_(x_TI, mask(x_TI, p, seed))
    launch(x_TI, y_TI, p, seed, add=True)
    return y_TI


def launch(x_TI: Tensor, y_TI: Tensor, p: float, seed: int, add: bool) -> None:
    """The kernel."""
    rows, n = x_TI.shape
    threshold = round(p * 2**16)
    grid = (rows, triton.cdiv(n, 8 * PART))
    strides = x_TI.stride(0), y_TI.stride(0)
    _drop_kernel[grid](
        x_TI, y_TI, n, *strides, threshold, 1 / (1 - threshold / 2**16), seed, ADD=add, PART=PART, num_warps=4
    )


def mask(x_TI: Tensor, p: float, seed: int) -> Tensor:
    """0 or 1 / (1 - p) for each number."""
    # torch's generator on a CPU reads 32 bits of a seed; the lower ones are for Triton's rows.
    generator = torch.Generator(x_TI.device).manual_seed(seed >> SPARE_BITS)
    kept_TI = torch.empty(x_TI.shape, device=x_TI.device, dtype=x_TI.dtype).bernoulli_(1 - p, generator=generator)
    return kept_TI.div_(1 - p)

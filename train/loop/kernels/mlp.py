"""SwiGLU, silu(gate) * up, and its gradients in the places of its arguments.

>>> swiglu(gate_TI, up_TI, h_TI)
>>> swiglu_backward(dh_TI, gate_TI, up_TI)      # dh becomes h, gate and up become their gradients
"""

import torch

from loraport.train.loop.kernels.gpu import HAVE_TRITON, cells, on_gpu

if HAVE_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _swiglu_kernel(g_ptr, u_ptr, h_ptr, n, gu_row, h_row, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        g = tl.load(g_ptr + row * gu_row + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + row * gu_row + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(h_ptr + row * h_row + at, g * tl.sigmoid(g) * u, mask=inside)

    @triton.jit
    def _swiglu_backward_kernel(dh_ptr, g_ptr, u_ptr, n, gu_row, h_row, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        dh = tl.load(dh_ptr + row * h_row + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + row * gu_row + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + row * gu_row + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        silu = g * s
        tl.store(dh_ptr + row * h_row + at, silu * u, mask=inside)
        tl.store(g_ptr + row * gu_row + at, dh * u * s * (1.0 + g * (1.0 - s)), mask=inside)
        tl.store(u_ptr + row * gu_row + at, dh * silu, mask=inside)


def swiglu(gate_TI: torch.Tensor, up_TI: torch.Tensor, out_TI: torch.Tensor) -> None:
    """silu(gate) * up into `out`; rows may be parts of longer ones, gate's and up's of the same length."""
    if not on_gpu(gate_TI):
        torch.mul(torch.nn.functional.silu(gate_TI), up_TI, out=out_TI)
        return
    rows, n = gate_TI.shape
    grid, sizes = cells(rows, n)
    _swiglu_kernel[grid](gate_TI, up_TI, out_TI, n, gate_TI.stride(0), out_TI.stride(0), **sizes)


def swiglu_backward(dh_TI: torch.Tensor, gate_TI: torch.Tensor, up_TI: torch.Tensor) -> None:
    """The gradients of gate and up take the place of these, and h = silu(gate) * up that of its gradient."""
    if not on_gpu(gate_TI):
        s_TI = torch.sigmoid(gate_TI)
        silu_TI = gate_TI * s_TI
        dgate_TI, dup_TI, h_TI = dh_TI * up_TI * s_TI * (1 + gate_TI * (1 - s_TI)), dh_TI * silu_TI, silu_TI * up_TI
        for old, new in ((gate_TI, dgate_TI), (up_TI, dup_TI), (dh_TI, h_TI)):
            old.copy_(new)
        return
    rows, n = gate_TI.shape
    grid, sizes = cells(rows, n)
    _swiglu_backward_kernel[grid](dh_TI, gate_TI, up_TI, n, gate_TI.stride(0), dh_TI.stride(0), **sizes)

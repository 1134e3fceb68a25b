"""RMS norms with frozen weights: x / sqrt(mean(x²) + eps) * weight over the last dimension (Zhang & Sennrich, 2019).

The backward kernel adds the gradient of the residual stream, and makes the norm's output again on its way: neither has
to be kept or read once more.

    >>> y_MN = rms_norm(x_MN, weight_N, 1e-6)
    >>> dx_MN, y_MN = rms_norm_backward(dy_MN, x_MN, weight_N, 1e-6, residual_MN)
"""

from typing import Any

import torch
from torch import Tensor

from loraport.train.loop.kernels.gpu import HAVE_TRITON, on_gpu, roomy, tiles, wide

if HAVE_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(x_ptr, w_ptr, y_ptr, rows, n, x_row, y_row, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        col = tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (col < n)
        x = tl.load(x_ptr + row * x_row + col, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + col, mask=col < n, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / n + eps)
        tl.store(y_ptr + row * y_row + col, x * r * w, mask=inside)

    @triton.jit
    def _backward_kernel(
        dy_ptr,
        x_ptr,
        w_ptr,
        res_ptr,
        dx_ptr,
        y_ptr,
        rows,
        n,
        dy_row,
        x_row,
        res_row,
        dx_row,
        eps,
        RESIDUAL: tl.constexpr,
        AGAIN: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        col = tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (col < n)
        dy = tl.load(dy_ptr + row * dy_row + col, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_row + col, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + col, mask=col < n, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / n + eps)
        wdy, xr = w * dy, x * r
        dx = r * (wdy - xr * (tl.sum(wdy * xr, axis=1)[:, None] / n))
        if RESIDUAL:
            dx += tl.load(res_ptr + row * res_row + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * dx_row + col, dx, mask=inside)
        if AGAIN:
            tl.store(y_ptr + row * n + col, xr * w, mask=inside)


def rms_norm(x_MN: Tensor, weight_N: Tensor, eps: float, tail: int = 0) -> Tensor:
    """(M, N), in rows that have room for `tail` more numbers behind them. Rows of x may be parts of longer ones."""
    rows, n = x_MN.shape
    y_MN = roomy(rows, n, tail, x_MN)[:, :n]
    if on_gpu(x_MN):
        grid, sizes = tiles(rows, n)
        _forward_kernel[grid](x_MN, weight_N, y_MN, rows, n, x_MN.stride(0), y_MN.stride(0), eps, **sizes)
    else:
        y_MN.copy_(weight_N * normal(x_MN, eps)[0].to(x_MN.dtype))
    return y_MN


def rms_norm_backward(
    dy_MN: Tensor,
    x_MN: Tensor,
    weight_N: Tensor,
    eps: float,
    residual_MN: Tensor | None = None,
    tail: int = 0,
    again: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x (M, N), `residual_MN` added, in rows with room for `tail` more numbers; and `again`, y itself.

    Rows of the arguments may be parts of longer ones.
    """
    rows, n = x_MN.shape
    dx_MN = roomy(rows, n, tail, x_MN)[:, :n]
    y_MN = torch.empty(rows, n, device=x_MN.device, dtype=x_MN.dtype) if again else None
    if not on_gpu(x_MN):
        xr_MN, r_M1 = normal(x_MN, eps)
        wdy_MN = wide(weight_N) * wide(dy_MN)
        dx_MN.copy_(r_M1 * (wdy_MN - xr_MN * (wdy_MN * xr_MN).mean(-1, keepdim=True)))
        if residual_MN is not None:
            dx_MN += residual_MN
        return dx_MN, None if y_MN is None else y_MN.copy_(weight_N * xr_MN.to(x_MN.dtype))
    residual = dy_MN if residual_MN is None else residual_MN
    grid, sizes = tiles(rows, n)
    _backward_kernel[grid](
        dy_MN,
        x_MN,
        weight_N,
        residual,
        dx_MN,
        dx_MN if y_MN is None else y_MN,
        rows,
        n,
        dy_MN.stride(0),
        x_MN.stride(0),
        residual.stride(0),
        dx_MN.stride(0),
        eps,
        RESIDUAL=residual_MN is not None,
        AGAIN=again,
        **sizes,
    )
    return dx_MN, y_MN


def normal(x_MN: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x²) + eps) and 1 / sqrt(mean(x²) + eps), in float32 or wider."""
    x_MN = wide(x_MN)
    r_M1 = torch.rsqrt(x_MN.pow(2).mean(-1, keepdim=True) + eps)
    return x_MN * r_M1, r_M1


class RmsNorm(torch.autograd.Function):
    """A norm by itself, for any shape. Saves x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Same shape as `x`."""
        x_MN = x.reshape(-1, x.shape[-1])
        x_MN = x_MN if x_MN.stride(1) == 1 else x_MN.contiguous()
        ctx.save_for_backward(x_MN, weight)
        ctx.eps = eps
        return rms_norm(x_MN, weight, eps).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        x_MN, weight = ctx.saved_tensors
        dy_MN = grads[0].reshape(x_MN.shape)
        dy_MN = dy_MN if dy_MN.stride(-1) == 1 else dy_MN.contiguous()
        return rms_norm_backward(dy_MN, x_MN, weight, ctx.eps)[0].view(grads[0].shape), None, None

"""Elementwise work of a decoder layer in one pass each: Triton kernels on NVIDIA GPUs, plain torch elsewhere.

A frozen base makes these short: no gradient for norm weights or the head. Everything is computed in float32 and
rounded once. `HAVE_TRITON` decides; both ways give the same numbers to rounding, which the tests and the check before
each run hold (`train/loop/fused.py`).

    >>> h_TI = swiglu(gate_TI, up_TI)
"""

from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = torch.cuda.is_available()
except ImportError:  # the CPU build of torch has none
    HAVE_TRITON = False

if HAVE_TRITON:

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

    @triton.jit
    def _nf4_kernel(
        q_ptr,
        scale_ptr,
        code_ptr,
        outer_ptr,
        outer_code_ptr,
        offset,
        y_ptr,
        n,
        columns,
        y_row,
        BLOCKSIZE: tl.constexpr,
        OUTER: tl.constexpr,
        NESTED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = pair * 2 < n
        packed = tl.load(q_ptr + pair, mask=inside, other=0).to(tl.int32)
        block = pair * 2 // BLOCKSIZE
        if NESTED:
            index = tl.load(scale_ptr + block, mask=inside, other=0).to(tl.int32)
            outer = tl.load(outer_ptr + block // OUTER, mask=inside, other=0.0)
            scale = tl.load(outer_code_ptr + index) * outer + offset
        else:
            scale = tl.load(scale_ptr + block, mask=inside, other=0.0)
        first = tl.load(code_ptr + (packed >> 4)) * scale
        second = tl.load(code_ptr + (packed & 15)) * scale
        at = tl.program_id(0).to(tl.int64) * BLOCK * 2 + tl.arange(0, 2 * BLOCK)
        tl.store(y_ptr + (at // columns) * y_row + at % columns, tl.interleave(first, second), mask=at < n)

    @triton.jit
    def _rmsnorm_kernel(x_ptr, w_ptr, y_ptr, r_ptr, rows, n, y_row, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        col = tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (col < n)
        x = tl.load(x_ptr + row * n + col, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + col, mask=col < n, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / n + eps)
        tl.store(r_ptr + row, r, mask=row < rows)
        tl.store(y_ptr + row * y_row + col, x * r * w, mask=inside)

    @triton.jit
    def _rmsnorm_backward_kernel(dy_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, rows, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        col = tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (col < n)
        dy = tl.load(dy_ptr + row * n + col, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * n + col, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + col, mask=col < n, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row, mask=row < rows, other=0.0)
        wdy, xr = w * dy, x * r
        dx = r * (wdy - xr * (tl.sum(wdy * xr, axis=1)[:, None] / n))
        tl.store(dx_ptr + row * n + col, dx, mask=inside)

    @triton.jit
    def _rope_kernel(x_ptr, y_ptr, cos_ptr, sin_ptr, heads, x_row, sign, HALF: tl.constexpr, HEADS: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        col = tl.arange(0, HALF)[None, :]
        inside = (head < heads) & (col < HALF)
        cos = tl.load(cos_ptr + row * 2 * HALF + col).to(tl.float32)
        sin = tl.load(sin_ptr + row * 2 * HALF + col).to(tl.float32) * sign
        source = x_ptr + row * x_row + head * 2 * HALF + col
        target = y_ptr + row * heads * 2 * HALF + head * 2 * HALF + col
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, first * cos - second * sin, mask=inside)
        tl.store(target + HALF, second * cos + first * sin, mask=inside)

    @triton.jit
    def _cross_entropy_kernel(
        logits_ptr, target_ptr, loss_ptr, right_ptr, vocabulary, scale, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * vocabulary
        target = tl.load(target_ptr + row)
        top, total = float("-inf"), 0.0
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.load(logits_ptr + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
            new = tl.maximum(top, tl.max(z))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new))
            top = new
        wanted = tl.load(logits_ptr + target).to(tl.float32)
        lse = top + tl.log(total)
        tl.store(loss_ptr + row, lse - wanted)
        tl.store(right_ptr + row, (wanted >= top).to(tl.int32))
        if GRADIENT:
            tl.debug_barrier()  # every thread has read the wanted logit before it is overwritten
            for start in range(0, vocabulary, BLOCK):
                at = start + tl.arange(0, BLOCK)
                z = tl.load(logits_ptr + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
                p = tl.exp(z - lse) - tl.where(at == target, 1.0, 0.0)
                tl.store(logits_ptr + at, p * scale, mask=at < vocabulary)


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels take this tensor."""
    return HAVE_TRITON and tensor.is_cuda


def swiglu(gate_TI: torch.Tensor, up_TI: torch.Tensor, out_TI: torch.Tensor) -> None:
    """silu(gate) * up into `out`; rows may be parts of longer ones, gate's and up's of the same length."""
    if not on_gpu(gate_TI):
        torch.mul(torch.nn.functional.silu(gate_TI), up_TI, out=out_TI)
        return
    rows, n = gate_TI.shape
    grid = (rows, triton.cdiv(n, 2048))
    _swiglu_kernel[grid](gate_TI, up_TI, out_TI, n, gate_TI.stride(0), out_TI.stride(0), BLOCK=2048, num_warps=4)


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
    grid = (rows, triton.cdiv(n, 2048))
    _swiglu_backward_kernel[grid](dh_TI, gate_TI, up_TI, n, gate_TI.stride(0), dh_TI.stride(0), BLOCK=2048, num_warps=4)


def fill_nf4(out_OI: torch.Tensor, packed: torch.Tensor, state: Any) -> None:
    """Dequantise a bitsandbytes NF4 weight into `out`, whose rows may be parts of longer ones.

    Two numbers a byte, the high half first; a scale for each `blocksize` of them, which may itself be 8 bits with a
    scale for 256 and an offset (double quantisation; Dettmers et al., 2023).
    """
    nested, n = state.nested, out_OI.numel()
    outer = state.state2.absmax if nested else state.absmax
    outer_code = state.state2.code if nested else state.code
    _nf4_kernel[(triton.cdiv(n // 2, 1024),)](
        packed,
        state.absmax,
        state.code,
        outer,
        outer_code,
        float(offset_of(state)),
        out_OI,
        n,
        out_OI.shape[1],
        out_OI.stride(0),
        BLOCKSIZE=state.blocksize,
        OUTER=state.state2.blocksize if nested else 1,
        NESTED=nested,
        BLOCK=1024,
        num_warps=4,
    )


def offset_of(state: Any) -> float:
    """The offset of double-quantised scales, on the host: read from the GPU once."""
    if not state.nested:
        return 0.0
    if not hasattr(state, "offset_on_host"):
        state.offset_on_host = float(state.offset)
    return state.offset_on_host


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, for a frozen weight (Zhang & Sennrich, 2019)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, tail: int) -> torch.Tensor:
        """Same shape as `x`; saves x and one float32 a row. Behind each row there is room for `tail` more numbers."""
        n = x.shape[-1]
        x_MN = x.reshape(-1, n).contiguous()  # a slice of a wider product stays one through reshape
        rows = x_MN.shape[0]
        y_MN = torch.empty(rows, n + tail, device=x.device, dtype=x.dtype)[:, :n]
        if on_gpu(x):
            r_M1 = torch.empty(rows, 1, device=x.device, dtype=torch.float32)
            grid, sizes = tiles(rows, n)
            _rmsnorm_kernel[grid](x_MN, weight, y_MN, r_M1, rows, n, n + tail, eps, **sizes)
        else:
            r_M1 = torch.rsqrt(x_MN.float().pow(2).mean(-1, keepdim=True) + eps)
            y_MN.copy_(weight * (x_MN.float() * r_M1).to(x.dtype))
        ctx.save_for_backward(x_MN, weight, r_M1)
        return y_MN.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The gradient of x."""
        x_MN, weight, r_M1 = ctx.saved_tensors
        dy_MN = grads[0].reshape(x_MN.shape).contiguous()
        rows, n = x_MN.shape
        if on_gpu(x_MN):
            dx_MN = torch.empty_like(x_MN)
            grid, sizes = tiles(rows, n)
            _rmsnorm_backward_kernel[grid](dy_MN, x_MN, weight, r_M1, dx_MN, rows, n, **sizes)
        else:
            wdy_MN, xr_MN = weight.float() * dy_MN.float(), x_MN.float() * r_M1
            dx_MN = r_M1 * (wdy_MN - xr_MN * (wdy_MN * xr_MN).mean(-1, keepdim=True))
        return dx_MN.to(x_MN.dtype).view(grads[0].shape), None, None, None


def tiles(rows: int, n: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and block sizes for a kernel over rows of n numbers: wide rows one a program, heads several."""
    block = triton.next_power_of_2(n)
    many = max(1, 2048 // block)
    warps = 4 if block * many <= 2048 else 8 if block <= 4096 else 16
    return (triton.cdiv(rows, many),), {"ROWS": many, "BLOCK": block, "num_warps": warps}


class Rope(torch.autograd.Function):
    """Rotary embedding of q or k over the whole head, halves convention (Su et al., 2021; GPT-NeoX layout)."""

    @staticmethod
    def forward(ctx: Any, x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        """Shape (T, heads, D); saves cos and sin alone."""
        ctx.save_for_backward(cos_TD, sin_TD)
        return rotate(x_TND, cos_TD, sin_TD, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The rotation back."""
        cos_TD, sin_TD = ctx.saved_tensors
        return rotate(grads[0], cos_TD, sin_TD, -1.0), None, None


def rotate(x_TND: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, sign: float) -> torch.Tensor:
    """x·cos + rotate_half(x)·sin·sign, shape (T, heads, D)."""
    length, heads, size = x_TND.shape
    if on_gpu(x_TND) and size & (size - 1) == 0 and cos_TD.shape[1] == size:
        x_TND = x_TND if x_TND.stride(2) == 1 and x_TND.stride(1) == size else x_TND.contiguous()
        y_TND = torch.empty(x_TND.shape, device=x_TND.device, dtype=x_TND.dtype)
        block = min(triton.next_power_of_2(heads), max(1, 4096 // size))
        grid = (length, triton.cdiv(heads, block))
        _rope_kernel[grid](
            x_TND, y_TND, cos_TD, sin_TD, heads, x_TND.stride(0), sign, HALF=size // 2, HEADS=block, num_warps=4
        )
        return y_TND
    first, second = x_TND.chunk(2, dim=-1)
    turned_TND = torch.cat((-second, first), dim=-1)
    return x_TND * cos_TD[:, None] + turned_TND * (sin_TD * sign)[:, None]


def cross_entropy(
    logits_KV: torch.Tensor, targets_K: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses in nats (K, float32), whether the target has the highest logit (K), scale · d loss / d logits (K, V).

    The gradient overwrites the logits on a GPU; with a scale of None the third result means nothing.
    """
    if on_gpu(logits_KV):
        count, vocabulary = logits_KV.shape
        losses_K = torch.empty(count, device=logits_KV.device, dtype=torch.float32)
        right_K = torch.empty(count, device=logits_KV.device, dtype=torch.int32)
        _cross_entropy_kernel[(count,)](
            logits_KV,
            targets_K,
            losses_K,
            right_K,
            vocabulary,
            scale or 0.0,
            GRADIENT=scale is not None,
            BLOCK=8192,
            num_warps=16,
        )
        return losses_K, right_K, logits_KV
    logits_KV = logits_KV.float()
    at_K1 = targets_K[:, None]
    log_p_KV = logits_KV.log_softmax(-1)
    losses_K = -log_p_KV.gather(1, at_K1).squeeze(1)
    right_K = logits_KV.argmax(-1) == targets_K
    if scale is not None:
        log_p_KV.exp_().scatter_add_(1, at_K1, torch.full_like(at_K1, -1, dtype=log_p_KV.dtype)).mul_(scale)
    return losses_K, right_K, log_p_KV

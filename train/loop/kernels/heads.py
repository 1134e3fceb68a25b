"""Queries, keys and values out of one product, and their gradients back into one.

A product of a layer's input with all three weights has rows q | k | v. Queries and keys are normalised by head where
the model does that (Qwen3) and rotated (Su et al., 2021; the halves convention of GPT-NeoX) in one pass; the way back
writes the three gradients side by side, as the products behind it read them.

    >>> q_TND, k_TMD, v_TMD = split_heads(qkv_TW, heads, cos_TD, sin_TD)
    >>> join_heads(dq_TND, dk_TMD, dv_TMD, qkv_TW, heads, cos_TD, sin_TD, out_TW)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraport.train.loop.kernels.gpu import HAVE_TRITON, on_gpu, wide
from loraport.train.loop.kernels.norm import rms_norm, rms_norm_backward

if HAVE_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _split_kernel(
        x_ptr,
        q_ptr,
        k_ptr,
        cos_ptr,
        sin_ptr,
        wq_ptr,
        wk_ptr,
        queries,
        keys,
        x_row,
        q_row,
        k_row,
        eps,
        NORM: tl.constexpr,
        HALF: tl.constexpr,
        HEADS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        col = tl.arange(0, HALF)[None, :]
        is_query, inside = head < queries, head < queries + keys
        cos = tl.load(cos_ptr + row * 2 * HALF + col).to(tl.float32)
        sin = tl.load(sin_ptr + row * 2 * HALF + col).to(tl.float32)
        source = x_ptr + row * x_row + head * 2 * HALF + col
        first = tl.load(source, mask=inside & (col < HALF), other=0.0).to(tl.float32)
        second = tl.load(source + HALF, mask=inside & (col < HALF), other=0.0).to(tl.float32)
        if NORM:
            total = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
            r = tl.rsqrt(total / (2 * HALF) + eps)[:, None]
            first *= r * tl.where(is_query, tl.load(wq_ptr + col), tl.load(wk_ptr + col)).to(tl.float32)
            second *= r * tl.where(is_query, tl.load(wq_ptr + HALF + col), tl.load(wk_ptr + HALF + col)).to(tl.float32)
        q_at = q_ptr + row * q_row + head * 2 * HALF + col
        k_at = k_ptr + row * k_row + (head - queries) * 2 * HALF + col
        tl.store(q_at, first * cos - second * sin, mask=is_query & (col < HALF))
        tl.store(q_at + HALF, second * cos + first * sin, mask=is_query & (col < HALF))
        tl.store(k_at, first * cos - second * sin, mask=inside & (head >= queries) & (col < HALF))
        tl.store(k_at + HALF, second * cos + first * sin, mask=inside & (head >= queries) & (col < HALF))

    @triton.jit
    def _join_kernel(
        dq_ptr,
        dk_ptr,
        dv_ptr,
        x_ptr,
        y_ptr,
        cos_ptr,
        sin_ptr,
        wq_ptr,
        wk_ptr,
        queries,
        keys,
        x_row,
        y_row,
        dq_row,
        dk_row,
        dv_row,
        eps,
        NORM: tl.constexpr,
        HALF: tl.constexpr,
        HEADS: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        col = tl.arange(0, HALF)[None, :]
        all_ = col < HALF
        is_query, turns = (head < queries) & all_, (head < queries + keys) & all_
        is_key = turns & (head >= queries)
        is_value = (head >= queries + keys) & (head < queries + 2 * keys) & all_
        dq = dq_ptr + row * dq_row + head * 2 * HALF + col
        dk = dk_ptr + row * dk_row + (head - queries) * 2 * HALF + col
        dv = dv_ptr + row * dv_row + (head - queries - keys) * 2 * HALF + col
        a = tl.load(dq, mask=is_query, other=0.0).to(tl.float32)
        b = tl.load(dq + HALF, mask=is_query, other=0.0).to(tl.float32)
        a += tl.load(dk, mask=is_key, other=0.0).to(tl.float32)
        b += tl.load(dk + HALF, mask=is_key, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + row * 2 * HALF + col).to(tl.float32)
        sin = tl.load(sin_ptr + row * 2 * HALF + col).to(tl.float32)
        first, second = a * cos + b * sin, b * cos - a * sin
        if NORM:
            source = x_ptr + row * x_row + head * 2 * HALF + col
            x1 = tl.load(source, mask=turns, other=0.0).to(tl.float32)
            x2 = tl.load(source + HALF, mask=turns, other=0.0).to(tl.float32)
            r = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)[:, None]
            x1 *= r
            x2 *= r
            first *= tl.where(head < queries, tl.load(wq_ptr + col), tl.load(wk_ptr + col)).to(tl.float32)
            second *= tl.where(head < queries, tl.load(wq_ptr + HALF + col), tl.load(wk_ptr + HALF + col)).to(
                tl.float32
            )
            mean = ((tl.sum(first * x1, axis=1) + tl.sum(second * x2, axis=1)) / (2 * HALF))[:, None]
            first = r * (first - x1 * mean)
            second = r * (second - x2 * mean)
        first += tl.load(dv, mask=is_value, other=0.0).to(tl.float32)
        second += tl.load(dv + HALF, mask=is_value, other=0.0).to(tl.float32)
        target = y_ptr + row * y_row + head * 2 * HALF + col
        tl.store(target, first, mask=turns | is_value)
        tl.store(target + HALF, second, mask=turns | is_value)


@dataclass(frozen=True)
class Heads:
    """`queries` and `keys`: numbers of heads; `size`: D. With norms of queries and keys: their weights (D) and eps."""

    queries: int
    keys: int
    size: int
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 0.0

    @property
    def parts(self) -> tuple[slice, slice, slice]:
        """Where q, k and v stand in a row of the product."""
        q, k = self.queries * self.size, (self.queries + self.keys) * self.size
        return slice(0, q), slice(q, k), slice(k, k + self.keys * self.size)


def by_triton(heads: Heads, cos_TD: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take them: heads of 2ⁿ numbers that are rotated whole."""
    size = heads.size
    return on_gpu(cos_TD) and size & (size - 1) == 0 and cos_TD.shape[1] == size and cos_TD.is_contiguous()


def split_heads(qkv_TW: Tensor, heads: Heads, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (T, N, D), k and v (T, M, D), ready for attention. Without norms q and k are turned where they stand."""
    length = qkv_TW.shape[0]
    q_TND, k_TMD, v_TMD = (qkv_TW[:, part].view(length, -1, heads.size) for part in heads.parts)
    into = (q_TND, k_TMD) if heads.q_weight is None else (new(q_TND), new(k_TMD))
    if by_triton(heads, cos_TD):
        weights = (heads.q_weight, heads.k_weight) if heads.q_weight is not None else (cos_TD, cos_TD)
        block = block_of(heads, heads.queries + heads.keys)
        _split_kernel[(length, triton.cdiv(heads.queries + heads.keys, block))](
            qkv_TW,
            *into,
            cos_TD,
            sin_TD,
            *weights,
            heads.queries,
            heads.keys,
            qkv_TW.stride(0),
            into[0].stride(0),
            into[1].stride(0),
            heads.eps,
            NORM=heads.q_weight is not None,
            HALF=heads.size // 2,
            HEADS=block,
            num_warps=4,
        )
        return *into, v_TMD
    for given, weight, result in ((q_TND, heads.q_weight, into[0]), (k_TMD, heads.k_weight, into[1])):
        if weight is not None:
            given = rms_norm(given.reshape(-1, heads.size), weight, heads.eps).view(given.shape)
        result.copy_(rotate(given, cos_TD, sin_TD))
    return *into, v_TMD


def join_heads(
    dq_TND: Tensor,
    dk_TMD: Tensor,
    dv_TMD: Tensor,
    qkv_TW: Tensor,
    heads: Heads,
    cos_TD: Tensor,
    sin_TD: Tensor,
    out_TW: Tensor,
) -> None:
    """The gradients of what `split_heads` gave, as gradients of the product's rows, into `out`.

    `qkv_TW` is the product as it was; it is read where there are norms.
    """
    length = qkv_TW.shape[0]
    grads = tuple(packed(each, heads.size) for each in (dq_TND, dk_TMD, dv_TMD))
    if by_triton(heads, cos_TD):
        weights = (heads.q_weight, heads.k_weight) if heads.q_weight is not None else (cos_TD, cos_TD)
        block = block_of(heads, heads.queries + 2 * heads.keys)
        _join_kernel[(length, triton.cdiv(heads.queries + 2 * heads.keys, block))](
            *grads,
            qkv_TW,
            out_TW,
            cos_TD,
            sin_TD,
            *weights,
            heads.queries,
            heads.keys,
            qkv_TW.stride(0),
            out_TW.stride(0),
            *(each.stride(0) for each in grads),
            heads.eps,
            NORM=heads.q_weight is not None,
            HALF=heads.size // 2,
            HEADS=block,
            num_warps=4,
        )
        return
    q_part, k_part, v_part = heads.parts
    for grad, weight, part in ((grads[0], heads.q_weight, q_part), (grads[1], heads.k_weight, k_part)):
        turned = rotate(grad, cos_TD, -sin_TD)
        if weight is not None:
            flat = turned.reshape(-1, heads.size)
            turned, _ = rms_norm_backward(flat, qkv_TW[:, part].reshape(-1, heads.size), weight, heads.eps)
        out_TW[:, part] = turned.reshape(length, -1)
    out_TW[:, v_part] = grads[2].reshape(length, -1)


def block_of(heads: Heads, count: int) -> int:
    """Heads that one program takes."""
    return min(triton.next_power_of_2(count), max(1, 4096 // heads.size))


def new(like: Tensor) -> Tensor:
    """An empty tensor of this shape, contiguous."""
    return torch.empty(like.shape, device=like.device, dtype=like.dtype)


def packed(x_TND: Tensor, size: int) -> Tensor:
    """x with its heads behind each other in each row."""
    return x_TND if x_TND.stride(2) == 1 and x_TND.stride(1) == size else x_TND.contiguous()


def rotate(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin, shape (T, heads, D)."""
    x, cos_TD, sin_TD = (wide(each) for each in (x_TND, cos_TD, sin_TD))
    first, second = x.chunk(2, dim=-1)
    return (x * cos_TD[:, None] + torch.cat((-second, first), dim=-1) * sin_TD[:, None]).to(x_TND.dtype)

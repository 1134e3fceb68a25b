"""Weights in bitsandbytes' NF4 brought to 16 bits, into rows that may be parts of longer ones.

>>> fill_nf4(wide[:, :inputs], layer.weight.data, layer.weight.quant_state)
"""

from typing import Any

import torch

from loraport.train.loop.kernels.gpu import HAVE_TRITON

if HAVE_TRITON:
    import triton
    import triton.language as tl

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

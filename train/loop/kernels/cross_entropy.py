"""Cross entropy of a chunk of logits, whose gradient takes their place.

>>> losses_K, right_K, gradient_KV = cross_entropy(logits_KV, targets_K, 1 / count)
"""

import torch

from loraport.train.loop.kernels.gpu import HAVE_TRITON, on_gpu

if HAVE_TRITON:
    import triton
    import triton.language as tl

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

"""The loss: cross entropy over the frozen head, at trained positions only, in chunks.

The stock path makes logits of every position and their gradient in float32: about 12 bytes × vocabulary × tokens. Here
the head is applied to a chunk of trained positions at a time, and because it is frozen the gradient of the hidden
states is made at once: nothing of vocabulary size outlives a chunk. The idea is Liger's fused linear cross entropy
(Hsu et al., 2024).

    >>> with_loss(model)                                       # a PeftModel
    >>> model(input_ids=ids_1T, position_ids=at_1T, positions=at_K, targets=next_K, **documents.kwargs())
    (tensor(103.2), tensor(17))                                # nats summed over K targets; how many were the likeliest
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from loraport.train.loop.groups import dense
from loraport.train.loop.kernels.cross_entropy import cross_entropy

CHUNK_LOGITS = 2**26  # logits made at once; 134 MB in 16 bits


class HeadLoss(torch.autograd.Function):
    """Cross entropies of a frozen linear head, and how many targets were the likeliest token."""

    @staticmethod
    def forward(
        ctx: Any, hidden_KH: Tensor, head: Any, targets_K: Tensor, scale: float, learning: bool
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses times `scale`. Saves the gradient of `hidden_KH`, nothing else."""
        weight_VH = dense(head, hidden_KH.dtype)
        rows = max(1, CHUNK_LOGITS // weight_VH.shape[0])
        gradient_KH = torch.empty_like(hidden_KH) if learning else None
        # float16 would lose the small numbers that 1 / targets makes: there the scale is left to the backward pass.
        early, ctx.late = (1.0, scale) if hidden_KH.dtype == torch.float16 else (scale, 1.0)
        total = torch.zeros((), device=hidden_KH.device, dtype=torch.float32)
        right = torch.zeros((), device=hidden_KH.device, dtype=torch.int64)
        for start in range(0, len(targets_K), rows):
            part = slice(start, start + rows)
            logits_KV = torch.nn.functional.linear(hidden_KH[part], weight_VH, head.bias)
            losses_K, right_K, dlogits_KV = cross_entropy(logits_KV, targets_K[part], early if learning else None)
            total += losses_K.sum()
            right += right_K.sum()
            if gradient_KH is not None:
                torch.mm(dlogits_KV.to(hidden_KH.dtype), weight_VH, out=gradient_KH[part])
            del logits_KV, dlogits_KV  # before the next ones are made
        ctx.save_for_backward(gradient_KH)
        ctx.mark_non_differentiable(right)
        return total * scale, right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient that was made in the forward pass, scaled by what came since (a loss scaler's power of two)."""
        (gradient_KH,) = ctx.saved_tensors
        if gradient_KH.dtype == torch.float16:
            gradient_KH = (gradient_KH.float() * (grads[0] * ctx.late)).half()
        else:
            gradient_KH = gradient_KH * grads[0].to(gradient_KH.dtype)
        return gradient_KH, None, None, None, None


def with_loss(model: Any, packed: bool = True, own_head: bool = True) -> None:
    """Let the causal language model inside a PeftModel return `(loss, right)` when it is given `targets`.

    Inside, not around: DistributedDataParallel and FSDP have to see one call of the module they wrap. `packed` passes
    the documents on to the attention; without `own_head` the logits are the model's own, for models that do more than
    a product there (soft caps, scales).
    """
    causal = model.get_base_model()
    own_forward = causal.forward

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        scale: float = 1.0,
        cu_seq_lens_q: Any = None,
        cu_seq_lens_k: Any = None,
        **kwargs: Any,
    ) -> Any:
        if targets is None or positions is None:
            return own_forward(input_ids=input_ids, **kwargs)
        if packed:
            kwargs |= {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        kwargs |= {"input_ids": input_ids, "use_cache": False}
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT fills in its defaults
        if not own_head:
            logits_KV = own_forward(logits_to_keep=positions, **kwargs).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits_KV, targets, reduction="sum") * scale
            return loss, (logits_KV.argmax(-1) == targets).sum()
        body = getattr(self, self.base_model_prefix)
        hidden_KH = body(**kwargs).last_hidden_state[0].index_select(0, positions)
        return HeadLoss.apply(hidden_KH, self.get_output_embeddings(), targets, scale, torch.is_grad_enabled())

    causal.forward = MethodType(forward, causal)


def without_loss(model: Any) -> None:
    """Give the model its own forward back."""
    model.get_base_model().__dict__.pop("forward", None)

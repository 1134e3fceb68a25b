"""The loss: cross entropy over the frozen head, at trained positions only, in chunks.

The stock path makes logits of every position and their gradient in float32: about 12 bytes × vocabulary × tokens. Here
the head is applied to a chunk of trained positions at a time, and because it is frozen the gradient of the hidden
states is made at once: nothing of vocabulary size outlives a chunk. The idea is Liger's fused linear cross entropy
(Hsu et al., 2024). Where a loss needs the log-probability of each document (dpo.py), its gradient is made in the same
way and scaled by document in the backward pass, when it is known what each is worth.

    >>> with_loss(model)                                       # a PeftModel
    >>> model(input_ids=ids_1T, position_ids=at_1T, positions=at_K, targets=next_K, **documents.kwargs())
    (tensor(103.2), tensor(17))                                # nats summed over K targets; how many were the likeliest
"""

from collections.abc import Iterator
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
        gradient_KH = torch.empty_like(hidden_KH) if learning else None
        # float16 would lose the small numbers that 1 / targets makes: there the scale is left to the backward pass.
        early, ctx.late = (1.0, scale) if hidden_KH.dtype == torch.float16 else (scale, 1.0)
        total = torch.zeros((), device=hidden_KH.device, dtype=torch.float32)
        right = torch.zeros((), device=hidden_KH.device, dtype=torch.int64)
        for _, losses_K, right_K in in_chunks(hidden_KH, head, targets_K, early, gradient_KH):
            total += losses_K.sum()
            right += right_K.sum()
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


class HeadLogProbs(torch.autograd.Function):
    """Log-probabilities of documents: of the `counts` targets that each of D has, one after the other, summed."""

    @staticmethod
    def forward(
        ctx: Any, hidden_KH: Tensor, head: Any, targets_K: Tensor, counts: tuple[int, ...], learning: bool
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (D) in nats, float32, and how many targets were the likeliest (D)."""
        gradient_KH = torch.empty_like(hidden_KH) if learning else None
        logps_K = torch.empty(len(targets_K), device=hidden_KH.device, dtype=torch.float32)
        right_K = torch.empty(len(targets_K), device=hidden_KH.device, dtype=torch.float32)
        for part, losses_K, hits_K in in_chunks(hidden_KH, head, targets_K, -1.0, gradient_KH):
            logps_K[part] = -losses_K
            right_K[part] = hits_K.float()
        ctx.save_for_backward(gradient_KH)
        ctx.counts = counts
        right_D = by_document(right_K, counts)
        ctx.mark_non_differentiable(right_D)
        return by_document(logps_K, counts), right_D

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient that was made in the forward pass, times what came since for each document."""
        (gradient_KH,) = ctx.saved_tensors
        counts_D = torch.tensor(ctx.counts, device=gradient_KH.device)
        scale_K1 = grads[0].repeat_interleave(counts_D, output_size=len(gradient_KH))[:, None]
        scaled_KH = torch.empty_like(gradient_KH)
        rows = max(1, CHUNK_LOGITS // (4 * max(1, gradient_KH.shape[-1])))
        for start in range(0, len(gradient_KH), rows):  # the product is in float32
            part = slice(start, start + rows)
            scaled_KH[part] = gradient_KH[part] * scale_K1[part]
        return scaled_KH, None, None, None, None


def in_chunks(
    hidden_KH: Tensor, head: Any, targets_K: Tensor, scale: float, gradient_KH: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Targets a chunk at a time: which, their losses in nats, and whether each was the likeliest token.

    The gradient of the losses times `scale` is written to `gradient_KH`, if there is one.
    """
    weight_VH = dense(head, hidden_KH.dtype)
    rows = max(1, CHUNK_LOGITS // weight_VH.shape[0])
    for start in range(0, len(targets_K), rows):
        part = slice(start, start + rows)
        logits_KV = torch.nn.functional.linear(hidden_KH[part], weight_VH, head.bias)
        given = scale if gradient_KH is not None else None
        losses_K, right_K, dlogits_KV = cross_entropy(logits_KV, targets_K[part], given)
        if gradient_KH is not None:
            torch.mm(dlogits_KV.to(hidden_KH.dtype), weight_VH, out=gradient_KH[part])
        del logits_KV, dlogits_KV  # before the next ones are made
        yield part, losses_K, right_K


def by_document(values_K: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Sums (D) of so many values each; in the same order each time, unlike an atomic sum on a GPU."""
    return torch.stack([part.sum() for part in values_K.split(list(counts))])


def with_loss(model: Any, packed: bool = True, own_head: bool = True) -> None:
    """Let the causal language model inside a PeftModel return `(loss, right)` when it is given `targets`.

    With `counts`, how many of them each document has, it is `(logps_D, right_D)`, a figure for each document.

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
        counts: tuple[int, ...] | None = None,
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
            if counts is not None:
                logps_K = -torch.nn.functional.cross_entropy(logits_KV, targets, reduction="none")
                hits_K = (logits_KV.argmax(-1) == targets).float()
                return by_document(logps_K, counts), by_document(hits_K, counts)
            loss = torch.nn.functional.cross_entropy(logits_KV, targets, reduction="sum") * scale
            return loss, (logits_KV.argmax(-1) == targets).sum()
        body = getattr(self, self.base_model_prefix)
        hidden_KH = body(**kwargs).last_hidden_state[0].index_select(0, positions)
        if counts is not None:
            head = self.get_output_embeddings()
            return HeadLogProbs.apply(hidden_KH, head, targets, counts, torch.is_grad_enabled())
        return HeadLoss.apply(hidden_KH, self.get_output_embeddings(), targets, scale, torch.is_grad_enabled())

    causal.forward = MethodType(forward, causal)


def without_loss(model: Any) -> None:
    """Give the model its own forward back."""
    model.get_base_model().__dict__.pop("forward", None)

"""Attention over packed documents: no token sees another document, no mask is built, no extra wheel is needed.

A micro-step is one sequence (1, T) of documents one behind the other. On GPUs since Ampere they go to PyTorch's own
flash attention with document boundaries, and documents of one length to cuDNN's, which is faster on Hopper; elsewhere
each document goes through SDPA by itself.

    >>> with packed(model):                       # transformers' modules call `attend` from here on
    ...     model(input_ids=ids_1T, position_ids=at_1T, **documents.kwargs())
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "loraport"
DENSE_STEP = 512  # cuDNN plans each new shape once, which takes tens of milliseconds: lone documents are of any length
# What a module may pass to `attend` without wanting anything of it; whatever else it passes changes what it computes.
HARMLESS = {"position_ids", "dropout", "is_causal", "use_cache", "logits_to_keep", "max_length_q", "max_length_k"} | {
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro-step lie: `bounds` (N + 1, int32, on the device), `lengths` on the host."""

    bounds: Tensor
    lengths: tuple[int, ...]

    def kwargs(self) -> dict[str, Any]:
        """As transformers passes them through a model, under the names of its FlashAttentionKwargs."""
        return {"cu_seq_lens_q": self.bounds, "cu_seq_lens_k": self.lengths}

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> "Documents":
        """From the keyword arguments that arrive at an attention module."""
        return cls(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])


def packed_attention(
    q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    """Causal attention within each document, shape (T, N, D); M key heads serve N query heads in groups."""
    longest = max(documents.lengths)
    window = window if window and window < longest else None
    if not flash(q_TND):
        return by_document(q_TND, k_TMD, v_TMD, documents, scale, window)
    if window is None and hopper(q_TND) and alike(documents.lengths):
        return dense(q_TND, k_TMD, v_TMD, len(documents.lengths), scale)
    return torch.ops.aten._flash_attention_forward(
        q_TND,
        k_TMD,
        v_TMD,
        documents.bounds,
        documents.bounds,
        longest,
        longest,
        0.0,
        True,
        return_debug_mask=False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )[0]


def flash(tensor: Tensor) -> bool:
    """Whether flash attention takes this tensor: 16 bits, on Ampere or newer."""
    return tensor.is_cuda and tensor.dtype != torch.float32 and capability(tensor)[0] >= 8


def hopper(tensor: Tensor) -> bool:
    """Whether it lies on a GPU for which cuDNN's attention was measured to be the faster one."""
    return capability(tensor)[0] == 9


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of the tensor's GPU."""
    return torch.cuda.get_device_capability(tensor.device)


def alike(lengths: tuple[int, ...]) -> bool:
    """Whether cuDNN takes documents of these lengths as a batch: all equal, in a shape that comes again."""
    return len(set(lengths)) == 1 and (len(lengths) > 1 or lengths[0] % DENSE_STEP == 0)


def dense(q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, count: int, scale: float) -> Tensor:
    """cuDNN on `count` documents of one length."""

    def batch(x: Tensor) -> Tensor:
        return x.view(count, -1, *x.shape[1:]).transpose(1, 2)

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        out_BNLD = scaled_dot_product_attention(
            batch(q_TND), batch(k_TMD), batch(v_TMD), is_causal=True, scale=scale, enable_gqa=True
        )
    return out_BNLD.transpose(1, 2).reshape(q_TND.shape)


def by_document(
    q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    """SDPA on one document after the other."""
    out = []
    for q, k, v in zip(*(x.split(documents.lengths) for x in (q_TND, k_TMD, v_TMD)), strict=True):
        mask = None
        if window and window < len(q):
            distance = torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(q), device=q.device)
            mask = (distance >= 0) & (distance < window)
        heads = q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        grouped = q.shape[1] != k.shape[1]
        mixed = scaled_dot_product_attention(
            heads[0], heads[1], heads[2], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        out.append(mixed[0].transpose(0, 1))
    return torch.cat(out)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, heads, T, D) in, (1, T, heads, D) out.

    Raises ValueError for what it cannot do: masks, soft caps, sinks, position biases, attention to later tokens.
    """
    asked = {name for name, value in kwargs.items() if value is not None} - HARMLESS
    causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
    if asked or attention_mask is not None or not causal:
        raise ValueError(f"packed attention cannot do what {type(module).__name__} asks for: {sorted(asked)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_TND, k_TMD, v_TMD = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    return packed_attention(q_TND, k_TMD, v_TMD, Documents.of(kwargs), scale, sliding_window)[None], None


def no_mask(*_: Any, **__: Any) -> None:
    """Boundaries take the place of masks."""


@contextlib.contextmanager
def packed(model: Any) -> Iterator[None]:
    """While it lasts, the model's attention is `attend`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, no_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)

"""Decoder layers that keep less and move less: LoRA linears, the gated MLP, norms and rotary embeddings as autograd
functions of our own, put in place of the forwards of transformers and PEFT.

The modules, their parameters and what is saved stay PEFT's; `fuse` replaces instance methods and `unfuse` takes them
away again, so that golden replies come from PEFT's own code. Linears with the same input (q, k, v; gate, up) are one
group (`train/loop/groups.py`). Kept for the backward pass: of a group its input and x·A; of the MLP its input, gate and
up (the product is made again).

Whatever is not recognised keeps its own forward. Before a run, `train/loop/ways.py` compares the whole with the forward
of transformers and PEFT on a few tokens.

    >>> fuse(model)       # a PeftModel; returns how many modules were replaced
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from loraport.train.loop.attention import Documents, packed_attention
from loraport.train.loop.groups import LINEARS, Group
from loraport.train.loop.kernels import RmsNorm, Rope, swiglu, swiglu_backward

# Attention modules that do nothing but project, normalise heads, rotate, attend and project.
PLAIN_ATTENTION = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
CODE = ("co_code", "co_consts", "co_names")
GROUPS_OF = "linear_groups"  # where a module keeps its groups; convolutions have a number called `groups`


def fuse(model: Any) -> int:
    """Replace the forwards of what is recognised in a PeftModel; returns how many were."""
    replaced = 0
    for module in model.modules():
        forward = recognise(module)
        if forward:
            module.forward = MethodType(forward, module)
            replaced += 1
    for module in model.modules():
        if same_code(module, LlamaDecoderLayer):
            make_room(module)
    return replaced


def make_room(layer: Any) -> None:
    """Have the norms of a Llama-like layer leave room behind their rows for the x·A of the group that reads them."""
    for norm, reader in ((layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)):
        if is_fused(norm) and is_fused(reader):
            norm.__dict__["tail"] = members_of(reader)[0].rank


def is_fused(module: Any) -> bool:
    """Whether a module's forward is one of ours now."""
    return getattr(module.__dict__.get("forward"), "__func__", None) in FORWARDS


def unfuse(model: Any) -> None:
    """Give all modules their own forwards back."""
    for module in model.modules():
        if is_fused(module):
            del module.forward
            module.__dict__.pop("tail", None)


def forget(model: Any) -> None:
    """Have the copies of the adapters made anew: optimisers outside of torch change them behind autograd's back."""
    for module in model.modules():
        for group in module.__dict__.get(GROUPS_OF, ()):
            group.forget()


def recognise(module: Any) -> Any:
    """The forward that can stand for that of `module`, or None."""
    if is_swiglu(module):
        return forward_mlp
    if type(module).__name__ in PLAIN_ATTENTION:
        return forward_attention
    if hasattr(module, "lora_A") and type(getattr(module, "base_layer", None)).__name__ in LINEARS:
        return forward_linear
    return forward_norm if same_code(module, LlamaRMSNorm) and not module.weight.requires_grad else None


def same_code(module: Any, known: type) -> bool:
    """Whether a module computes what a class of transformers computes, by the compiled code of its forward.

    Names and attributes do not tell: FalconH1MLP scales its gate, GptOssRMSNorm rounds elsewhere.
    """
    ours, theirs = (getattr(each.forward, "__code__", None) for each in (type(module), known))  # type: ignore[attr-defined]
    return ours is not None and all(getattr(ours, part) == getattr(theirs, part) for part in CODE)


def is_swiglu(module: Any) -> bool:
    """Whether it is Llama's MLP: down(silu(gate(x)) * up(x))."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(part is None for part in parts):
        return False
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    linears = all(type(getattr(part, "base_layer", part)).__name__ in LINEARS for part in parts)
    return silu and linears and same_code(module, LlamaMLP)


class LoraLinears(torch.autograd.Function):
    """A group on one input. Saves the input, x·A and, with dropout, its mask."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, group: Group, *_: Tensor | None) -> tuple[Tensor, ...]:
        """x (T, in) to n times y (T, out). `group.pairs` come as arguments too, for autograd to see them."""
        mask_TI = group.mask(x_TI)
        y_TO, thin_TR = group.forward(x_TI, mask_TI)
        ctx.save_for_backward(x_TI, thin_TR, mask_TI)
        ctx.group = group
        return tuple(y_TO[:, row] for row in group.rows)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, and of each A and B."""
        x_TI, thin_TR, mask_TI = ctx.saved_tensors
        group = ctx.group
        dx_TI, grads = group.backward(beside(dys, group), x_TI, thin_TR, mask_TI, ctx.needs_input_grad[0])
        return dx_TI, None, *grads


def beside(dys: tuple[Tensor, ...], group: Group) -> Tensor:
    """The gradients of a group's outputs side by side, with room behind them: (T, out + R)."""
    dy_TW = torch.empty(len(dys[0]), group.outputs + group.rank, device=dys[0].device, dtype=dys[0].dtype)
    for row, dy_TO in zip(group.rows, dys, strict=True):
        dy_TW[:, row] = dy_TO
    return dy_TW


class LoraSwiglu(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) with adapters on any of the three. Saves x, gate, up and the x·A."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, wide: Group, down: Group, *_: Tensor | None) -> Tensor:
        """x (T, H) to y (T, H); `wide` holds gate and up."""
        length, inner, like = len(x_TH), down.inputs, {"device": x_TH.device, "dtype": x_TH.dtype}
        mask_TH = wide.mask(x_TH)
        both_TW = torch.empty(length, wide.outputs + wide.rank, **like)  # their gradients will need the room
        _, wide_thin = wide.forward(x_TH, mask_TH, both_TW[:, : wide.outputs])
        h_TI = torch.empty(length, inner + down.rank, **like)[:, :inner]
        swiglu(both_TW[:, :inner], both_TW[:, inner : 2 * inner], h_TI)
        mask_TI = down.mask(h_TI)
        y_TH, down_thin = down.forward(h_TI, mask_TI)
        down_thin = None if down_thin is None else down_thin.clone()  # not to keep h, behind which it lies
        ctx.save_for_backward(x_TH, both_TW, wide_thin, down_thin, mask_TH, mask_TI)
        ctx.groups = wide, down
        return y_TH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the six matrices."""
        x_TH, both_TW, wide_thin, down_thin, mask_TH, mask_TI = ctx.saved_tensors
        wide, down = ctx.groups
        inner = down.inputs
        dy_TW = beside(grads, down)
        down.thin_gradient(dy_TW)
        h_TI = down.input_gradient(dy_TW, mask_TI)
        # The gradient of h becomes h, those of gate and up take their places.
        swiglu_backward(h_TI, both_TW[:, :inner], both_TW[:, inner : 2 * inner])
        down_grads = down.weight_gradients(dy_TW, h_TI, down_thin, mask_TI)
        del h_TI, dy_TW
        dx_TH, wide_grads = wide.backward(both_TW, x_TH, wide_thin, mask_TH, ctx.needs_input_grad[0])
        return dx_TH, None, None, *wide_grads, *down_grads


def members_of(module: Any) -> list[Group]:
    """The groups of a module, made at the first call and kept: an unquantised base has its weights in them."""
    if GROUPS_OF not in module.__dict__:
        names = GROUPS.get(module.__dict__["forward"].__func__, ((),))
        module.__dict__[GROUPS_OF] = [Group([getattr(module, name) for name in each] or [module]) for each in names]
    return list(module.__dict__[GROUPS_OF])


def rows_of(x: Tensor) -> Tensor:
    """x as (T, in), the rows where they are: `reshape` would copy those that have room behind them."""
    return x[0] if x.dim() == 3 and x.shape[0] == 1 else x.reshape(-1, x.shape[-1])


def forward_linear(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for the forward of PEFT's lora.Linear."""
    (group,) = members_of(self)
    (y_TO,) = LoraLinears.apply(rows_of(x), group, *group.pairs)
    return y_TO.view(*x.shape[:-1], -1)


def forward_mlp(self: Any, x: Tensor) -> Tensor:
    """Stands for the forward of LlamaMLP and its like."""
    wide, down = members_of(self)
    y_TH = LoraSwiglu.apply(rows_of(x), wide, down, *wide.pairs, *down.pairs)
    return y_TH.view(x.shape)


def forward_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands for the forward of LlamaAttention and its like, on one packed sequence (1, T, H) without a cache."""
    length = hidden_states.shape[1]
    inner, outer = members_of(self)
    projected = LoraLinears.apply(hidden_states[0], inner, *inner.pairs)
    q_TND, k_TND, v_TND = (each.view(length, -1, self.head_dim) for each in projected)
    v_TND = v_TND.contiguous()  # attention keeps it, and as a part of the product it would keep q and k as well
    if hasattr(self, "q_norm"):
        q_TND, k_TND = self.q_norm(q_TND), self.k_norm(k_TND)
    cos_TD, sin_TD = (each[0] for each in position_embeddings)
    q_TND, k_TND = Rope.apply(q_TND, cos_TD, sin_TD), Rope.apply(k_TND, cos_TD, sin_TD)
    # Mistral's windows are the configuration's; Qwen's are each layer's; Llama has none, whatever its config.json says.
    windowed = self.config if type(self).__name__ == "MistralAttention" else self
    window = getattr(windowed, "sliding_window", None)
    out_TND = packed_attention(q_TND, k_TND, v_TND, Documents.of(kwargs), self.scaling, window)
    (y_TH,) = LoraLinears.apply(out_TND.reshape(length, -1), outer, *outer.pairs)
    return y_TH[None], None


def forward_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Stands for the forward of LlamaRMSNorm and its like."""
    return RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.__dict__.get("tail", 0))


FORWARDS = {forward_linear, forward_mlp, forward_attention, forward_norm}
# Linears that share an input, by the forward that uses them; without names: the module itself.
GROUPS = {
    forward_mlp: (("gate_proj", "up_proj"), ("down_proj",)),
    forward_attention: (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
}

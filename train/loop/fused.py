"""Our own forwards put in place of those of transformers and PEFT: what is kept and moved less.

Whole decoder layers of the Llama family (`layer.py`); elsewhere gated MLPs (`mlp.py`), LoRA linears and norms by
themselves. The modules, their parameters and what is saved stay PEFT's; `fuse` replaces instance methods and `unfuse`
takes them away again, so that golden replies come from PEFT's own code.

Whatever is not recognised keeps its own forward. Before a run, `train/loop/ways.py` compares the whole with the forward
of transformers and PEFT on a few tokens.

    >>> fuse(model)       # a PeftModel
"""

import contextlib
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from loraport.train.loop.attention import Documents
from loraport.train.loop.groups import LINEARS, Group, beside
from loraport.train.loop.kernels.heads import Heads
from loraport.train.loop.kernels.norm import RmsNorm
from loraport.train.loop.layer import Attention, Call, Layer, LoraLayer, Norm
from loraport.train.loop.mlp import LoraSwiglu, Mlp

# Attention modules that do nothing but project, normalise heads, rotate, attend and project.
PLAIN_ATTENTION = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
CODE = ("co_code", "co_consts", "co_names")
MADE = "loraport_made"  # where a module keeps what its forward is computed with


def fuse(model: Any) -> None:
    """Replace the forwards of what is recognised in a PeftModel. Layers then take packed sequences (attention.py)."""
    for module in model.modules():
        forward = recognise(module)
        if forward:
            module.forward = MethodType(forward, module)


def is_fused(module: Any) -> bool:
    """Whether a module's forward is one of ours now."""
    return getattr(module.__dict__.get("forward"), "__func__", None) in FORWARDS


def unfuse(model: Any) -> None:
    """Give all modules their own forwards back, and forget what ours were computed with: adapters may change now."""
    for module in model.modules():
        if is_fused(module):
            del module.forward
        for name in (MADE, "again", "to_host"):
            module.__dict__.pop(name, None)


def forget(model: Any) -> None:
    """Have the copies of the adapters made anew: optimisers outside of torch change them behind autograd's back."""
    for module in model.modules():
        if MADE in module.__dict__:
            for group in module.__dict__[MADE].groups:
                group.forget()


def recognise(module: Any) -> Any:
    """The forward that can stand for that of `module`, or None."""
    if is_llama_layer(module):
        return forward_layer
    if is_swiglu(module):
        return forward_mlp
    if hasattr(module, "lora_A") and type(getattr(module, "base_layer", None)).__name__ in LINEARS:
        return forward_linear
    return forward_norm if is_frozen_norm(module) else None


def same_code(module: Any, known: type) -> bool:
    """Whether a module computes what a class of transformers computes, by the compiled code of its forward.

    Names and attributes do not tell: FalconH1MLP scales its gate, GptOssRMSNorm rounds elsewhere.
    """
    ours, theirs = (getattr(each.forward, "__code__", None) for each in (type(module), known))  # type: ignore[attr-defined]
    return ours is not None and all(getattr(ours, part) == getattr(theirs, part) for part in CODE)


def is_frozen_norm(module: Any) -> bool:
    """Whether it is Llama's norm, and does not learn."""
    return same_code(module, LlamaRMSNorm) and not module.weight.requires_grad


def is_swiglu(module: Any) -> bool:
    """Whether it is Llama's MLP: down(silu(gate(x)) * up(x))."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(part is None for part in parts):
        return False
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    linears = all(type(getattr(part, "base_layer", part)).__name__ in LINEARS for part in parts)
    return silu and linears and same_code(module, LlamaMLP)


def is_llama_layer(module: Any) -> bool:
    """Whether it is Llama's layer, of parts that `layer.py` knows."""
    if not same_code(module, LlamaDecoderLayer) or type(module.self_attn).__name__ not in PLAIN_ATTENTION:
        return False
    attention = module.self_attn
    norms = [module.input_layernorm, module.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    parts = [getattr(attention, name) for name in (*ENTERING, LEAVING)]
    linears = all(type(getattr(part, "base_layer", part)).__name__ in LINEARS for part in parts)
    return linears and is_swiglu(module.mlp) and all(is_frozen_norm(norm) for norm in norms)


class LoraLinears(torch.autograd.Function):
    """A group on one input. Saves the input and x·A."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, group: Group, *_: Tensor | None) -> Tensor:
        """x (T, in) to y (T, out). `group.pairs` come as arguments too, for autograd to see them."""
        seed = group.seed()
        y_TO, thin_TR = group.forward(x_TI, seed)
        ctx.save_for_backward(x_TI, thin_TR)
        ctx.group, ctx.seed = group, seed
        return y_TO

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, and of each A and B."""
        x_TI, thin_TR = ctx.saved_tensors
        dy_TW = beside(dys[0], ctx.group)
        dx_TI, grads = ctx.group.backward(dy_TW, x_TI, thin_TR, ctx.seed, ctx.needs_input_grad[0])
        return dx_TI, None, *grads


def made_of(module: Any, make: Any) -> Any:
    """What a module's forward is computed with, made at the first call and kept: groups hold an unquantised base's
    weights.
    """
    if MADE not in module.__dict__:
        module.__dict__[MADE] = make(module)
    return module.__dict__[MADE]


def make_mlp(module: Any) -> Mlp:
    """Of a LlamaMLP and its like."""
    return Mlp(Group([module.gate_proj, module.up_proj]), Group([module.down_proj]))


def make_layer(module: Any) -> Layer:
    """Of a LlamaDecoderLayer and its like."""
    own = module.self_attn
    entering = Group([getattr(own, name) for name in ENTERING])
    queries, keys = (int(entering.bases[at].out_features) // own.head_dim for at in (0, 1))
    heads = Heads(queries, keys, own.head_dim)
    if hasattr(own, "q_norm"):
        q_norm, k_norm = norm_of(own.q_norm), norm_of(own.k_norm)
        heads = Heads(queries, keys, own.head_dim, q_norm.weight, k_norm.weight, q_norm.eps)
    attention = Attention(norm_of(module.input_layernorm), entering, Group([getattr(own, LEAVING)]), heads, own.scaling)
    return Layer(attention, norm_of(module.post_attention_layernorm), make_mlp(module.mlp))


def norm_of(module: Any) -> Norm:
    """Of a LlamaRMSNorm and its like."""
    return Norm(module.weight.detach(), module.variance_epsilon)


def forward_linear(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for the forward of PEFT's lora.Linear."""
    group = made_of(self, lambda module: Group([module]))
    return LoraLinears.apply(x.reshape(-1, x.shape[-1]), group, *group.pairs).view(*x.shape[:-1], -1)


def forward_mlp(self: Any, x: Tensor) -> Tensor:
    """Stands for the forward of LlamaMLP and its like."""
    mlp = made_of(self, make_mlp)
    return LoraSwiglu.apply(x.reshape(-1, x.shape[-1]), mlp, *mlp.pairs).view(x.shape)


def forward_layer(
    self: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
) -> Tensor:
    """Stands for the forward of LlamaDecoderLayer and its like, on one packed sequence (1, T, H) without a cache."""
    layer = made_of(self, make_layer)
    own = self.self_attn
    # Mistral's windows are the configuration's; Qwen's are each layer's; Llama has none, whatever its config.json says.
    windowed = own.config if type(own).__name__ == "MistralAttention" else own
    call = Call(
        position_embeddings[0][0],
        position_embeddings[1][0],
        Documents.of(kwargs),
        getattr(windowed, "sliding_window", None),
        learning=torch.is_grad_enabled(),
        again=bool(self.__dict__.get("again")),
    )
    with save_on_cpu(pin_memory=True) if self.__dict__.get("to_host") else contextlib.nullcontext():
        return LoraLayer.apply(hidden_states, layer, call, *layer.pairs)


def forward_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Stands for the forward of LlamaRMSNorm and its like."""
    return RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)


FORWARDS = {forward_linear, forward_mlp, forward_layer, forward_norm}
ENTERING, LEAVING = ("q_proj", "k_proj", "v_proj"), "o_proj"
